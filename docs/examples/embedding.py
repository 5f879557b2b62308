"""A node inside another asyncio program that has work of its own on the same loop: it serves and generates meanwhile.

The program's own work here is a ticker that wants to run every 5 ms and notes how late it was. Blocks, embedding, head
and sampling run on the node's own threads, so serving and generating never hold the loop up for 50 ms: exit code 1 if
they did. Starting up is another matter, and told apart: importing torch and building a large tokenizer hold Python's
interpreter lock in one piece, in whatever thread they run. Needs the `demo` extra for the weights.
"""

import asyncio
import sys
import time

from swarmnode import Node, NodeConfig

TICK_S = 0.005
LIMIT_S = 0.050


class Ticker:
    """Our own work: a tick every 5 ms, and a note of the worst delay."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def run(self) -> None:
        while True:
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self.worst_s = max(self.worst_s, time.perf_counter() - due)

    def report(self, during: str) -> float:
        """The worst delay since the last report, in seconds."""
        worst_s, self.worst_s = self.worst_s, 0.0
        print(f"worst delay of our own work while {during}: {worst_s * 1e3:.1f} ms")
        return worst_s


async def generate(ticker: Ticker) -> float:
    """Serve the whole model from this process and use it, through the same calls as with a thousand peers."""
    async with Node(NodeConfig(listen=["/ip4/127.0.0.1/tcp/0"])) as node:
        await node.serve("gemma3-270m")
        model = await node.model("gemma3-270m")
        async for _ in model.generate("Warm up:", max_new_tokens=1):
            ticker.report("starting up")
        async for piece in model.generate("The best thing about a garden is", max_new_tokens=64):
            print(piece.text, end="", flush=True)
        print()
        return ticker.report("serving and generating")


async def main() -> int:
    ticker = Ticker()
    async with asyncio.TaskGroup() as group:
        ticking = group.create_task(ticker.run())
        worst_s = await generate(ticker)
        ticking.cancel()
    return 0 if worst_s < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
