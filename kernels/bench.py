"""This machine's limits, and how near to them blocks of a model come: what `swarmnode bench` shows.

Decoding is limited by reading every weight once, prefill by multiplying with it. Blocks share their shape, so a few
stand for all; they rotate, so that no cache holds their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from .engine import Source, load_head, load_span, span_bytes
from .kvcache import KVPool
from .linear import multiplies_bf16
from .measure import best_seconds, block_times, matmul_rate, read_bandwidth
from .probe import fixed_values
from .quant.int8 import quantize
from .quant.products import integer_product
from .weight import Weight

BLOCKS: Final = 4
"""Blocks that are loaded: with fewer, a small model's weights stay in the processor's cache."""
MOST_BYTES: Final = 2 << 30
"""Fewer blocks are loaded where they would take more than this."""
_KV_BYTES: Final = 1 << 30
_PREFILL_ROWS: Final = 128
_SIZE: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the hardware gives to the threads torch has."""

    threads: int
    bytes_per_s: float
    """Reading memory."""
    fp32_per_s: float
    """Multiplications and additions of a big product."""
    bf16_per_s: float
    int8_per_s: float | None
    """None where torch has no integer product."""
    bf16_native: bool
    """False: bf16 is emulated, so weights are held in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFigures:
    """One block of a model under one quantization."""

    quant: str
    bytes: int
    """Weights of one block in memory."""
    decode_s: float
    """One token."""
    prefill_s: float
    """128 tokens."""
    decode_share: float
    """Time to read the weights once / decode_s."""
    prefill_share: float
    """Time of the bf16 (or fp32, if faster) products alone / prefill_s."""


def machine_limits() -> Limits:
    """Measure; takes about a second."""
    return Limits(
        threads=torch.get_num_threads(),
        bytes_per_s=read_bandwidth(),
        fp32_per_s=matmul_rate(torch.float32),
        bf16_per_s=matmul_rate(torch.bfloat16),
        int8_per_s=_integer_rate(),
        bf16_native=multiplies_bf16(),
    )


def _integer_rate() -> float | None:
    weight = quantize(Weight.of(fixed_values((_SIZE, _SIZE), 1)))
    product = integer_product(weight.values, weight.scales)
    if product is None:
        return None
    rows = torch.ones(_SIZE, _SIZE)
    with torch.inference_mode():
        return 2 * _SIZE**3 / best_seconds(lambda: product(rows))


def block_figures(checkpoint: Source, quants: Sequence[str], limits: Limits) -> Iterator[BlockFigures]:
    """One by one, as they are measured. Raises ConfigError, CorruptCheckpoint, UnsupportedModel."""
    config, dtype = checkpoint.config, torch.bfloat16
    for quant in quants:
        fitting = MOST_BYTES // max(1, span_bytes(config, 1, dtype, quant))
        count = max(1, min(BLOCKS, config.num_blocks, fitting))
        span = load_span(checkpoint, 0, count, dtype=dtype, quant=quant)
        decode_s, prefill_s = block_times(span, KVPool(_KV_BYTES, config, 0, count, dtype))
        size = span.size_bytes // count
        operations = 2 * _PREFILL_ROWS * config.block_parameters()
        yield BlockFigures(
            quant=quant,
            bytes=size,
            decode_s=decode_s,
            prefill_s=prefill_s,
            decode_share=size / limits.bytes_per_s / decode_s,
            prefill_share=operations / max(limits.bf16_per_s, limits.fp32_per_s) / prefill_s,
        )


def head_seconds(checkpoint: Source) -> tuple[float, int]:
    """(time for one token's scores, bytes of the matrix)."""
    head = load_head(checkpoint, dtype=torch.bfloat16)
    row = fixed_values((1, checkpoint.config.hidden_size), 3)
    return best_seconds(lambda: head.logits(row)), head.size_bytes
