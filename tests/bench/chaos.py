"""Serving processes are killed all the time, and the text does not change: 3 stages x 2 replicas of Gemma 3 270M.

    python tests/bench/chaos.py [--prompts 20] [--tokens 128] [--every 2] [--how kill stop] [--seed 1]

The reference is one process with all blocks. Every few seconds a random process that has a session is killed (or
stopped with SIGSTOP, and killed 3 s later) and started again at once, never a stage's last replica that is up. Printed:
tokens that differ, errors the client saw, stalls (a text's longest gap between two pieces less the median one).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.processes import Server, Servers, environment
from swarmnode.protocol.errors import SwarmError

STAGES = ((0, 6), (6, 12), (12, 18))
REPLICAS = 2
STOPPED_S = 3.0
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
OPENINGS = (
    "The history of the city begins",
    "She opened the letter and",
    "A recipe for bread:",
    "The three laws of motion say that",
    "In the middle of the night",
)


class Chaos:
    """Strikes at one of the serving processes again and again."""

    def __init__(self, servers: Servers, rng: random.Random, how: list[str], busy) -> None:
        self.strikes: Counter[str] = Counter()
        self._servers, self._rng, self._how, self._busy = servers, rng, how, busy
        self._restarts: set[asyncio.Task] = set()

    async def rage(self, every_s: float) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            await self._strike()

    async def _strike(self) -> None:
        up = Counter(server.span for server in self._servers.running)
        candidates = [server for server in self._servers.running if up[server.span] > 1]
        victims = [server for server in candidates if await self._busy(server)]
        if not victims:
            self.strikes["nobody to strike"] += 1
            return
        victim, how = self._rng.choice(victims), self._rng.choice(self._how)
        self.strikes[how] += 1
        self._servers.running.remove(victim)
        task = asyncio.create_task(self._end_and_restart(victim, how))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _end_and_restart(self, victim: Server, how: str) -> None:
        victim.process.kill(SIGNALS[how])
        if how == "stop":
            await asyncio.sleep(STOPPED_S)
            await asyncio.to_thread(victim.process.kill)
        await asyncio.to_thread(self._servers.start, victim.span)

    async def end(self) -> None:
        """Wait for the restarts under way."""
        await asyncio.gather(*self._restarts, return_exceptions=True)


async def write(model, prompt: str, tokens: int) -> list[int]:
    """A text's ids: fewer than asked where the model ends it."""
    pieces = model.generate(prompt, max_new_tokens=tokens, wire="bf16", speculate="off")
    return [piece.token_id async for piece in pieces]


@contextlib.asynccontextmanager
async def client(swarm: str, peers: list[str], cache: Path, home: Path):
    """A node of this process that joins these."""
    from swarmnode import Node, NodeConfig

    folders = {"cache_dir": cache, "data_dir": home, "state_dir": home}
    config = NodeConfig(swarm=swarm, listen=(), peers=tuple(peers), dht_server=False, **folders)
    async with Node(config) as node:
        yield node


async def references(env: dict[str, str], cache: Path, home: Path, prompts: list[str], tokens: int) -> list[list[int]]:
    """What one process with all blocks writes."""
    servers = Servers(env, "--swarm", "calm")
    try:
        await asyncio.to_thread(servers.start, (0, 18))
        async with client("calm", [servers.address], cache, home) as node:
            model = await node.model("gemma3-270m")
            return [await write(model, prompt, tokens) for prompt in prompts]
    finally:
        servers.stop()


async def run(options: argparse.Namespace) -> int:
    """0 if every text was right and no error came."""
    import torch
    from swarmnode.protocol.ids import PeerId

    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    prompts = [f"{OPENINGS[n % len(OPENINGS)]} {n}" for n in range(options.prompts)]
    cache = Path(tempfile.gettempdir()) / "swarmnode-test-cache"
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        env = environment(home / "user", cache)
        expected = await references(env, cache, home / "reference", prompts, options.tokens)
        print(f"reference: {len(expected)} texts, {sum(map(len, expected))} tokens", flush=True)
        servers = Servers(environment(home / "other", cache), "--swarm", "chaos")
        try:
            await asyncio.to_thread(servers.start, *STAGES * REPLICAS)
            async with client("chaos", [server.address for server in servers.running], cache, home / "client") as node:
                model = await node.model("gemma3-270m")

                async def busy(server: Server) -> bool:
                    info = await node.info(PeerId.parse(server.peer), model.digest)
                    return info is not None and info.sessions > 0

                return await storm(model, prompts, expected, Chaos(servers, rng, options.how, busy), options)
        finally:
            servers.stop()


async def storm(model, prompts: list[str], expected: list[list[int]], chaos: Chaos, options) -> int:
    """All the texts while servers die; prints and judges what came of it."""
    stalls, wrong, errors, repairs = [], 0, 0, 0
    raging = asyncio.create_task(chaos.rage(options.every))
    try:
        for prompt, ids in zip(prompts, expected, strict=True):
            try:
                got = await write(model, prompt, options.tokens)
            except SwarmError as exc:
                errors += 1
                print(f"{prompt!r}: {type(exc).__name__}: {exc}", flush=True)
                continue
            stats = model.last_stats
            differ = sum(one != other for one, other in zip(got, ids, strict=False)) + abs(len(got) - len(ids))
            wrong += differ
            repairs += stats.repairs
            stalls.append(stats.stall_s)
            print(
                f"{len(got)} tokens, {differ} wrong, {stats.repairs} repairs, stall {stats.stall_s * 1000:.0f} ms",
                flush=True,
            )
    finally:
        raging.cancel()
        await chaos.end()
    stalls.sort()
    p95 = stalls[min(len(stalls) - 1, int(len(stalls) * 0.95))] if stalls else float("nan")
    print(f"strikes: {dict(chaos.strikes)}; {repairs} repairs")
    print(f"{wrong} wrong tokens, {errors} errors, stall p95 {p95 * 1000:.0f} ms, worst {max(stalls) * 1000:.0f} ms")
    return int(bool(wrong or errors))


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--every", type=float, default=2.0)
    parser.add_argument("--how", nargs="+", choices=sorted(SIGNALS), default=["kill"])
    parser.add_argument("--seed", type=int, default=1)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
