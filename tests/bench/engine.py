"""How fast blocks compute here: beside the machine's limits and beside transformers, in one run.

    python tests/bench/engine.py [--threads N] [--rounds N] [--quick] [--json]

Every figure is the best of several rounds, and a round measures all of them one after another, so that a busy machine
disturbs all alike. "limit" is weight bytes / measured read bandwidth for decode, floating-point operations / measured
rate of a big product (in fp32 for fp32, else in bf16) for prefill. "products" is the same share for the matrix products
alone, one row (padded as the engine pads it), and for 16 sessions what share of the pass they are: what is missing from
100 % there is ours, what is missing from the limit before is the libraries'. Decode and prefill are at 512 positions
(32 for the tiny shape). Weights are random and rotate over several blocks, so that no cache holds them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/helpers

from helpers.tiny_models import RandomCheckpoint
from swarmnode.kernels.engine import load_span
from swarmnode.kernels.kvcache import KVPool
from swarmnode.kernels.linear import pad_rows
from swarmnode.kernels.measure import matmul_rate, read_bandwidth
from swarmnode.kernels.models.config import ModelConfig, RopeConfig
from swarmnode.kernels.span import Piece, Span

CONTEXT = 512
"""Cached positions in decode, and rows of a prefill."""
TINY_CONTEXT = 32
SESSIONS = 16
SLICE_S = 0.03

TINY = ModelConfig(
    family="llama",
    num_blocks=16,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-6,
    max_positions=2048,
    rope=RopeConfig(theta=10_000.0),
    query_scale=0.25,
)
GEMMA = replace(
    TINY,
    family="gemma3",
    num_blocks=18,
    hidden_size=640,
    intermediate_size=2048,
    num_kv_heads=1,
    head_dim=256,
    local_rope=RopeConfig(theta=10_000.0),
    sliding_window=512,
    sliding_blocks=tuple(bool((index + 1) % 6) for index in range(18)),
    activation="gelu_tanh",
    query_scale=1 / 16,
    qk_norm=True,
    norm_offset=1.0,
    post_norms=True,
)
ONE_B = replace(TINY, num_blocks=5, hidden_size=2048, intermediate_size=5632, num_heads=32, num_kv_heads=4, head_dim=64)
SEVEN_B = replace(
    TINY, num_blocks=2, hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128
)
SHAPES = {"tiny (overhead)": TINY, "Gemma 3 270M": GEMMA, "Llama 1.1B": ONE_B, "Llama 7B": SEVEN_B}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Case:
    """One engine on one shape: what it runs, and the best seconds per block seen so far."""

    shape: str
    engine: str
    blocks: int
    weight_bytes: int
    prefill_flops: int
    runs: dict
    best: dict = field(default_factory=dict)

    def measure(self) -> None:
        for name, run in self.runs.items():
            began = time.perf_counter()
            while True:  # short passes several times over: what is measured is not how cold the caches are
                start = time.perf_counter()
                run()
                now = time.perf_counter()
                seconds = (now - start) / self.blocks
                self.best[name] = min(self.best.get(name, seconds), seconds)
                if now - began > SLICE_S:
                    break


def context_of(config: ModelConfig) -> int:
    return TINY_CONTEXT if config.hidden_size == TINY.hidden_size else CONTEXT


def products(span: Span, config: ModelConfig, rows: int):
    """The matrix products of a pass alone, as it would call them."""
    widths = (config.hidden_size, config.num_heads * config.head_dim, config.hidden_size, config.intermediate_size)
    calls = [
        (linear, torch.randn(pad_rows(torch.zeros(rows, 1)).shape[0] if linear.needs_padding else rows, width))
        for block in span._blocks
        for linear, width in zip(block.linears, widths, strict=True)
    ]
    return lambda: [linear(given) for linear, given in calls]


def our_case(shape: str, config: ModelConfig, dtype: torch.dtype, quant: str) -> Case:
    span = load_span(RandomCheckpoint(config), 0, config.num_blocks, dtype=dtype, quant=quant)
    pool = KVPool(1 << 34, config, 0, config.num_blocks, dtype)
    context = context_of(config)
    lanes = [pool.open_lane() for _ in range(SESSIONS)]
    for lane in lanes:  # as if rows had been there: what is cached does not change the time
        lane.reserve(context)
        lane.length = context
    prefill_lane = pool.open_lane()
    rows = torch.randn(context, config.hidden_size).to(dtype)
    batch = torch.randn(SESSIONS, config.hidden_size).to(dtype)
    runs = {
        "decode": lambda: span.run(batch[:1], [Piece(lanes[0], context, 1)]),
        "decode16": lambda: span.run(batch, [Piece(lane, context, 1) for lane in lanes]),
        "prefill": lambda: span.run(rows, [Piece(prefill_lane, 0, context)]),
        "products": products(span, config, 1),
        "products16": products(span, config, SESSIONS),
    }
    name = f"ours {quant if quant != 'none' else ''} {'bf16' if dtype is torch.bfloat16 else 'fp32'}".replace("  ", " ")
    flops = 2 * config.block_parameters() * context
    return Case(shape, name, config.num_blocks, span.size_bytes // config.num_blocks, flops, runs)


def rival_case(shape: str, config: ModelConfig, dtype: torch.dtype) -> Case:
    """transformers' own decoder layers, with its cache, SDPA attention."""
    from transformers import AutoConfig, AutoModel
    from transformers.cache_utils import DynamicCache

    common = {
        "vocab_size": 64,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_blocks,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "pad_token_id": None,
    }
    more = {"sliding_window": 512} if config.family == "gemma3" else {}
    model_type = "gemma3_text" if config.family == "gemma3" else "llama"
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **common, **more), dtype=dtype).eval()
    context = context_of(config)
    rows = torch.randn(1, context, config.hidden_size).to(dtype)
    cache = DynamicCache(config=model.config)
    state = {"cache": cache, "tokens": 0}

    def prefill() -> None:
        state["cache"], state["tokens"] = DynamicCache(config=model.config), context
        model(inputs_embeds=rows, past_key_values=state["cache"], use_cache=True)

    def decode() -> None:
        model(inputs_embeds=rows[:, :1], past_key_values=state["cache"], use_cache=True)

    bytes_per_block = config.block_parameters() * dtype.itemsize
    name = f"transformers {'bf16' if dtype is torch.bfloat16 else 'fp32'}"
    runs = {"prefill": prefill, "decode": decode}
    return Case(shape, name, config.num_blocks, bytes_per_block, 2 * config.block_parameters() * context, runs)


