"""Everything a compute thread needs for a span, read from a checkpoint: blocks, ends, KV pool, first timings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.engine import DTYPES, default_quant, load_embedding, load_head, load_span
from ...kernels.head import Embedding, Head
from ...kernels.kvcache import KVPool
from ...kernels.measure import block_times, compute_class
from ...kernels.span import Span
from ...protocol.errors import ConfigError
from ..models import Model
from .outcome import Timings
from .span import LoadProgress, SpanSettings, free_memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A span, ready to run."""

    span: Span
    pool: KVPool
    embedding: Embedding | None
    """Only at the model's first block."""
    head: Head | None
    """Only at the model's last block."""
    timings: Timings
    compute_class: bytes
    quant: str


def load_parts(
    model: Model, start: int, end: int, settings: SpanSettings, kv_bytes: int, progress: LoadProgress | None
) -> Parts:
    """Read, quantize and time. Raises ConfigError, CorruptCheckpoint, UnsupportedModel; takes seconds to minutes."""
    checkpoint = model.checkpoint
    assert checkpoint is not None
    dtype, device = DTYPES[settings.dtype], _device(settings.device)
    quant = settings.quant or default_quant(model.config, end - start, free_memory_bytes() or 0)
    span = load_span(checkpoint, start, end, dtype=dtype, quant=quant, device=device, progress=progress)
    last = end == model.config.num_blocks
    stored = torch.int8 if settings.kv == "int8" else dtype
    pool = KVPool(kv_bytes, model.config, start, end, stored, device)
    decode_s, prefill_s = block_times(span, pool)
    return Parts(
        span=span,
        pool=pool,
        embedding=load_embedding(checkpoint, dtype=dtype, device=device) if start == 0 else None,
        head=load_head(checkpoint, dtype=dtype, device=device) if last else None,
        timings=Timings(decode_s=decode_s, prefill_s=prefill_s),
        compute_class=compute_class(span.quant, dtype, device, model.config, settings.kv),
        quant=span.quant,
    )


def _device(name: str) -> str:
    """Check a device name before gigabytes are read for it."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as exc:
        raise ConfigError(f"device {name!r} cannot be used here: {str(exc).splitlines()[0]}; try --device cpu") from exc
    return name
