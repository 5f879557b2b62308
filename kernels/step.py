"""Attention of a single row, the decode step of one session, without making anything in a block that a pass can share.

The operations are those of attention.attend with one row, in the same order over the same tiles, so the bits are the
same; but buffers, masks and all views into them are made once per pass. At small widths that is a third of a block.
"""

from __future__ import annotations

from typing import Final

import torch

from .attention import LOWEST, TILE, QueryBlock
from .kvcache import BlockCache
from .linear import ROWS
from .scores import ScoreForm

_LOWEST: Final = torch.tensor(LOWEST)


class Step:
    """One row of a pass on the CPU, and where its keys are."""

    def __init__(self, row: int, block: QueryBlock, kv_heads: int, group: int, mixed: torch.Tensor) -> None:
        """Row `row` of the pass; `mixed` [heads * d]: where the result goes."""
        length, width = block.key_end - block.key_start, mixed.shape[0] // (kv_heads * group)
        padded = group + -group % ROWS
        self._row = row
        self._block = block
        self._source: torch.Tensor | None = None
        self._cached = torch.empty(2, kv_heads, length, width)
        keys, values = self._cached.unbind(0)
        self._keys = keys.mT
        self._queries = torch.zeros(kv_heads, padded, width) if padded > group else None
        self._asked = None if self._queries is None else self._queries[:, :group]
        self._shape = (kv_heads, group, width)
        self._scores = torch.empty(kv_heads, padded, length)
        self._masked = self._scores[..., block.masked_from :]
        self._by_tile = self._scores.view(kv_heads, padded, length // TILE, TILE)
        self._first, *self._more = (
            (self._scores[..., start : start + TILE], values[:, start : start + TILE])
            for start in range(0, length, TILE)
        )
        self._out = mixed.view(kv_heads, group, width)
        self._mixed = self._out if self._queries is None else torch.empty(kv_heads, padded, width)
        self._result = self._mixed[:, :group]

    def run(self, queries: torch.Tensor, cache: BlockCache, form: ScoreForm | None) -> None:
        """Attend in one block; queries fp32 [rows, heads, d], already scaled."""
        block, scores, mixed = self._block, self._scores, self._mixed
        cache.read(block.key_start, block.key_end, self._cached)
        if queries is not self._source:  # blocks of a pass hand in the same buffer
            self._source, self._own = queries, queries[self._row].view(self._shape)
        asked = self._own
        if self._asked is not None and self._queries is not None:
            self._asked.copy_(asked)
            asked = self._queries
        torch.bmm(asked, self._keys, out=scores)
        if form is not None:
            form.shape_(scores, 1, block.key_start)
        self._masked.add_(block.bias)
        highest = scores.amax(-1, keepdim=True)  # [kv_heads, query rows, 1]
        sinks = form.sinks(scores.shape[1]) if form is not None and form.has_sinks else None
        if sinks is not None:
            highest = torch.maximum(highest, sinks)
        scores.sub_(highest)
        torch.maximum(scores, _LOWEST, out=scores).exp_()
        self._masked.mul_(block.keep)
        totals = self._by_tile.sum(-1)  # [kv_heads, query rows, tiles]
        torch.bmm(*self._first, out=mixed)
        if self._more:
            totals = totals.cumsum(-1).narrow(-1, len(self._more), 1)
            for weights, values in self._more:
                mixed.baddbmm_(weights, values)
        if sinks is not None:
            totals = totals + torch.sub(sinks, highest).exp_()
        mixed.div_(totals)
        if self._mixed is not self._out:
            self._out.copy_(self._result)