def cases_of(shape: str, quick: bool, rivals: bool) -> list[Case]:
    config = SHAPES[shape]
    found = [our_case(shape, config, dtype, "none") for dtype in DTYPES.values()]
    found += [our_case(shape, config, torch.bfloat16, quant) for quant in ("int8", "nf4") if not quick]
    if rivals:
        found += [rival_case(shape, config, dtype) for dtype in DTYPES.values()]
    return found


def run_shape(shape: str, options: argparse.Namespace) -> tuple[list[Case], float, dict[str, float]]:
    """Best figures of every engine on one shape, and the bandwidth and rates seen between them."""
    cases = cases_of(shape, options.quick, not options.no_rivals)
    bandwidth, rate = 0.0, dict.fromkeys(DTYPES, 0.0)
    with torch.inference_mode():
        for _ in range(options.rounds):
            bandwidth = max(bandwidth, read_bandwidth(64 << 20))
            rate = {name: max(rate[name], matmul_rate(dtype, 512)) for name, dtype in DTYPES.items()}
            for case in cases:
                case.measure()
    return cases, bandwidth, rate


def rows_of(cases: list[Case], bandwidth: float, rate: dict[str, float]) -> list[dict]:
    rivals = {case.engine.split()[-1]: case for case in cases if case.engine.startswith("transformers")}
    rows = []
    for case in cases:
        decode, prefill = case.best["decode"], case.best["prefill"]
        dtype = "fp32" if case.engine.endswith("fp32") else "bf16"
        rival, alone, alone16 = rivals.get(dtype), case.best.get("products"), case.best.get("products16")
        rows.append(
            {
                "shape": case.shape,
                "engine": case.engine,
                "decode_us_per_block": decode * 1e6,
                "decode_share_of_limit": case.weight_bytes / bandwidth / decode,
                "products_share_of_limit": case.weight_bytes / bandwidth / alone if alone else None,
                "sixteen_sessions_gain": SESSIONS * decode / case.best["decode16"] if alone16 else None,
                "sixteen_sessions_products_share": alone16 / case.best["decode16"] if alone16 else None,
                "prefill_us_per_block": prefill * 1e6,
                "prefill_share_of_limit": case.prefill_flops / rate[dtype] / prefill,
                "decode_vs_transformers": rival.best["decode"] / decode if rival else None,
                "prefill_vs_transformers": rival.best["prefill"] / prefill if rival else None,
            }
        )
    return rows


COLUMNS = (
    ("shape", "shape", "{}"),
    ("engine", "engine", "{}"),
    ("decode us/block", "decode_us_per_block", "{:.0f}"),
    ("of limit", "decode_share_of_limit", "{:.0%}"),
    ("products", "products_share_of_limit", "{:.0%}"),
    ("x transformers", "decode_vs_transformers", "{:.1f}x"),
    ("16 sessions", "sixteen_sessions_gain", "{:.1f}x"),
    ("products", "sixteen_sessions_products_share", "{:.0%}"),
    ("prefill us/block", "prefill_us_per_block", "{:.0f}"),
    ("of limit", "prefill_share_of_limit", "{:.0%}"),
    ("x transformers", "prefill_vs_transformers", "{:.1f}x"),
)


def table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(title for title, _, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = ("" if row[name] is None else form.format(row[name]) for _, name, form in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="only unquantized weights and the two small shapes")
    parser.add_argument("--no-rivals", action="store_true", help="without transformers")
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = options.shape or (list(SHAPES)[:2] if options.quick else list(SHAPES))
    found = []
    for shape in shapes:
        cases, bandwidth, rate = run_shape(shape, options)
        found += rows_of(cases, bandwidth, rate)
        print(
            f"{shape}: {options.threads} thread(s), reads {bandwidth / 1e9:.1f} GB/s, "
            f"bf16 {rate['bf16'] / 1e9:.0f}, fp32 {rate['fp32'] / 1e9:.0f} GFLOP/s",
            file=sys.stderr,
        )
    print(json.dumps(found, indent=1) if options.json else table(found))


if __name__ == "__main__":
    main()
