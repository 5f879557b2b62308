"""A node inside another asyncio program that has work of its own on the same loop: it serves and generates meanwhile.

The program's own work here is a ticker that wants to run every 5 ms and notes how late it was, and how much of that it
only waited for a free processor, which is no business of the node. Blocks, embedding, head and sampling run on the
node's own threads, so serving and generating never hold the loop up for 50 ms: exit code 1 if they did. Starting up
is another matter, and told apart: importing torch and building a large tokenizer hold Python's interpreter lock in one
piece, in whatever thread they run. Needs the `demo` extra for the weights.
"""

import asyncio
import sys
import time
from pathlib import Path

from swarmnode import Node, NodeConfig

TICK_S = 0.005
LIMIT_S = 0.050


def waited_s() -> float:
    """How long this thread was ready to run while all processors were taken; 0 where the system does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


class Ticker:
    """Our own work: a tick every 5 ms, and a note of the worst delays."""

    def __init__(self) -> None:
        self.late_s = 0.0
        self.held_up_s = 0.0

    async def run(self) -> None:
        while True:
            due, waited = time.perf_counter() + TICK_S, waited_s()
            await asyncio.sleep(TICK_S)
            late = time.perf_counter() - due
            self.late_s = max(self.late_s, late)
            self.held_up_s = max(self.held_up_s, late - (waited_s() - waited))

    def report(self, during: str) -> float:
        """The worst delay since the last report that was not the fault of a busy machine, in seconds."""
        held_up_s = self.held_up_s
        print(
            f"worst delay of our own work while {during}: {held_up_s * 1e3:.1f} ms"
            f" ({self.late_s * 1e3:.1f} ms with waiting for a processor)"
        )
        self.late_s = self.held_up_s = 0.0
        return held_up_s


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
