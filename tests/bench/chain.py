"""What a server adds to a token beyond its blocks: real processes on loopback, one thread each.

A Llama of 6 blocks, 1024 wide, with tiny feed-forwards (model "o" of the notes on Petals): so little arithmetic that
the rest shows. One-token steps on hidden states, over 1 and 3 servers; the bare blocks are timed in this process by the
same engine. fixed cost = (step - blocks) / servers. Petals' own figure on such a machine is 8-10 ms per server.

    python tests/bench/chain.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.processes import environment, swarm

STEPS = 200
WARM = 20
PREFIX = 16
BLOCKS = 6
PETALS_MS = 8.7
"""Petals, one server, same shape, from its authors' code run on this kind of machine."""


def make_model(folder: Path) -> Path:
    """A random checkpoint in Hugging Face layout."""
    from helpers.tiny_models import make_checkpoint

    return make_checkpoint(
        folder,
        "llama",
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=512,
    )


async def step_times(address: str, folder: Path, cache: Path) -> list[float]:
    """Seconds of each one-token step through the whole chain."""
    import torch
    from swarmnode import Node, NodeConfig

    config = NodeConfig(listen=(), peers=(address,), dht_server=False, cache_dir=cache)
    async with Node(config) as node:
        model = await node.model(str(folder))
        async with await model.session(max_length=512, wire="bf16") as session:
            await session.step(torch.randn(1, PREFIX, 1024).bfloat16())
            row, times = torch.randn(1, 1, 1024).bfloat16(), []
            for _ in range(STEPS):
                began = time.perf_counter()
                await session.step(row)
                times.append(time.perf_counter() - began)
            return times[WARM:]


def bare_times(folder: Path, cache: Path, dtype_name: str = "bf16") -> list[float]:
    """Seconds of the same steps on the blocks alone."""
    import torch
    from swarmnode.kernels.engine import DTYPES, load_span
    from swarmnode.kernels.kvcache import KVPool
    from swarmnode.kernels.loading.checkpoint import open_checkpoint
    from swarmnode.kernels.span import Piece
    from swarmnode.protocol.tensors import Codec

    checkpoint = open_checkpoint(str(folder), cache_dir=cache)
    dtype = DTYPES[dtype_name]
    span = load_span(checkpoint, 0, BLOCKS, dtype=dtype)
    lane = KVPool(1 << 28, checkpoint.config, 0, BLOCKS, dtype).open_lane()
    times = []
    with torch.inference_mode():
        for position in range(PREFIX + STEPS):
            row = torch.randn(1, 1024).to(dtype)
            lane.reserve(position + 1)
            began = time.perf_counter()
            span.run(row, [Piece(lane, position, 1, frozenset(), Codec.BF16)], 0, BLOCKS)
            times.append(time.perf_counter() - began)
    return times[PREFIX + WARM :]


def run_on(spans: list[str], folder: Path, env: dict[str, str], cache: Path) -> list[float]:
    """Step times over these servers, on the loop the command line uses."""
    import uvloop

    with swarm(env, spans, model=str(folder)) as (_, addresses):
        return uvloop.run(step_times(addresses[0], folder, cache))


def rows() -> list[tuple[str, float, float]]:
    """(what, median ms, best-tenth ms)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            home, cache = Path(name), Path(name) / "cache"
            folder = make_model(home / "model")
            env = environment(home, home / "xdg-cache")
            one = run_on(["0:6"], folder, env, cache)
            three = run_on(["0:2", "2:4", "4:6"], folder, env, cache)
            bare = bare_times(folder, cache)
    finally:
        torch.set_num_threads(threads)
    return [(what, *_ms(times)) for what, times in (("blocks alone", bare), ("1 server", one), ("3 servers", three))]


def _ms(times: list[float]) -> tuple[float, float]:
    return statistics.median(times) * 1e3, sorted(times)[len(times) // 10] * 1e3


def main() -> None:
    """Print the table."""
    table = rows()
    bare = table[0]
    print(f"{'one-token step':16} {'median':>9} {'p10':>9}  fixed cost per server (p10)")
    for (what, median, best), servers in zip(table, (0, 1, 3), strict=True):
        fixed = (best - bare[2]) / servers if servers else 0.0
        note = f"{fixed:6.2f} ms; Petals {PETALS_MS} ms: {PETALS_MS / fixed:.0f}x less" if servers else ""
        print(f"{what:16} {median:6.2f} ms {best:6.2f} ms  {note}")


if __name__ == "__main__":
    main()
