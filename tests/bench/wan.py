"""A swarm over an emulated wide-area network: the network's share of a token, the blocks', and ours. Needs root.

    python tests/bench/wan.py [--rtt 4 100] [--rate 100] [part ...]

Each node has a network namespace of its own; any two are joined by tests/lab with the round trip and rate given.
Parts: steps (a small Llama over 3 servers, against the sum of hops and blocks, and Petals), gemma (the real Gemma 3
270M, against llama.cpp RPC), speculation, prefill (1,024 tokens in chunks and in one piece), tail (bytes at the client
by who samples), clients (eight on one chain).

The bound of a step is half a measured round trip per hop, the frames' bytes over the rate, and the same blocks (and
head) timed bare in this run. The rivals' figures were recorded earlier on links and a machine of this kind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from chain import BLOCKS, bare_times, make_model
from decode import engine_rate
from helpers.processes import Process, environment
from lab.spaces import Lab, Unavailable

SPANS_3 = ["0:6", "6:12", "12:18"]
SMALL_3 = ["0:2", "2:4", "4:6"]
HIDDEN = 1024
STEPS = 60
TOKENS = 48
PETALS_STEPS = 3.7
"""Petals with pushes, 3 servers, 100 ms, 100 Mbit/s, a model of this shape."""
LLAMA_CPP = {"one side local": 4.85, "both remote": 3.2}
"""llama.cpp RPC, Gemma 3 270M, tokens/s over 2 nodes at 100 ms."""
REPETITIVE = (
    "Count to one hundred: one, two, three, four, five, one, two, three, four, five, one, two, three, four, five,"
)
PROSE = "The history of the city begins"


# -- the client, in a process and namespace of its own --


async def _steps(job: dict) -> dict:
    """Times of one-token steps on hidden states, and pings."""
    import torch
    from swarmnode import Node, NodeConfig

    async with Node(NodeConfig(**job["config"])) as node:
        model = await node.model(job["model"], dtype=job["dtype"])
        async with await model.session(max_length=512, wire=job["wire"]) as session:
            dtype = torch.float32 if job["dtype"] == "fp32" else torch.bfloat16
            await session.step(torch.randn(1, 16, HIDDEN).to(dtype))
            row, times = torch.randn(1, 1, HIDDEN).to(dtype), []
            for _ in range(STEPS):
                began = time.perf_counter()
                await session.step(row)
                times.append(time.perf_counter() - began)
            return {"times": times[10:], "route": session.route}


async def _generate(job: dict) -> dict:
    """One generation, or several at once; a model of this machine's own blocks if asked."""
    from swarmnode import Node, NodeConfig

    async with Node(NodeConfig(**job["config"])) as node:
        if job.get("serve"):
            await node.serve("gemma3-270m", span=tuple(job["serve"]), quant="none")
        model = await node.model("gemma3-270m", local_ends=job.get("local_ends", False))
        runs = await asyncio.gather(*(_run(model, job, number) for number in range(job.get("clients", 1))))
        return {"runs": runs}


async def _run(model, job: dict, number: int) -> dict:
    prompt = job["prompt"] if isinstance(job["prompt"], list) else f"{job['prompt']}"
    ids, marks = [], []
    began = time.perf_counter()
    async for piece in model.generate(prompt, max_new_tokens=job["tokens"], wire=job["wire"], **job.get("extra", {})):
        ids.append(piece.token_id)
        marks.append(time.perf_counter())
    rate = (len(marks) - 1) / (marks[-1] - marks[0]) if len(marks) > 1 else 0.0
    return {"first_s": marks[0] - began, "rate": rate, "ids": ids, "end_s": marks[-1] - began}


def child(text: str) -> None:
    """Run one job here and print what it gave."""
    import torch
    import uvloop

    torch.set_num_threads(1)
    job = json.loads(text)
    if rows := job.get("prefill_rows"):
        from swarmnode.node.client import generate

        generate.PREFILL_ROWS = rows
    found = uvloop.run({"steps": _steps, "generate": _generate}[job["job"]](job))
    print(json.dumps(found), flush=True)


# -- the world --


