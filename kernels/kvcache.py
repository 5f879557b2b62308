"""Keys and values of sessions in pages of 64 positions, taken on demand under one byte budget.

A lane is one sequence. Each of its blocks has a list of pages [keys or values, kv_heads, 64, head_dim]. Memory is taken
when tokens come, page by page, so nothing is ever moved, and is given back the moment a lane is freed or cut. Lanes may
share pages (a fork does); whoever writes into a shared one first takes a copy. Blocks with a sliding window forget what
lies more than the window and a rollback margin behind; a deeper truncation asks for a replay.

Admission: a lane opened with a `max_length` is promised room for that many positions. The promise is kept in the books,
not in memory: `used + promised and not yet taken <= budget` holds always, so a promised lane never meets a full cache.
A lane opened without takes its chances with what is neither used nor promised.

Who pays: a page counts against the lane that allocated it. When that lane drops it while others hold it, another holder
pays from then on.

Lanes whose sessions begin in the same way share pages too, and pages may outlive their lanes for sessions to come
(prefixes.py). What only that cache holds is counted apart: `used + cached <= budget` holds as well.

Unused slots hold zeros: attention multiplies them by exact zeros, and 0 * NaN would not be 0.

Books may be read and lanes opened on any thread; pages are touched by one thread only (a server's compute thread).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import torch

from ..protocol.errors import LocalProtocolError, ServerBusy, SwarmError
from .attention import TILE, tile_ceil
from .models.config import ModelConfig
from .pages import Page, pack, read, slot_width
from .prefixes import PrefixCache

ROLLBACK: Final = 64
"""Positions behind the window that sliding blocks keep, so that short truncations need no replay."""
MAX_LANES: Final = 4_096
"""Open lanes of one pool; an empty one costs no budget but some memory."""
PASS_ROWS: Final = 1_024
"""Rows a pass may add to a promised lane: what a sliding block needs depends on it."""


class NeedReplay(SwarmError):
    """The cache no longer has what a truncation needs; feed the lane again from `position`."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


