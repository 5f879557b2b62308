"""Attention of one session's new rows over its cached keys, with bits that do not depend on how rows are grouped.

Recipe (found by measurement, see docs/engine.md): scores and weighted values in fp32; keys in tiles of 64 at absolute
positions; the row maximum over all keys (a maximum has no order); sums tile by tile, first to last. A tile that a row
cannot see adds exact zeros, so it makes no difference whether it is computed, left out or already dropped from a
sliding window. Query rows are padded to a multiple of 4, as everywhere. One product over the whole key range would be
simpler and a little faster, but the library then cuts the sum where it likes: 1-2 % of rows changed bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from .linear import ROWS
from .scores import ScoreForm

TILE: Final = 64
"""Keys per tile; cache capacity and window borders are multiples of it."""
QUERY_BLOCK: Final = 64
"""Query positions handled at once in a prefill: bounds the scores in memory and skips keys that lie ahead."""
MASKED: Final = -1e30
"""Added to the score of a key that may not be seen. Finite, so that no row can become NaN by it."""
LOWEST: Final = -80.0
"""Scores are lifted to this far below the row's highest before exp: a weight of 2e-35 is nothing beside one of 1, and
exp takes ten times as long for results that underflow. Keys that may not be seen get an exact 0 afterwards."""


@dataclass(slots=True)
class QueryBlock:
    """Some consecutive query positions of a piece and the keys they need."""

    first: int
    """Rows [first, last) of the piece."""
    last: int
    """End of the rows."""
    key_start: int
    """First key position, a multiple of TILE."""
    key_end: int
    """End of the keys, a multiple of TILE."""
    masked_from: int
    """Keys from key_start + this on are hidden from some rows; all rows see those before."""
    bias: torch.Tensor
    """fp32 [padded query rows, keys from there on]: MASKED where a key may not be seen, else 0. Query rows are
    (position, head of group)."""
    keep: torch.Tensor
    """The same with 0 where a key may not be seen, else 1."""
    visible: torch.Tensor | None = None
    """bool [rows, keys] for fused attention, made when first asked for."""


def plan_queries(
    position: int, count: int, *, group: int, window: int | None, device: torch.device
) -> list[QueryBlock]:
    """Cut `count` queries from `position` on into blocks; `group` query heads share a KV head."""
    blocks = []
    for first in range(0, count, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, count)
        key_end = tile_ceil(position + last)
        key_start = first_key(position + first, window)
        masked = key_start if window is not None else (position + first) // TILE * TILE
        rows = torch.arange(position + first, position + last, device=device).repeat_interleave(group)
        padding = -rows.shape[0] % ROWS
        rows = torch.cat((rows, rows[-1:].expand(padding))) if padding else rows
        hidden = _hidden(rows, torch.arange(masked, key_end, device=device), window)
        bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, MASKED)
        blocks.append(QueryBlock(first, last, key_start, key_end, masked - key_start, bias, (~hidden).float()))
    return blocks


def _hidden(rows: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool [rows, keys]: which keys a query position may not see."""
    hidden = keys[None, :] > rows[:, None]
    if window is not None:
        hidden |= keys[None, :] <= rows[:, None] - window
    return hidden


def first_key(position: int, window: int | None) -> int:
    """Start of the first tile that a query at `position` can see."""
    return 0 if window is None else max(0, position - window + 1) // TILE * TILE


def tile_ceil(length: int) -> int:
    """`length` rounded up to whole tiles."""
    return -(-length // TILE) * TILE


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block: QueryBlock,
    out: torch.Tensor,
    form: ScoreForm | None = None,
) -> None:
    """Exact attention of one block.

    queries fp32 [rows, heads, d], already scaled; keys and values fp32 [kv_heads, block keys, d];
    out fp32 [rows, heads * d] is written. `form` is what the family does to scores before the softmax.
    """
    rows, heads, width = queries.shape
    kv_heads, length, _ = keys.shape
    group = heads // kv_heads
    weights = torch.bmm(_grouped(queries, kv_heads, group), keys.mT)  # [kv_heads, query rows, keys]
    if form is not None:
        form.shape_(weights, rows, block.key_start)
    masked = weights[..., block.masked_from :]
    masked.add_(block.bias)
    highest = weights.amax(-1, keepdim=True)  # [kv_heads, query rows, 1]
    sinks = form.sinks(weights.shape[1]) if form is not None and form.has_sinks else None
    if sinks is not None:
        highest = torch.maximum(highest, sinks)
    weights.sub_(highest).clamp_min_(LOWEST).exp_()
    masked.mul_(block.keep)
    totals = weights.view(kv_heads, -1, length // TILE, TILE).sum(-1)  # [kv_heads, query rows, tiles]
    if length == TILE:
        mixed = torch.bmm(weights, values)  # [kv_heads, query rows, d]
    else:
        totals = totals.cumsum(-1)[..., -1:]
        mixed = torch.bmm(weights[..., :TILE], values[:, :TILE])
        for start in range(TILE, length, TILE):
            mixed.baddbmm_(weights[..., start : start + TILE], values[:, start : start + TILE])
    if sinks is not None:
        totals = totals + torch.sub(sinks, highest).exp_()
    mixed.div_(totals)
    if rows == 1:
        out.view(kv_heads, group, width).copy_(mixed[:, :group])
    else:
        result = mixed[:, : rows * group].view(kv_heads, rows, group, width).transpose(0, 1)
        out.view(rows, kv_heads, group, width).copy_(result)


def _grouped(queries: torch.Tensor, kv_heads: int, group: int) -> torch.Tensor:
    """[rows, heads, d] -> [kv_heads, rows * group padded to ROWS, d]."""
    rows, _, width = queries.shape
    if rows == 1:
        grouped = queries.view(kv_heads, group, width)
    else:
        grouped = queries.view(rows, kv_heads, group, width).transpose(0, 1).reshape(kv_heads, rows * group, width)
    if not rows * group % ROWS:
        return grouped
    padded = torch.zeros(kv_heads, rows * group + -rows * group % ROWS, width, device=queries.device)
    padded[:, : rows * group].copy_(grouped)
    return padded


def attend_fused(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: QueryBlock, out: torch.Tensor
) -> None:
    """The same by torch's fused attention, for devices where launches cost more than exactness can be had for."""
    rows, heads, width = queries.shape
    group = heads // keys.shape[0]
    if block.visible is None:
        block.visible = torch.ones(rows, keys.shape[1], dtype=torch.bool, device=keys.device)
        block.visible[:, block.masked_from :] = block.keep[: rows * group : group] > 0
    result = functional.scaled_dot_product_attention(
        queries.transpose(0, 1).to(keys.dtype)[None],
        keys[None],
        values[None],
        block.visible,
        scale=1.0,
        enable_gqa=True,
    )
    out.view(rows, heads, width).copy_(result[0].transpose(0, 1))
