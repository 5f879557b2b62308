"""What this machine computes, bit for bit, and how fast: compute class, block timings, limits.

Two servers may replace each other in a session without changing a token only if they compute the same bits. The class
names everything that decides about them: how weights are held, the compute dtype, the revision of our kernels, the
versions of the libraries below, and a probe of the machine (probe.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Final

import torch

from ..protocol.errors import ConfigError
from .attention import TILE
from .kvcache import KVPool, LaneCache
from .models.config import ModelConfig
from .probe import PLAIN, fixed_values, probe_digest
from .span import Piece, Span

KERNEL_REVISION: Final = 2
"""Raise it with every change that may alter a bit of any row."""
CLASS_BYTES: Final = 8
"""Length of a compute class."""
PREFILL_ROWS: Final = 128
"""Rows of the prefill that block timings refer to."""
_REPEATS: Final = 5
_TIMING_BUDGET_S: Final = 0.5
"""Repeats stop after this long: a span of a big model takes seconds for one pass."""
_TIMED_BLOCKS: Final = 4
"""Blocks that block timings run; the others have the same shape."""


def compute_class(
    quant: str, dtype: torch.dtype, device: str = "cpu", config: ModelConfig = PLAIN, kv: str = "full"
) -> bytes:
    """8 bytes that are equal on two machines only if rows of a model of this form give the same bits there."""
    probed = ("none", PLAIN) if quant == "hf" else (quant, config)
    parts: dict[str, str | int] = {
        "quant": quant,
        "dtype": str(dtype),
        "device": torch.device(device).type,
        "revision": KERNEL_REVISION,
        "torch": torch.__version__,
        "probe": probe_digest(probed[0], dtype, device, probed[1]).hex(),
    }
    if kv != "full":  # pages.py rounds alike on every machine, so no probe of its own
        parts["kv"] = kv
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
