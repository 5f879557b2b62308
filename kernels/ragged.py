"""Attention of one pass: rows of many sessions, each over its own pages, in few calls.

A prefill piece goes by itself, block of queries by block of queries (attention.attend). Single rows, the decode steps
of many sessions, go together: for the first tile of all of them one product, for the second one of those that have a
second, and so on. Per row that is the recipe of attention.py step by step: the same products over the same tiles, the
same maximum, the same sums in the same order. A tile that a neighbour has and a row has not adds an exact 0 to the
row's sum of weights and is left out of its values. So rows keep their bits, whoever they travel with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from .attention import LOWEST, MASKED, TILE, QueryBlock, attend, attend_fused, first_key, plan_queries, tile_ceil
from .kvcache import BlockCache
from .linear import ROWS
from .models.config import ModelConfig
from .pages import groups, pack, scale_
from .scores import ScoreForm
from .step import Step

GATHER_VALUES: Final = 1 << 18
"""Keys of one tile that are gathered at once, in values (1 MiB): they should stay in the processor's cache."""
MOST_PADDING: Final = 2
"""Sessions share a bucket when the longest has at most this many times the tiles of the shortest."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One session's share of a pass."""

    first: int
    """Its rows are [first, last) of the pass."""
    last: int
    position: int
    """Absolute position of its first row."""


class Attention:
    """How the rows of one pass attend in every block of one window: planned once, used block after block."""

    def __init__(
        self,
        config: ModelConfig,
        window: int | None,
        pieces: Sequence[Rows],
        mixed: torch.Tensor,
        dtype: torch.dtype,
        *,
        batched: bool,
    ) -> None:
        self.rows = pieces[-1].last
        """Rows of the pass, without padding."""
        self._pieces = pieces
        self._mixed = mixed  # [padded rows, heads * d], padding stays zero
        self._kv_heads = config.num_kv_heads
        self._width = config.head_dim
        self._dtype = dtype
        together = [index for index, piece in enumerate(pieces) if piece.last - piece.first == 1] if batched else []
        self._buckets = [
            Bucket(config, window, [(index, pieces[index]) for index in members], mixed.device)
            for members in _buckets(config, window, pieces, together)
        ]
        grouped = {index for bucket in self._buckets for index in bucket.pieces}
        group = config.num_heads // config.num_kv_heads
        self._alone = [
            (
                index,
                plan_queries(piece.position, piece.last - piece.first, group=group, window=window, device=mixed.device),
            )
            for index, piece in enumerate(pieces)
            if index not in grouped
        ]
        # Lone decode steps on the CPU have their own quick way (step.py).
        quick = mixed.device.type == "cpu"
        self._steps = [
            (index, Step(pieces[index].first, blocks[0], config.num_kv_heads, group, mixed[pieces[index].first]))
            for index, blocks in self._alone
            if quick and pieces[index].last - pieces[index].first == 1
        ]
        stepping = {index for index, _ in self._steps}
        self._alone = [(index, blocks) for index, blocks in self._alone if index not in stepping]
        self._buffer = self._gather_buffer()
        self._stored: torch.Tensor | None = None
        self._singles: tuple[torch.Tensor, ...] = ()

    def _gather_buffer(self) -> torch.Tensor:
        keys = [block.key_end - block.key_start for _, blocks in self._alone for block in blocks]
        size = 2 * self._kv_heads * self._width * max(keys, default=0)
        floats = torch.float32 if self._mixed.device.type == "cpu" else self._dtype
        return torch.empty(size, dtype=floats, device=self._mixed.device)

    def run(
        self,
        queries: torch.Tensor,
        fresh: torch.Tensor,
        caches: Sequence[BlockCache],
        form: ScoreForm | None,
        *,
        fused: bool,
    ) -> torch.Tensor:
        """Store the pass's keys and values in one block's caches and attend over them.

        queries fp32 [padded rows, heads, d], already scaled; fresh fp32 [2, kv_heads, padded rows, d], one cache per
        piece. Returns fp32 [padded rows, heads * d], valid until the next call.
        """
        stored = pack(fresh) if caches[0].in_8_bits else fresh
        if stored is not self._stored:  # blocks of a pass hand in the same buffer
            self._stored, self._singles = stored, stored.unbind(2)  # [2, kv_heads, slot width] each
        singles = self._singles
        for piece, cache in zip(self._pieces, caches, strict=True):
            if piece.last - piece.first == 1:
                cache.page(piece.position).slots.select(2, piece.position % TILE).copy_(singles[piece.first])
            else:
                cache.store(piece.position, stored.narrow(2, piece.first, piece.last - piece.first))
        for bucket in self._buckets:
            bucket.run(queries, [caches[index] for index in bucket.pieces], form, self._mixed)
        for index, step in self._steps:
            step.run(queries, caches[index], form)
        for index, blocks in self._alone:
            for block in blocks:
                self._attend(queries, self._pieces[index], caches[index], block, form, fused)
        return self._mixed

    def _attend(
        self,
        queries: torch.Tensor,
        piece: Rows,
        cache: BlockCache,
        block: QueryBlock,
        form: ScoreForm | None,
        fused: bool,
    ) -> None:
        length = block.key_end - block.key_start
        size = 2 * self._kv_heads * length * self._width
        cached = self._buffer[:size].view(2, self._kv_heads, length, self._width)
        cache.read(block.key_start, block.key_end, cached)
        keys, values = cached.unbind(0)  # [kv_heads, keys, d] each
        first, count = piece.first + block.first, block.last - block.first
        asked, out = queries.narrow(0, first, count), self._mixed.narrow(0, first, count)
        if fused:
            attend_fused(asked, keys, values, block, out)
        else:
            attend(asked, keys, values, block, out, form)


