"""What this machine computes, bit for bit: small blocks of a model's own form, run on fixed inputs.

Processors with other vector units round differently under the same software, and in other places for a layer norm than
for an expert. So the probe is made from the model's config: one block of every kind the model has, shrunk, with
weights from a formula, and a head. It also checks that rows are exact here: alone, in a prompt, beside a neighbour.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Final

import torch

from ..protocol.errors import ConfigError
from .engine import load_head, load_span
from .kvcache import KVPool
from .loading.shapes import block_shapes, norm_shapes, table_shape
from .models.config import ModelConfig, RopeConfig
from .span import Piece, Span

ROWS: Final = (1, 5, 64)
"""Rows of the passes that are hashed, each at two positions."""
WIDTH: Final = 256
INNER: Final = 512
VOCABULARY: Final = 320
WINDOW: Final = 40
"""The passes begin inside and end outside of it."""
OUTLIER: Final = 64.0
"""Every OUTLIER_ROWS-th row has a value so much larger than the others."""
OUTLIER_COLUMN: Final = 217
"""Where: norms have their largest weight there."""
OUTLIER_ROWS: Final = 7
MOST_GROUP: Final = 8
MOST_KV_HEADS: Final = 2
MOST_EXPERTS: Final = 4
_UNBOUNDED: Final = 1 << 62

_log = logging.getLogger(__name__)

PLAIN: Final = ModelConfig(
    family="llama",
    num_blocks=1,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    vocab_size=VOCABULARY,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    norm_eps=1e-6,
    max_positions=256,
    rope=RopeConfig(theta=10_000.0),
    query_scale=0.125,
)
"""Stands in where no model is at hand."""


class ProbeWeights:
    """A one-block checkpoint whose weights are a formula, the same on every machine and in every torch."""

    head_kind = "float"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def block(self, index: int, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        shapes = sorted(block_shapes(self.config, index).items())
        return {
            name: (fixed_values(shape, seed) * (0.15 if len(shape) > 1 else 1.0)).to(dtype)
            for seed, (name, shape) in enumerate(shapes)
        }

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        return fixed_values(table_shape(self.config), 90).to(dtype)

    def embedding_norm(self, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        return self.final_norm(dtype)

    def final_norm(self, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        shapes = norm_shapes(self.config).items()
        return {name: fixed_values(shape, 91 + seed).to(dtype) for seed, (name, shape) in enumerate(shapes)}

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


def probe_configs(config: ModelConfig) -> list[ModelConfig]:
    """One block of every kind the model has: with a window or without, experts or none, rotated or not."""
    kinds = {
        (
            config.window(index) is not None,
            config.experts_of(index) is not None,
            index in config.unrotated_blocks,
        )
        for index in range(config.num_blocks)
    }
    return [_shrunk(config, *kind) for kind in sorted(kinds)]


def _shrunk(config: ModelConfig, sliding: bool, experts: bool, unrotated: bool) -> ModelConfig:
    """Everything that is a form or a number in a formula stays; only sizes become small."""
    kv_heads = min(config.num_kv_heads, MOST_KV_HEADS)
    small = replace(
        config,
        num_blocks=1,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        vocab_size=VOCABULARY,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * min(config.num_heads // config.num_kv_heads, MOST_GROUP),
        sliding_window=WINDOW if sliding else None,
        sliding_blocks=(True,) if sliding else (),
        unrotated_blocks=(0,) if unrotated else (),
        experts=None,
        bos_token_id=None,
        eos_token_ids=(),
    )
    if config.experts is None or not experts:
        return small
    form = replace(
        config.experts,
        count=min(config.experts.count, MOST_EXPERTS),
        active=min(config.experts.active, MOST_EXPERTS - 1),
        intermediate_size=WIDTH,
        shared_size=WIDTH if config.experts.shared_size else 0,
        dense_blocks=(),
    )
    return replace(small, experts=replace(form, active=min(form.active, form.count)))


@lru_cache(maxsize=16)
def probe_digest(quant: str, dtype: torch.dtype, device: str = "cpu", config: ModelConfig = PLAIN) -> bytes:
    """sha256 of what the model's kinds of blocks give for 1, 5 and 64 rows at two positions each, of a head's scores,
    and of whether rows are exact."""
    digest = hashlib.sha256()
    exact = True
    for small in probe_configs(config):
        span = load_span(ProbeWeights(small), 0, 1, dtype=dtype, quant=quant, device=device)
        head = load_head(ProbeWeights(small), dtype=dtype, device=device)
        rows = fixed_values((2 * max(ROWS), WIDTH), 99)
        rows[::OUTLIER_ROWS, OUTLIER_COLUMN] *= (
            OUTLIER  # real models have such values, and not every kernel keeps them to their row
        )
        whole = _pass(span, rows, ())
        for count in ROWS:
            for position in (0, max(ROWS) + 1 - count):
                part = _pass(span, rows[: position + count], (position,))[position:]
                digest.update(part.float().cpu().numpy().tobytes())
                exact = exact and torch.equal(part, whole[position : position + count])
        exact = exact and torch.equal(_together(span, rows), whole[1 : 1 + max(ROWS) : max(ROWS) - 1])
        digest.update(head.logits(whole[: min(ROWS)]).cpu().numpy().tobytes())
    if not exact:
        _log.warning("this machine's kernels are not row-exact for %s in %s: replays may change tokens", quant, dtype)
    digest.update(bytes((exact,)))
    return digest.digest()


def _pass(span: Span, rows: torch.Tensor, borders: tuple[int, ...]) -> torch.Tensor:
    """The rows of one sequence, cut into passes at `borders`."""
    lane = KVPool(_UNBOUNDED, span.config, 0, 1, span.dtype, span.device).open_lane()
    edges = [0, *(border for border in borders if border), rows.shape[0]]
    return torch.cat(
        [span.run(rows[first:last], [Piece(lane, first, last - first)]) for first, last in pairwise(edges)]
    )


def _together(span: Span, rows: torch.Tensor) -> torch.Tensor:
    """Rows 1 and 64 of the sequence as single steps of two lanes in one pass."""
    pool = KVPool(_UNBOUNDED, span.config, 0, 1, span.dtype, span.device)
    pieces = []
    for position in (1, max(ROWS)):
        lane = pool.open_lane()
        span.run(rows[:position], [Piece(lane, 0, position)])
        pieces.append(Piece(lane, position, 1))
    return span.run(rows[[piece.position for piece in pieces]], pieces)