class World:
    """A client's namespace and servers in theirs."""

    def __init__(self, lab: Lab, rtt_ms: float, rate_mbit: float, home: Path, cache: Path) -> None:
        self._wan = lab.wan(4, delay_ms=rtt_ms / 2, rate_mbit=rate_mbit)
        self.home, self.cache = home, cache
        self._env = environment(home / "home", cache)
        self._clients = 0

    @property
    def rtt_s(self) -> float:
        """Round trip between two namespaces: what a TCP handshake takes, the median of ten."""
        here, there = self._wan.spaces[:2]
        times = []
        with there.socket() as listener:
            listener.bind((there.address, 0))
            listener.listen()
            for _ in range(10):
                with here.socket() as sock:
                    began = time.perf_counter()
                    sock.connect(listener.getsockname())
                    times.append(time.perf_counter() - began)
        return statistics.median(times)

    def bytes_to_client(self) -> int:
        """Bytes the client's namespace has received."""
        return self._wan.counters()[0].bytes

    @contextlib.contextmanager
    def servers(self, spans: list[str], model: str = "gemma3-270m", dtype: str = "bf16"):
        """Serve these spans, one namespace each; yields the first address."""
        running: list[Process] = []
        addresses: list[str] = []
        try:
            for span, space in zip(spans, self._wan.spaces[1:], strict=False):
                command = ["join", model, "--serve", span, "--dtype", dtype, "--listen", f"/ip4/{space.address}/tcp/0"]
                command += ["--peer", addresses[0]] if addresses else []
                running.append(Process(command, self._env, space))
                addresses.append(running[-1].ready())
            yield addresses[0]
        finally:
            for process in running:
                process.kill()

    def client(self, job: str, peer: str, *, listen: bool = False, **fields) -> dict:
        """Run a job in the client's namespace."""
        self._clients += 1
        own = self.home / f"client{self._clients}"
        space = self._wan.spaces[0]
        config = {
            "listen": [f"/ip4/{space.address}/tcp/0"] if listen else [],
            "peers": [peer],
            "dht_server": listen,
            "cache_dir": str(self.cache),
            "data_dir": str(own),
            "state_dir": str(own),
        }
        text = json.dumps({"job": job, "config": config, **fields})
        command = space.command([sys.executable, "-P", __file__, "--child", text])
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return json.loads(done.stdout)


# -- the parts --


def steps(world: World, rtt_ms: float, rate: float) -> None:
    """A small Llama over three servers, hidden states in and out, fp32 on the wire."""
    folder = make_model(world.home / f"model{rtt_ms:g}")
    with world.servers(SMALL_3, str(folder), "fp32") as peer:
        rtt_s = world.rtt_s
        found = world.client("steps", peer, model=str(folder), dtype="fp32", wire="fp32")
    bare_s = statistics.median(bare_times(folder, world.cache, "fp32"))
    hops = len(SMALL_3) + 1
    wire_s = hops * 4 * HIDDEN * 8 / (rate * 1e6) if rate else 0.0
    bound_s = hops * rtt_s / 2 + wire_s + bare_s
    step_s = statistics.median(found["times"])
    rival = f"; Petals {PETALS_STEPS:.1f}: {1 / step_s / PETALS_STEPS:.2f}x" if rtt_ms >= 100 else ""
    print(
        f"{rtt_ms:4g} ms  {BLOCKS} blocks over 3, fp32   {step_s * 1e3:7.1f} ms a step, hops + blocks "
        f"{bound_s * 1e3:6.1f} ms: {step_s / bound_s:.2f}x   {1 / step_s:5.2f} steps/s{rival}"
    )


def gemma(world: World, rtt_ms: float, rate: float) -> None:
    """The real model: the client serves half of the blocks itself, or none; over two servers and over three."""
    engine_s = 1 / engine_rate(world.cache)
    with world.servers(["9:18"]) as peer:
        rtt_s = world.rtt_s
        found = world.client(
            "generate", peer, listen=True, serve=(0, 9), prompt=PROSE, tokens=TOKENS, wire="auto", local_ends=True
        )
        _told("one side local", rtt_ms, found, rtt_s + engine_s)
    with world.servers(["0:9", "9:18"]) as peer:
        found = world.client("generate", peer, prompt=PROSE, tokens=TOKENS, wire="auto")
        _told("both remote", rtt_ms, found, 1.5 * rtt_s + engine_s)
    with world.servers(SPANS_3) as peer:
        for who, ends in (("three, thin client", False), ("three, own ends", True)):
            found = world.client("generate", peer, prompt=PROSE, tokens=TOKENS, wire="auto", local_ends=ends)
            _told(who, rtt_ms, found, 2 * rtt_s + engine_s)


def _told(who: str, rtt_ms: float, found: dict, bound_s: float) -> None:
    rate = found["runs"][0]["rate"]
    recorded = LLAMA_CPP.get(who) if rtt_ms >= 100 else None
    rival = f"; llama.cpp RPC {recorded}: {rate / recorded:.2f}x" if recorded else ""
    print(
        f"{rtt_ms:4g} ms  gemma3-270m, {who:19} {1e3 / rate:7.1f} ms a token, hops + engine {bound_s * 1e3:6.1f} ms: "
        f"{1 / rate / bound_s:.2f}x   {rate:5.2f} tokens/s{rival}"
    )


