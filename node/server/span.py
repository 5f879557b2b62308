"""A span of a model held by this node: weights, KV room, compute thread, and what is announced about it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...protocol.errors import ConfigError
from ..models import Model

if TYPE_CHECKING:
    from .weights import Parts

KV_SHARE: Final = 0.25
"""Share of the free memory a span's KV cache may take by default."""
WEIGHT_SHARE: Final = 0.8
"""Share of what is left that weights may take: the machine's owner wants to go on working."""
KV_MOST: Final = 4 << 30
KV_LEAST: Final = 64 << 20
QUANTS: Final = ("none", "int8", "nf4", "llm-int8")
DTYPES: Final = ("bf16", "fp32")
KV_FORMS: Final = ("full", "int8")
SHARING: Final = ("all", "user", "none")

LoadProgress = Callable[[int, int], None]
"""(blocks done, blocks in all), called on a loading thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanSettings:
    """How to hold a span. Invalid values raise ConfigError."""

    quant: str | None = None
    """none, int8, nf4 or llm-int8; None: what suits the model and this machine's memory."""
    dtype: str = "bf16"
    """Compute dtype."""
    device: str = "cpu"
    kv_bytes: int | None = None
    kv: str = "full"
    """Keys and values as computed, or as int8: half the memory, another compute class."""
    share_prefixes: str = "all"
    """Whose sessions share what they begin with: those of all users, of one user, or none."""

    def __post_init__(self) -> None:
        if self.quant is not None and self.quant not in QUANTS:
            raise ConfigError(f"quant {self.quant!r} is not one of {', '.join(QUANTS)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.kv not in KV_FORMS:
            raise ConfigError(f"kv {self.kv!r} is not one of {', '.join(KV_FORMS)}")
        if self.share_prefixes not in SHARING:
            raise ConfigError(f"share_prefixes {self.share_prefixes!r} is not one of {', '.join(SHARING)}")


def check_span(model: Model, span: tuple[int, int]) -> tuple[int, int]:
    """The span if it lies inside the model. Raises ConfigError saying what would."""
    start, end = span
    blocks = model.config.num_blocks
    if not 0 <= start < end <= blocks:
        what = "is empty" if start == end else f"is not inside {model.name}"
        raise ConfigError(
            f"span {start}:{end} {what}: {model.name} has {blocks} blocks: use --serve 0:{blocks} or auto"
        )
    return start, end


class ServedSpan:
    """Blocks [start, end) of a model, ready to run. Make one with `load`; `close` ends its thread."""

    def __init__(self, model: Model, start: int, end: int, parts: Parts, share_prefixes: str = "all") -> None:
        from .compute import Worker  # torch is loaded here, not before

        self.model = model
        self.start, self.end = start, end
        self.hidden_size = model.config.hidden_size
        self.quant = parts.quant
        self.compute_class = parts.compute_class
        self.embeds = parts.embedding is not None
        self.has_head = parts.head is not None
        self.draining = False
        self.worker = Worker(parts.span, parts.pool, parts.embedding, parts.head, parts.timings, share_prefixes)

    @classmethod
    async def load(
        cls, model: Model, span: tuple[int, int], settings: SpanSettings, progress: LoadProgress | None
    ) -> ServedSpan:
        """Read, quantize and time the weights on a thread. Raises ConfigError, CorruptCheckpoint, UnsupportedModel."""
        start, end = check_span(model, span)
        if model.checkpoint is None:
            raise ConfigError(f"the weights of {model.name} are not on this machine: name a folder or file of it")
        parts = await asyncio.to_thread(_load_parts, model, start, end, settings, progress)
        return cls(model, start, end, parts, settings.share_prefixes)

    def covers(self, digest: bytes, start: int, end: int) -> bool:
        """Whether it can run these blocks of this model."""
        return digest == self.model.digest and self.start <= start < end <= self.end

    @property
    def kv_free(self) -> int:
        """Tokens there is KV room for."""
        return self.worker.pool.free_tokens

    def close(self) -> None:
        """Stop computing and free the memory. Blocks for one pass at most."""
        self.worker.stop()


def _load_parts(model: Model, start: int, end: int, settings: SpanSettings, progress: LoadProgress | None) -> Parts:
    from .weights import load_parts  # torch is loaded here, not before

    kv_bytes = settings.kv_bytes or default_kv_bytes()
    return load_parts(model, start, end, settings, kv_bytes, progress)


def blocks_that_fit(model: Model) -> int:
    """How many bf16 blocks the free memory holds beside their KV cache; at least one, at most all of them."""
    free = free_memory_bytes()
    blocks = model.config.num_blocks
    if free is None:
        return blocks
    return max(1, min(blocks, int(free * (1 - KV_SHARE) * WEIGHT_SHARE / (2 * model.config.block_parameters()))))


def default_kv_bytes() -> int:
    """A share of the memory that is free now."""
    free = free_memory_bytes()
    return KV_LEAST if free is None else max(KV_LEAST, min(KV_MOST, int(free * KV_SHARE)))


def free_memory_bytes() -> int | None:
    """Memory that can still be taken without swapping; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    fields: Mapping[str, str] = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
