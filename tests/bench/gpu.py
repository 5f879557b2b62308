"""Blocks on a CUDA device: time and share of the memory's bandwidth, and whether rows are exact there.

Random weights in the shapes of Llama 2 7B and a 1.1B model, bf16. The copy bandwidth of the same device, measured in
the same run, is the limit a decode step is held against. Needs no network and no model.

    python tests/bench/gpu.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.tiny_models import RandomCheckpoint, make_config
from swarmnode.kernels.engine import load_span
from swarmnode.kernels.kvcache import KVPool
from swarmnode.kernels.span import Piece, Span

BLOCKS = 4
SHAPES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_heads": 32, "num_kv_heads": 4, "head_dim": 64},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128},
}
REPEATS = 30


def timed(work) -> float:
    """Best seconds of REPEATS, with the device finished each time."""
    best = float("inf")
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def bandwidth() -> float:
    """Bytes per second read and written by a device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source))


def step(span: Span, tokens: int, context: int, lanes: int = 1) -> float:
    """Seconds per block of one pass: `lanes` lanes of `tokens` tokens each, behind `context` cached ones."""
    pool = KVPool(1 << 33, span.config, 0, BLOCKS, torch.bfloat16, "cuda")
    caches = [pool.open_lane() for _ in range(lanes)]
    hidden = span.config.hidden_size
    for cache in caches:
        cache.reserve(context + tokens)
        span.run(torch.randn(context, hidden, device="cuda").bfloat16(), [Piece(cache, 0, context)])
    rows = torch.randn(tokens * lanes, hidden, device="cuda").bfloat16()

    def work() -> None:
        for cache in caches:
            cache.truncate(context)
        span.run(rows, [Piece(cache, context, tokens) for cache in caches])

    seconds = timed(work) / BLOCKS
    for cache in caches:
        cache.free()
    return seconds


def exact_rows(span: Span) -> float:
    """Share of rows whose bits are the same computed one by one and in one prefill."""
    pool, hidden = KVPool(1 << 33, span.config, 0, BLOCKS, torch.bfloat16, "cuda"), span.config.hidden_size
    rows = torch.randn(70, hidden, device="cuda").bfloat16()
    whole, single = pool.open_lane(), pool.open_lane()
    for lane in (whole, single):
        lane.reserve(70)
    together = span.run(rows, [Piece(whole, 0, 70)])
    alone = torch.cat([span.run(rows[i : i + 1], [Piece(single, i, 1)]) for i in range(70)])
    return (together == alone).all(-1).float().mean().item()


def main() -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here")
    limit = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy bandwidth {limit / 1e12:.2f} TB/s")
    print(f"{'shape':6} {'pass':24} {'us a block':>11} {'of bandwidth':>13}")
    for name, shape in SHAPES.items():
        config = make_config(**shape, num_blocks=BLOCKS, max_positions=4096, query_scale=shape["head_dim"] ** -0.5)
        with torch.inference_mode():
            span = load_span(RandomCheckpoint(config), 0, BLOCKS, dtype=torch.bfloat16, device="cuda")
            block_bytes = span.size_bytes / BLOCKS
            for what, tokens, lanes in (("decode, 1 lane", 1, 1), ("decode, 16 lanes", 1, 16), ("prefill 512", 512, 1)):
                seconds = step(span, tokens, 256, lanes)
                share = block_bytes / seconds / limit if tokens == 1 else float("nan")
                print(f"{name:6} {what:24} {seconds * 1e6:11.0f} {share:12.0%}")
            print(f"{name:6} rows equal to the bit, prefill against single steps: {exact_rows(span):.0%}")


if __name__ == "__main__":
    main()