def speculation(world: World, rtt_ms: float, rate: float) -> None:
    """A repetitive text, with and without drafts."""
    with world.servers(["0:9", "9:18"]) as peer:
        for ends in (False, True):
            runs = {
                kind: world.client(
                    "generate",
                    peer,
                    prompt=REPETITIVE,
                    tokens=2 * TOKENS,
                    wire="auto",
                    local_ends=ends,
                    extra={"speculate": kind},
                )["runs"][0]
                for kind in ("off", "auto")
            }
            same = "same" if runs["off"]["ids"] == runs["auto"]["ids"] else "DIFFERENT"
            plain, drafted = runs["off"]["rate"], runs["auto"]["rate"]
            print(
                f"{rtt_ms:4g} ms  repetitive text, {'own ends' if ends else 'thin client':12}  {plain:6.2f} -> "
                f"{drafted:6.2f} tokens/s: {drafted / plain:.2f}x, {same} tokens"
            )


def prefill(world: World, rtt_ms: float, rate: float) -> None:
    """1,024 tokens over three stages: time to the first token, in chunks and whole."""
    ids = [2, *(1000 + 7 * number % 5000 for number in range(1023))]
    with world.servers(SPANS_3) as peer:
        times = {}
        for rows in (128, 1024, 128, 1024):
            found = world.client(
                "generate", peer, prompt=ids, tokens=1, wire="bf16", local_ends=True, prefill_rows=rows
            )
            times.setdefault(rows, []).append(found["runs"][0]["first_s"])
    chunked, whole = min(times[128]), min(times[1024])
    print(
        f"{rtt_ms:4g} ms  1,024 tokens over 3         {chunked:5.2f} s in chunks, {whole:5.2f} s whole: "
        f"{whole / chunked:.2f}x"
    )


def tail(world: World, rtt_ms: float, rate: float) -> None:
    """Bytes the client receives per token, by who samples."""
    with world.servers(["0:9", "9:18"]) as peer:
        found = {}
        for who, ends in (("client", True), ("tail", False)):
            counts = {}
            for tokens in (8, 72):
                before = world.bytes_to_client()
                ids = world.client("generate", peer, prompt=PROSE, tokens=tokens, wire="bf16", local_ends=ends)
                counts[tokens] = world.bytes_to_client() - before
            found[who] = (counts[72] - counts[8]) / 64, ids["runs"][0]["ids"]
    same = "same" if found["client"][1] == found["tail"][1] else "DIFFERENT"
    client, tail_bytes = found["client"][0], found["tail"][0]
    print(
        f"{rtt_ms:4g} ms  bytes a token at the client  {client:.0f} when it samples, {tail_bytes:.0f} when the tail "
        f"does: {client / tail_bytes:.1f}x less, {same} tokens"
    )


def clients(world: World, rtt_ms: float, rate: float) -> None:
    """Eight generations at once over one chain."""
    with world.servers(SPANS_3) as peer:
        one, eight = (
            world.client("generate", peer, prompt=PROSE, tokens=TOKENS, wire="bf16", clients=count) for count in (1, 8)
        )
    alone = one["runs"][0]["rate"]
    total = sum(run["rate"] for run in eight["runs"])
    print(
        f"{rtt_ms:4g} ms  8 clients on one chain      {total:6.2f} tokens/s in all, one alone {alone:6.2f}: "
        f"{total / alone:.1f}x"
    )


PARTS = {part.__name__: part for part in (steps, gemma, speculation, prefill, tail, clients)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="only these")
    parser.add_argument("--rtt", type=float, nargs="+", default=[4.0, 100.0], help="round trips in ms")
    parser.add_argument("--rate", type=float, default=100.0, help="of each node's line, Mbit/s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child)
        return
    import torch

    torch.set_num_threads(1)
    try:
        for rtt_ms in asked.rtt:
            with Lab() as lab, tempfile.TemporaryDirectory() as name:
                world = World(lab, rtt_ms, asked.rate, Path(name), Path(tempfile.gettempdir()) / "swarmnode-test-cache")
                for part in asked.parts or PARTS:
                    PARTS[part](world, rtt_ms, asked.rate)
                    sys.stdout.flush()
    except Unavailable as exc:
        raise SystemExit(f"this needs network namespaces: {exc}") from exc


if __name__ == "__main__":
    main()