def _tiles(piece: Rows, window: int | None) -> int:
    """Tiles that a single row sees."""
    return (tile_ceil(piece.position + 1) - first_key(piece.position, window)) // TILE


def _buckets(config: ModelConfig, window: int | None, pieces: Sequence[Rows], together: list[int]) -> list[list[int]]:
    """Single rows of similar length, longest first, at most as many as fit the gathering of a tile; two at least."""
    most = max(1, GATHER_VALUES // (config.num_kv_heads * TILE * config.head_dim))
    buckets: list[list[int]] = []
    tiles = {index: _tiles(pieces[index], window) for index in together}
    for index in sorted(together, key=lambda index: -tiles[index]):
        last = buckets[-1] if buckets else None
        if last is None or len(last) >= most or tiles[last[0]] > MOST_PADDING * tiles[index]:
            buckets.append([index])
        else:
            last.append(index)
    return [bucket for bucket in buckets if len(bucket) > 1]


class Bucket:
    """Single rows that attend together, by falling number of tiles."""

    def __init__(
        self, config: ModelConfig, window: int | None, members: Sequence[tuple[int, Rows]], device: torch.device
    ) -> None:
        self.pieces = [index for index, _ in members]
        """Which pieces of the pass these are."""
        self._kv_heads, self._width = config.num_kv_heads, config.head_dim
        self._group = config.num_heads // config.num_kv_heads
        self._padded = self._group + -self._group % ROWS
        self._rows = torch.tensor([piece.first for _, piece in members], device=device)
        self._starts = [first_key(piece.position, window) for _, piece in members]
        counts = [_tiles(piece, window) for _, piece in members]
        self._have = [sum(count > tile for count in counts) for tile in range(counts[0])]  # sessions with such a tile
        count = len(members)
        self._buffer = torch.empty(count, self._kv_heads, TILE, self._width, device=device)
        self._gathered = self._buffer.unbind(0)
        scales = count, self._kv_heads, TILE, groups(self._width)
        self._scales = torch.empty(scales, dtype=torch.bfloat16, device=device)  # of pages in 8 bits
        self._queries = torch.zeros(count, self._kv_heads, self._padded, self._width, device=device)
        # Zeros, since what no session writes must stay finite.
        self._scores = torch.zeros(counts[0], count * self._kv_heads, self._padded, TILE, device=device)
        self._values = torch.empty(count * self._kv_heads, self._padded, self._width, device=device)
        self._bias, self._keep = self._masks([piece.position for _, piece in members], window, device)

    def _masks(
        self, positions: Sequence[int], window: int | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 [tiles, sessions, 1, TILE]: what is added to scores, and what weights are multiplied by."""
        keys = torch.arange(len(self._have) * TILE, device=device).view(-1, 1, TILE)
        keys = keys + torch.tensor(self._starts, device=device)[:, None]  # [tiles, sessions, TILE]
        rows = torch.tensor(positions, device=device)[:, None]
        hidden = keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        hidden = hidden[:, :, None]
        bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, MASKED)
        return bias, (~hidden).float()

    def run(
        self, queries: torch.Tensor, caches: Sequence[BlockCache], form: ScoreForm | None, mixed: torch.Tensor
    ) -> None:
        """Attend in one block; `mixed` [rows, heads * d] gets the result."""
        sessions, group, width = len(caches), self._group, self._width
        asked = queries.index_select(0, self._rows).view(sessions, self._kv_heads, group, width)
        if group != self._padded:
            self._queries[:, :, :group].copy_(asked)
            asked = self._queries
        asked = asked.view(-1, self._padded, width)
        scores, values = self._scores, self._values
        for tile, have in enumerate(self._have):
            some = have * self._kv_heads
            keys = self._gather(tile, have, caches, values=False)
            found = scores[tile].narrow(0, 0, some)
            torch.bmm(asked.narrow(0, 0, some), keys.mT, out=found)
            if form is not None:
                form.shape_(found, 1, 0)
        totals = self._soften(form)
        for tile, have in enumerate(self._have):
            some = have * self._kv_heads
            weights, kept = scores[tile].narrow(0, 0, some), self._gather(tile, have, caches, values=True)
            if tile:
                values.narrow(0, 0, some).baddbmm_(weights, kept)
            else:
                torch.bmm(weights, kept, out=values)
        values.div_(totals)
        result = values.view(sessions, self._kv_heads, self._padded, width)[:, :, :group]
        mixed.index_copy_(0, self._rows, result.reshape(sessions, -1))

    def _gather(self, tile: int, have: int, caches: Sequence[BlockCache], *, values: bool) -> torch.Tensor:
        """fp32 [sessions that have this tile * kv_heads, TILE, d]: their keys or values of it."""
        pages = [cache.page(start + tile * TILE) for start, cache in zip(self._starts[:have], caches, strict=False)]
        for target, page in zip(self._gathered, pages, strict=False):
            target.copy_(page.values if values else page.keys)
        gathered = self._buffer.narrow(0, 0, have)
        if caches[0].in_8_bits:
            for target, page in zip(self._scales.unbind(0), pages, strict=False):
                scales = page.value_scales if values else page.key_scales
                if scales is not None:
                    target.copy_(scales)
            scale_(gathered, self._scales.narrow(0, 0, have))
        return gathered.view(-1, TILE, self._width)

    def _soften(self, form: ScoreForm | None) -> torch.Tensor:
        """Turn scores into unnormalized weights; returns their sums [sessions * kv_heads, query rows, 1]."""
        scores = self._scores
        tiles, sessions = self._bias.shape[:2]
        by_session = scores.view(tiles, sessions, -1, TILE)  # [tiles, sessions, kv_heads * query rows, TILE]
        by_session.add_(self._bias)
        highest = scores.amax((0, 3), keepdim=True)  # [1, sessions * kv_heads, query rows, 1]
        sinks = form.sinks(self._padded).repeat(sessions, 1, 1) if form is not None and form.has_sinks else None
        if sinks is not None:
            highest = torch.maximum(highest, sinks)
        scores.sub_(highest).clamp_min_(LOWEST).exp_()
        by_session.mul_(self._keep)
        totals = scores.sum(-1)  # [tiles, sessions * kv_heads, query rows]
        if tiles > 1:
            totals = totals.cumsum(0)
        totals = totals[-1].unsqueeze(-1)
        return totals if sinks is None else totals + torch.sub(sinks, highest[0]).exp_()
