"""Keys and values of sessions, grown on demand in tiles of 64 under one byte budget.

A lane is one sequence. Each of its blocks has one slab [keys or values, kv_heads, capacity, head_dim], so attention
reads them without gathering and a pass writes them in one copy. Memory is taken when tokens come, not when a session
opens, and is given back the moment a lane is freed. Blocks with a sliding window forget what lies more than the window
and a rollback margin behind; a deeper truncation asks for a replay.

Unused slots hold zeros: attention multiplies them by exact zeros, and 0 * NaN would not be 0.

Not safe for concurrent use of one lane; `KVPool`'s accounting may be used from several threads (a server opens lanes
on its loop and fills them on its compute thread).
"""

from __future__ import annotations

import threading
from typing import Final

import torch

from ..protocol.errors import LocalProtocolError, ServerBusy, SwarmError
from .attention import TILE, tile_ceil
from .models.config import ModelConfig

ROLLBACK: Final = 64
"""Positions behind the window that sliding blocks keep, so that short truncations need no replay."""
WINDOW_SLACK: Final = 128
"""Room of a sliding slab beyond window and margin: it is moved once per this many tokens, not per tile."""
MAX_LANES: Final = 4_096
"""Open lanes of one pool; an empty one costs no budget but some memory."""


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
        self.device = torch.device(device)
        self._used = 0
        self._lanes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes that lanes hold now."""
        return self._used

    @property
    def lanes(self) -> int:
        """Open lanes."""
        return self._lanes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one position in one block."""
        return 2 * self.config.num_kv_heads * self.config.head_dim * self.dtype.itemsize

    @property
    def free_tokens(self) -> int:
        """How many more tokens fit, over all lanes, if every block keeps every position."""
        return max(0, self.budget_bytes - self._used) // (self.slot_bytes * (self.end - self.start))

    def open_lane(self, start: int | None = None, end: int | None = None) -> LaneCache:
        """A new empty sequence over blocks [start, end), by default all. Raises ServerBusy when too many are open."""
        start, end = self.start if start is None else start, self.end if end is None else end
        if not self.start <= start < end <= self.end:
            raise LocalProtocolError(f"lane over blocks {start}:{end} in a pool of {self.start}:{self.end}")
        with self._lock:
            if self._lanes >= MAX_LANES:
                raise ServerBusy(f"{MAX_LANES} sequences are open here: try another server or later")
            if self._used + self.slot_bytes * TILE * (end - start) > self.budget_bytes:
                raise ServerBusy(self._full(self.slot_bytes * TILE * (end - start)))
            self._lanes += 1
        return LaneCache(self, start, end)

    def _full(self, wanted: int) -> str:
        return (
            f"the KV cache is full: {self._used} of {self.budget_bytes} bytes are used and {wanted} more are needed; "
            f"try another server or later"
        )

    def take(self, wanted: int) -> None:
        """Count `wanted` bytes (negative: give back) against the budget. Raises ServerBusy, changing nothing."""
        with self._lock:
            if wanted > 0 and self._used + wanted > self.budget_bytes:
                raise ServerBusy(self._full(wanted))
            self._used += wanted

    def close_lane(self, held: int) -> None:
        """A lane that held so many bytes is gone."""
        with self._lock:
            self._used -= held
            self._lanes -= 1