class KVPool:
    """All lanes of a span, and the budget they share."""

    def __init__(
        self,
        budget_bytes: int,
        config: ModelConfig,
        start: int,
        end: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.budget_bytes = budget_bytes
        self.config = config
        self.start = start
        self.end = end
        self.dtype = dtype
        """What keys and values are stored in; torch.int8: in 8 bits with scales (pages.py)."""
        self.device = torch.device(device)
        self._used = 0
        self._promised = 0
        self._cached = 0
        self._lanes = 0
        self._lock = threading.Lock()
        self.prefixes = PrefixCache(self)

    @property
    def used_bytes(self) -> int:
        """Bytes of memory that lanes hold now."""
        return self._used

    @property
    def promised_bytes(self) -> int:
        """Bytes that lanes may still take by what they were promised."""
        return self._promised

    @property
    def cached_bytes(self) -> int:
        """Bytes kept for sessions to come, beside what lanes hold. They go as soon as a lane takes their room."""
        return self._cached

    @property
    def lanes(self) -> int:
        """Open lanes."""
        return self._lanes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one position in one block."""
        return 2 * self.config.num_kv_heads * slot_width(self.config.head_dim, self.dtype) * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.slot_bytes * TILE

    @property
    def free_bytes(self) -> int:
        """What is neither held by lanes nor promised to them."""
        return max(0, self.budget_bytes - self._used - self._promised)

    @property
    def free_tokens(self) -> int:
        """How many more tokens fit, over all lanes, if every block keeps every position."""
        return self.free_bytes // (self.slot_bytes * (self.end - self.start))

    def need(self, max_length: int, start: int, end: int) -> int:
        """The most bytes that a lane of so many positions over blocks [start, end) can ever hold."""
        return sum(self._most_pages(max_length, self.config.window(index)) for index in range(start, end)) * (
            self.page_bytes
        )

    def _most_pages(self, max_length: int, window: int | None) -> int:
        pages = tile_ceil(max_length) // TILE
        if window is None:
            return pages
        # What is kept begins at most a tile before window and margin, and new rows end at most a tile later.
        return min(pages, tile_ceil(window + ROLLBACK + PASS_ROWS) // TILE + 1)

    def open_lane(
        self, start: int | None = None, end: int | None = None, *, max_length: int | None = None
    ) -> LaneCache:
        """A new empty sequence over blocks [start, end), by default all.

        With `max_length` room for that many positions is promised. Raises ServerBusy when there is none, or too many
        lanes are open.
        """
        start, end = self.start if start is None else start, self.end if end is None else end
        if not self.start <= start < end <= self.end:
            raise LocalProtocolError(f"lane over blocks {start}:{end} in a pool of {self.start}:{self.end}")
        if max_length is not None and max_length < 1:
            raise LocalProtocolError(f"a lane of {max_length} positions")
        promise = 0 if max_length is None else self.need(max_length, start, end)
        with self._lock:
            if self._lanes >= MAX_LANES:
                raise ServerBusy(f"{MAX_LANES} sequences are open here: try another server or later")
            wanted = promise or self.page_bytes * (end - start)
            if wanted > self.free_bytes:
                raise ServerBusy(self._full(wanted))
            self._lanes += 1
            self._promised += promise
        return LaneCache(self, start, end, max_length, promise)

    def _full(self, wanted: int) -> str:
        return (
            f"the KV cache is full: {self._used} of {self.budget_bytes} bytes are used, "
            f"{self._promised} promised, and {wanted} more are needed; try another server or later"
        )

    def take(self, wanted: int, promised: int, cached: int = 0) -> None:
        """A lane takes `wanted` bytes, `promised` of them promised to it, `cached` of them in memory already.

        Raises ServerBusy, changing nothing.
        """
        with self._lock:
            if wanted - promised > self.free_bytes:
                raise ServerBusy(self._full(wanted))
            self._promised -= promised
            self._used += wanted
            self._cached -= cached
        self.prefixes.fit()

    def give(self, freed: int, promised: int, cached: int = 0) -> None:
        """A lane gives `freed` bytes back, `promised` of them to its promise; `cached` stay in memory all the same."""
        with self._lock:
            self._used -= freed
            self._promised += promised
            self._cached += cached
        if cached:
            self.prefixes.fit()

    def keep(self, size: int) -> None:
        """So many bytes more are kept for sessions to come."""
        with self._lock:
            self._cached += size

    def close_lane(self, promised: int) -> None:
        """A lane is gone that could still have taken so much of its promise."""
        with self._lock:
            self._promised -= promised
            self._lanes -= 1


class BlockCache:
    """One block's pages of one lane."""

    __slots__ = ("base", "in_8_bits", "pages", "window")

    def __init__(self, window: int | None, *, in_8_bits: bool = False) -> None:
        self.base = 0
        """Position of the first page's first slot."""
        self.window = window
        """Sliding window, None where everything is kept."""
        self.pages: list[Page] = []
        self.in_8_bits = in_8_bits
        """Whether rows are packed (pages.py) before they are stored."""

    @property
    def capacity(self) -> int:
        """Slots there is room for."""
        return len(self.pages) * TILE

    def page(self, position: int) -> Page:
        """The page of a position."""
        return self.pages[(position - self.base) // TILE]

    def stale(self, length: int) -> int:
        """Pages that are not worth keeping when `length` positions are cached."""
        if self.window is None:
            return 0
        return max(0, (length - self.window - ROLLBACK) // TILE - self.base // TILE)

    def write(self, position: int, fresh: torch.Tensor) -> None:
        """Store keys and values [2, kv_heads, rows, head_dim] from `position` on, where room was reserved."""
        self.store(position, pack(fresh) if self.in_8_bits else fresh)

    def store(self, position: int, fresh: torch.Tensor) -> None:
        """The same for rows that are packed where that is needed."""
        first, count = 0, fresh.shape[2]
        while first < count:
            slot = (position + first) % TILE
            rows = min(TILE - slot, count - first)
            self.page(position + first).slots.narrow(2, slot, rows).copy_(fresh.narrow(2, first, rows))
            first += rows

    def read(self, start: int, end: int, out: torch.Tensor) -> None:
        """Copy whole pages [start, end) into `out` [2, kv_heads, end - start, head_dim], converting to its dtype."""
        first = (start - self.base) // TILE
        read(self.pages[first : first + (end - start) // TILE], out)


class LaneCache:
    """One sequence's keys and values in blocks [start, end)."""

    def __init__(self, pool: KVPool, start: int, end: int, max_length: int | None, promise: int) -> None:
        self.start = start
        self.end = end
        self.max_length = max_length
        """Positions promised, if any were."""
        self.length = 0
        """Positions cached in every block."""
        in_8_bits = pool.dtype is torch.int8
        self.blocks = [BlockCache(pool.config.window(index), in_8_bits=in_8_bits) for index in range(start, end)]
        self._pool = pool
        self.known: list[bytes] = []
        """Names of its first tiles (prefixes.py)."""
        self._promise = promise  # bytes it may still take
        self._ready = 0  # up to here rows can be written
        self._torn = False  # behind its last position a page may hold what another lane put there
        self._open = True

    @property
    def held_bytes(self) -> int:
        """Memory of all its pages, shared ones too."""
        return sum(len(block.pages) for block in self.blocks) * self._pool.page_bytes

    def reserve(self, length: int, tiles: Sequence[Sequence[Page]] = ()) -> None:
        """Make room for `length` positions in all. Raises ServerBusy, leaving the lane as it was.

        `tiles` are pages, one for each block, that hold the first of the new positions already.
        """
        if not self._open:
            raise LocalProtocolError("this lane was freed")
        if length <= self._ready and not tiles:
            return
        if self.max_length is not None and (length > self.max_length or length - self.length > PASS_ROWS):
            raise LocalProtocolError(
                f"{length - self.length} rows after {self.length} do not fit a lane of {self.max_length} positions and "
                f"{PASS_ROWS} rows a pass"
            )
        self._drop_stale()
        with torch.inference_mode():
            if tiles:
                self._adopt(tiles)
            self._grow(length)
        self._ready = tile_ceil(length)

    def _adopt(self, tiles: Sequence[Sequence[Page]]) -> None:
        """Hold pages of the cache, for what was promised to this lane where no other pays for them."""
        ended = self.length // TILE * TILE
        for block in self.blocks:
            self._release(block.pages[(ended - block.base) // TILE :])
            del block.pages[(ended - block.base) // TILE :]
        unpaid = 0
        for tile in tiles:
            for block, page in zip(self.blocks, tile, strict=True):
                unpaid += not page.holders
                page.holders.append(self)
                block.pages.append(page)
        self._take(unpaid, cached=unpaid)
        self.length += TILE * len(tiles)

    def _drop_stale(self) -> None:
        for block in self.blocks:
            if stale := block.stale(self.length):
                self._release(block.pages[:stale])
                del block.pages[:stale]
                block.base += stale * TILE

    def _grow(self, length: int) -> None:
        missing = [(tile_ceil(length) - block.base) // TILE - len(block.pages) for block in self.blocks]
        torn = self.length % TILE
        if torn and self._torn:
            for block in self.blocks:
                block.page(self.length).clear_from(torn)
        self._torn = False
        shared = [block for block in self.blocks if torn and block.page(self.length).shared]
        old = [block.page(self.length) for block in shared]
        if self.max_length is not None:  # what it no longer pays for the shared pages pays for the copies
            self._release(old)
        self._take(sum(missing) + len(old))
        if self.max_length is None:
            self._release(old)
        for block, page in zip(shared, old, strict=True):
            copy = self._page()
            copy.slots[:, :, :torn] = page.slots[:, :, :torn]
            block.pages[(self.length - block.base) // TILE] = copy
        for block, count in zip(self.blocks, missing, strict=True):
            block.pages.extend(self._page() for _ in range(count))

    def _page(self) -> Page:
        config, pool = self._pool.config, self._pool
        width = slot_width(config.head_dim, pool.dtype)
        slots = torch.zeros(2, config.num_kv_heads, TILE, width, dtype=pool.dtype, device=pool.device)
        return Page(slots, config.head_dim, self)

    def _take(self, pages: int, cached: int = 0) -> None:
        wanted = pages * self._pool.page_bytes
        promised = min(wanted, self._promise)
        self._pool.take(wanted, promised, cached * self._pool.page_bytes)
        self._promise -= promised

    def _release(self, pages: list[Page]) -> None:
        """Stop holding pages; each goes on with another holder, or not at all."""
        size = self._pool.page_bytes
        for page in pages:
            paid = page.holders[0] is self
            page.holders.remove(self)
            if not paid:
                continue
            back = size if self.max_length is not None else 0
            self._promise += back
            if page.holders:
                back -= page.holders[0].pay()
            freed = 0 if page.holders else size
            self._pool.give(freed, back, freed if page.cached else 0)

    def pay(self) -> int:
        """Take over a page that its payer has dropped; returns the bytes of promise this uses up."""
        used = min(self._promise, self._pool.page_bytes)
        self._promise -= used
        return used

    def truncate(self, position: int) -> None:
        """Forget everything from `position` on; what follows is computed as if it had never been there.

        Raises NeedReplay when a sliding window has already dropped keys that position needs.
        """
        if position == self.length:
            return
        if not 0 <= position < self.length:
            raise LocalProtocolError(f"cannot truncate {self.length} cached positions to {position}")
        if position == 0:
            self.reset()
            return
        for block in self.blocks:
            if block.window is not None and block.base > max(0, position - block.window + 1):
                raise NeedReplay(
                    0, f"position {position} needs keys before {block.base}, which the window has dropped: replay"
                )
        with torch.inference_mode():
            for block in self.blocks:
                self._cut(block, position)
        self.length = self._ready = position
        del self.known[position // TILE :]

    def _cut(self, block: BlockCache, position: int) -> None:
        kept = (tile_ceil(position) - block.base) // TILE
        self._release(block.pages[kept:])
        del block.pages[kept:]
        if position % TILE and not block.pages[-1].clear_from(position % TILE):
            self._torn = True  # who shares it may let go of it before this lane writes into it

    def reset(self) -> None:
        """Empty the lane and give its memory back; it stays open. A replay starts with it."""
        for block in self.blocks:
            self._release(block.pages)
            block.pages, block.base = [], 0
        self.length = self._ready = 0
        self.known, self._torn = [], False

    def fork(self) -> LaneCache:
        """A lane of its own with the same contents, sharing all pages until one of the two writes.

        It is promised as much as this one. Raises ServerBusy when there is no room for that.
        """
        other = self._pool.open_lane(self.start, self.end, max_length=self.max_length)
        other.copy(self)
        return other

    def copy(self, origin: LaneCache) -> None:
        """Become what `origin` is, an equal lane of this pool, sharing all its pages until one of the two writes."""
        if (origin.start, origin.end, origin.max_length) != (self.start, self.end, self.max_length):
            raise LocalProtocolError("a lane can only copy one over the same blocks and of the same length")
        if origin is self:
            return
        self.reset()
        for mine, theirs in zip(self.blocks, origin.blocks, strict=True):
            mine.base, mine.pages = theirs.base, theirs.pages[: (tile_ceil(origin.length) - theirs.base) // TILE]
            for page in mine.pages:
                page.holders.append(self)
        origin._ready = min(origin._ready, origin.length)
        self.length = self._ready = origin.length
        self.known, self._torn = list(origin.known), origin._torn

    def free(self) -> None:
        """Give everything back. Safe to call twice."""
        if self._open:
            self.reset()
            self._open = False
            self._pool.close_lane(self._promise)
            self._promise = 0
