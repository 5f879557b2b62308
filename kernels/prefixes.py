"""Tiles of sequences computed before, kept for sessions that begin in the same way: a common prompt is run once.

A tile is 64 rows at absolute positions. Its name is a hash over its input rows, as bytes, and the name of the tile
before it; the first one's predecessor is a seed that says what else decides about the results (blocks, codec, cuts). So
equal names mean equal bits, for token ids at a first hop as well as for hidden states at any other, and nobody has to
be trusted: a server believes only what it has computed itself. What is kept of a tile is its pages (kvcache.py) and the
rows that left the last block, which the next hop or the head wants to see.

Only tiles that came whole in one job are kept, and only behind a predecessor that is kept. Tiles are given up from the
one that was not used for longest; because using a tile counts as using all before it, a tile never goes before those
that follow it.

Where the room comes from: pages that a lane holds are in that lane's books; what only this cache holds is `cached`
bytes, and `used + cached <= budget` always. Nothing promised is ever refused for its sake: when a lane takes pages,
tiles go until they fit.

Touched by one thread only, like the pages.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from .attention import TILE
from .pages import Page

if TYPE_CHECKING:
    from .kvcache import KVPool, LaneCache

SHARE: Final = 0.5
"""Of the budget, the most that may be kept for sessions to come."""
MAX_TILES: Final = 1 << 16
"""Tiles kept: 4 million positions."""
DIGEST_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Tile:
    """What is kept of 64 rows."""

    pages: tuple[Page, ...]
    """One for each block of the lane that computed it."""
    rows: torch.Tensor
    """[64, hidden] after the last block."""


@dataclass(frozen=True, slots=True)
class Start:
    """How far a job's rows are known already."""

    names: tuple[bytes, ...] = ()
    """Of all whole tiles of the job; empty where its lane is not followed."""
    tiles: tuple[Tile, ...] = ()
    """The first ones of them, which are kept."""

    @property
    def count(self) -> int:
        """Rows that need no computing."""
        return TILE * len(self.tiles)

    @property
    def rows(self) -> list[torch.Tensor]:
        """What comes of them."""
        return [tile.rows for tile in self.tiles]


class PrefixCache:
    """The tiles of one pool."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._tiles: OrderedDict[bytes, Tile] = OrderedDict()  # the one to give up next comes first
        self.reused_rows = 0
        """Rows that needed no computing so far."""

    def __len__(self) -> int:
        return len(self._tiles)

    def begin(self, lane: LaneCache, seed: bytes, count: int, payload: bytes) -> Start:
        """Look up `count` rows that follow those in the lane, and give it the pages of what is found.

        Then the lane is that much longer and has room for all of the rows. A lane is followed from its first row on,
        for as long as whole tiles come in one piece, and only if it was promised room.
        """
        position = lane.length
        start = Start()
        if seed and lane.max_length is not None and position == TILE * len(lane.known):
            names = tuple(_names(lane.known[-1] if lane.known else seed, count, payload))
            found = []
            for name in names:
                if name not in self._tiles:
                    break
                found.append(self._tiles[name])
            start = Start(names, tuple(found))
        lane.reserve(position + count, [tile.pages for tile in start.tiles])
        lane.known += start.names[: len(start.tiles)]
        self.reused_rows += start.count
        self._use(lane.known if start.tiles else ())
        return start

    def end(self, lane: LaneCache, start: Start, rows: torch.Tensor) -> None:
        """Keep the tiles of a job after its pass; `rows` are those that were computed, after the last block."""
        fresh = start.names[len(start.tiles) :]
        for number, name in enumerate(fresh):
            behind = not lane.known or lane.known[-1] in self._tiles
            if behind and name not in self._tiles:
                self._keep(lane, name, rows[TILE * number : TILE * (number + 1)])
            lane.known.append(name)
        if fresh:
            self._use(lane.known)
            self.fit()

    def _keep(self, lane: LaneCache, name: bytes, rows: torch.Tensor) -> None:
        pages = tuple(block.page(TILE * len(lane.known)) for block in lane.blocks)
        for page in pages:
            page.cached = True
        self._tiles[name] = Tile(pages, rows.clone())
        self._pool.keep(_size(rows))

    def _use(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):
            if name in self._tiles:
                self._tiles.move_to_end(name)

    def fit(self) -> None:
        """Give up tiles until the rest has room."""
        most = int(self._pool.budget_bytes * SHARE)
        while self._tiles and (
            self._pool.used_bytes + self._pool.cached_bytes > self._pool.budget_bytes
            or self._pool.cached_bytes > most
            or len(self._tiles) > MAX_TILES
        ):
            self._give_up(self._tiles.popitem(last=False)[1])

    def clear(self) -> None:
        """Give up everything."""
        while self._tiles:
            self._give_up(self._tiles.popitem(last=False)[1])

    def _give_up(self, tile: Tile) -> None:
        freed = _size(tile.rows)
        for page in tile.pages:
            page.cached = False
            if not page.holders:
                freed += self._pool.page_bytes
        self._pool.keep(-freed)


def seed_of(*parts: object) -> bytes:
    """A seed for tiles that may be exchanged where all `parts` are equal."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=DIGEST_BYTES, person=b"swarmnode prefix").digest()


def _names(before: bytes, count: int, payload: bytes) -> Iterator[bytes]:
    """The names of the whole tiles among `count` rows, each of len(payload) / count bytes."""
    view, size = memoryview(payload), len(payload) // count * TILE
    for number in range(count // TILE):
        before = hashlib.blake2b(
            view[size * number : size * (number + 1)], digest_size=DIGEST_BYTES, key=before
        ).digest()
        yield before


def _size(rows: torch.Tensor) -> int:
    return rows.numel() * rows.element_size()