class BlockCache:
    """One block's keys and values of one lane."""

    __slots__ = ("base", "slab", "window")

    def __init__(self, empty: torch.Tensor, window: int | None) -> None:
        self.base = 0
        """Position of slot 0, a multiple of TILE."""
        self.window = window
        """Sliding window, None where everything is kept."""
        self.slab = empty  # [2, kv_heads, capacity, head_dim]

    @property
    def capacity(self) -> int:
        """Slots there is room for."""
        return self.slab.shape[2]

    def keep_from(self, length: int) -> int:
        """First position worth keeping when `length` positions are cached."""
        return 0 if self.window is None else max(0, length - self.window - ROLLBACK) // TILE * TILE

    def plan(self, length: int, new_length: int, generous: bool) -> tuple[int, int]:
        """(base, capacity) with which the slab holds `new_length` positions, given `length` filled ones."""
        if tile_ceil(new_length) - self.base <= self.capacity:
            return self.base, self.capacity
        base = self.keep_from(length)
        needed = tile_ceil(new_length) - base
        if self.window is None:
            return base, max(needed, tile_ceil(self.capacity * 3 // 2)) if generous else needed
        roomy = max(needed, tile_ceil(self.window + ROLLBACK + TILE + WINDOW_SLACK))
        if needed <= self.capacity <= roomy:
            return base, self.capacity
        # Larger than that it can only be after a long prefill chunk: no use any more, so it shrinks.
        return base, max(needed, min(roomy, tile_ceil(self.capacity * 3 // 2))) if generous else needed

    def move(self, base: int, capacity: int, length: int) -> None:
        """Re-base and resize the slab, keeping the filled positions from `base` on."""
        if base == self.base and capacity == self.capacity:
            return
        kept = max(0, length - base)
        kept_from = base - self.base
        fresh = self.slab.new_zeros(*self.slab.shape[:2], capacity, self.slab.shape[3])
        fresh[:, :, :kept] = self.slab[:, :, kept_from : kept_from + kept]
        self.slab, self.base = fresh, base

    def clear(self, start: int, end: int) -> None:
        """Zero the positions [start, end)."""
        self.slab[:, :, max(0, start - self.base) : max(0, end - self.base)].zero_()


class LaneCache:
    """One sequence's keys and values in blocks [start, end)."""

    def __init__(self, pool: KVPool, start: int, end: int) -> None:
        config = pool.config
        empty = torch.zeros(2, config.num_kv_heads, 0, config.head_dim, dtype=pool.dtype, device=pool.device)
        self.start = start
        self.end = end
        self.length = 0
        """Positions cached in every block."""
        self.blocks = [BlockCache(empty, config.window(index)) for index in range(start, end)]
        self._pool = pool
        self._held = 0
        self._open = True

    @property
    def held_bytes(self) -> int:
        """What this lane takes of the budget."""
        return self._held

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in all. Raises ServerBusy, leaving the lane as it was."""
        if not self._open:
            raise LocalProtocolError("this lane was freed")
        if all(tile_ceil(length) - block.base <= block.capacity for block in self.blocks):
            return
        try:
            self._resize(length, generous=True)
        except ServerBusy:
            self._resize(length, generous=False)

    def _resize(self, length: int, *, generous: bool) -> None:
        plans = [block.plan(self.length, length, generous) for block in self.blocks]
        slots = sum(capacity for _, capacity in plans)
        change = slots * self._pool.slot_bytes - self._held
        self._pool.take(change)
        self._held += change
        with torch.inference_mode():
            for block, (base, capacity) in zip(self.blocks, plans, strict=True):
                block.move(base, capacity, self.length)

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
                block.clear(position, self.length)
        self.length = position

    def reset(self) -> None:
        """Empty the lane and give its memory back; it stays open. A replay starts with it."""
        for block in self.blocks:
            block.slab, block.base = block.slab[:, :, :0].clone(), 0
        self._pool.take(-self._held)
        self._held = self.length = 0

    def fork(self) -> LaneCache:
        """A lane of its own with the same contents. Raises ServerBusy when the budget has no room for the copy."""
        other = self._pool.open_lane(self.start, self.end)
        try:
            self._pool.take(self._held)
        except ServerBusy:
            other.free()
            raise
        other._held = self._held
        other.length = self.length
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            theirs.base, theirs.slab = mine.base, mine.slab.clone()
        return other

    def free(self) -> None:
        """Give everything back. Safe to call twice."""
        if self._open:
            self._open = False
            self.blocks = []
            self._pool.close_lane(self._held)
            self._held = self.length = 0
