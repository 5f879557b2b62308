"""What this machine computes, bit for bit, and how fast: compute class, block timings, limits.

Two servers may replace each other in a session without changing a token only if they compute the same bits. The class
names everything that decides about them: how weights are held, the compute dtype, the revision of our kernels, the
versions of the libraries below, and a probe: small blocks run on fixed inputs, because processors with other vector
units round differently under the same software.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from typing import Final

import torch

from ..protocol.errors import ConfigError
from .attention import TILE
from .engine import load_span
from .kvcache import KVPool, LaneCache
from .models.config import ModelConfig, RopeConfig
from .span import Piece, Span

KERNEL_REVISION: Final = 2
"""Raise it with every change that may alter a bit of any row."""
CLASS_BYTES: Final = 8
"""Length of a compute class."""
PREFILL_ROWS: Final = 128
"""Rows of the prefill that block timings refer to."""
_PROBE_ROWS: Final = (1, 5, 64)
_REPEATS: Final = 5
_TIMING_BUDGET_S: Final = 0.5
"""Repeats stop after this long: a span of a big model takes seconds for one pass."""
_TIMED_BLOCKS: Final = 4
"""Blocks that block timings run; the others have the same shape."""
_UNBOUNDED: Final = 1 << 62

_log = logging.getLogger(__name__)

_LLAMA: Final = ModelConfig(
    family="llama",
    num_blocks=1,
    hidden_size=256,
    intermediate_size=512,
    vocab_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-6,
    max_positions=256,
    rope=RopeConfig(theta=10_000.0),
    query_scale=0.125,
)
_GEMMA: Final = replace(
    _LLAMA,
    family="gemma3",
    local_rope=RopeConfig(theta=1_000.0),
    sliding_window=40,
    sliding_blocks=(True,),
    activation="gelu_tanh",
    qk_norm=True,
    norm_offset=1.0,
    post_norms=True,
)


class _ProbeWeights:
    """A one-block checkpoint whose weights are a formula, the same on every machine and in every torch."""

    head_kind = "float"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def block(self, index: int, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        config = self.config
        wide = config.num_heads * config.head_dim
        narrow = config.num_kv_heads * config.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (wide, config.hidden_size),
            "self_attn.k_proj": (narrow, config.hidden_size),
            "self_attn.v_proj": (narrow, config.hidden_size),
            "self_attn.o_proj": (config.hidden_size, wide),
            "mlp.gate_proj": (config.intermediate_size, config.hidden_size),
            "mlp.up_proj": (config.intermediate_size, config.hidden_size),
            "mlp.down_proj": (config.hidden_size, config.intermediate_size),
            "input_layernorm": (config.hidden_size,),
            "post_attention_layernorm": (config.hidden_size,),
        }
        if config.post_norms:
            shapes["pre_feedforward_layernorm"] = shapes["post_feedforward_layernorm"] = (config.hidden_size,)
        if config.qk_norm:
            shapes["self_attn.q_norm"] = shapes["self_attn.k_norm"] = (config.head_dim,)
        return {
            f"{name}.weight": (fixed_values(shape, seed) * 0.15).to(dtype)
            for seed, (name, shape) in enumerate(sorted(shapes.items()))
        }

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        return fixed_values((self.config.vocab_size, self.config.hidden_size), 90).to(dtype)

    def embedding_norm(self, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        return self.final_norm(dtype)

    def final_norm(self, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        return {"norm.weight": fixed_values((self.config.hidden_size,), 91).to(dtype)}

    def head(self, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        return {**self.final_norm(dtype), "lm_head.weight": self.embedding(dtype)}

    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise ConfigError("the probe's head is not stored in 8 bits")


def fixed_values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """fp32 values spread over [-1, 1), by integer arithmetic only."""
    count = 1
    for size in shape:
        count *= size
    mixed = (torch.arange(count, dtype=torch.int64) + 1 + seed * 1_000_003) * 2_654_435_761 % 4_294_967_291
    mixed = (mixed ^ (mixed >> 15)) * 2_246_822_519 % 4_294_967_291
    return ((mixed % 65_536).float() / 32_768 - 1).view(shape)


@lru_cache(maxsize=16)
def probe_digest(quant: str, dtype: torch.dtype, device: str = "cpu") -> bytes:
    """sha256 of what small blocks give for 1, 5 and 64 rows at two positions each, and whether rows are exact."""
    digest = hashlib.sha256()
    exact = True
    for config in (_LLAMA, _GEMMA):
        span = load_span(_ProbeWeights(config), 0, 1, dtype=dtype, quant=quant, device=device)
        rows = fixed_values((2 * max(_PROBE_ROWS), config.hidden_size), 99)
        whole = _probe_pass(span, rows, ())
        for count in _PROBE_ROWS:
            for position in (0, max(_PROBE_ROWS) + 1 - count):
                part = _probe_pass(span, rows[: position + count], (position,))[position:]
                digest.update(part.float().cpu().numpy().tobytes())
                exact = exact and torch.equal(part, whole[position : position + count])
    if not exact:
        _log.warning("this machine's kernels are not row-exact for %s in %s: replays may change tokens", quant, dtype)
    digest.update(bytes((exact,)))
    return digest.digest()


def _probe_pass(span: Span, rows: torch.Tensor, borders: tuple[int, ...]) -> torch.Tensor:
    """The rows of one sequence, cut into passes at `borders`."""
    pool = KVPool(_UNBOUNDED, span.config, 0, 1, span.dtype, span.device)
    lane = pool.open_lane()
    edges = [0, *(border for border in borders if border), rows.shape[0]]
    return torch.cat(
        [span.run(rows[first:last], [Piece(lane, first, last - first)]) for first, last in pairwise(edges)]
    )


def compute_class(quant: str, dtype: torch.dtype, device: str = "cpu") -> bytes:
    """8 bytes that are equal on two machines only if the same rows give the same bits there."""
    parts: dict[str, str | int] = {
        "quant": quant,
        "dtype": str(dtype),
        "device": torch.device(device).type,
        "revision": KERNEL_REVISION,
        "torch": torch.__version__,
        "probe": probe_digest("none" if quant == "hf" else quant, dtype, device).hex(),
    }
    if quant == "hf":  # transformers' own layers (fallback.py): never exact, whatever the probe says of this machine
        parts["transformers"] = version("transformers")
    if quant in ("nf4", "llm-int8"):
        from .quant.nf4 import load_bitsandbytes

        parts["bitsandbytes"] = str(load_bitsandbytes().__version__)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()[:CLASS_BYTES]


def block_times(span: Span, pool: KVPool) -> tuple[float, float]:
    """(decode_s, prefill_s): seconds per block for one token, and for a prefill of 128; the best of a few passes.

    Takes a lane of `pool` for the time being. Raises ConfigError when its budget holds no tile.
    """
    rows = min(PREFILL_ROWS, pool.free_tokens // TILE * TILE)
    if rows < 1:
        raise ConfigError(
            f"a KV budget of {pool.budget_bytes} bytes holds no {TILE} tokens of {span.end - span.start} blocks: "
            f"raise it"
        )
    hidden = fixed_values((rows, span.config.hidden_size), 7).to(span.dtype)
    lane = pool.open_lane(span.start, min(span.end, span.start + _TIMED_BLOCKS))
    try:
        blocks = lane.end - lane.start
        prefill_s = best_seconds(lambda: _pass(span, lane, hidden)) * PREFILL_ROWS / rows / blocks
        return best_seconds(lambda: _pass(span, lane, hidden[:1])) / blocks, prefill_s
    finally:
        lane.free()


def _pass(span: Span, lane: LaneCache, hidden: torch.Tensor) -> None:
    span.run(hidden, [Piece(lane, 0, hidden.shape[0])], lane.start, lane.end)
    if span.device.type == "cuda":
        torch.cuda.synchronize(span.device)


def best_seconds(action: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs; the first only warms up."""
    action()
    best, began = float("inf"), time.perf_counter()
    for _ in range(_REPEATS):
        start = time.perf_counter()
        action()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - began > _TIMING_BUDGET_S:
            break
    return best


def read_bandwidth(size_bytes: int = 256 << 20) -> float:
    """Bytes per second this machine reads from memory with the threads torch has now: the limit of decoding."""
    buffer = torch.ones(size_bytes // 4)
    return size_bytes / best_seconds(buffer.sum)


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations per second of a big matrix product: the limit of prefill."""
    matrix = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / best_seconds(lambda: torch.mm(matrix, matrix))
