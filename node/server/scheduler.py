"""What the compute thread does next: a pure state machine, items in, batches out.

Decode steps go first and together: one pass over the weights serves all of them, and each has a person waiting.
Prefill chunks run alone, but never starve: after MAX_DECODE_TURNS batches of decode steps one chunk has its turn.
Items of one lane keep their order. Only items of one group (same blocks) can share a batch.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

DECODE_ROWS: Final = 8
"""An item of up to this many rows is a decode step: weights, not arithmetic, are what it costs."""
BATCH_ROWS: Final = 64
"""Rows of decode steps one pass takes."""
MAX_DECODE_TURNS: Final = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item(Generic[T]):
    """Rows to run for one lane."""

    lane: Hashable
    """Whose rows: items of one lane run in order, never two in one batch."""
    group: Hashable
    """Blocks they go through."""
    rows: int
    work: T


class Scheduler(Generic[T]):
    """Queues per lane, batches on demand. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[Hashable, deque[Item[T]]] = OrderedDict()  # in order of waiting
        self._decode_turns = 0
        self.rows = 0
        """Rows waiting."""

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, item: Item[T]) -> None:
        """Queue an item behind its lane's others."""
        self._lanes.setdefault(item.lane, deque()).append(item)
        self.rows += item.rows

    def remove(self, lane: Hashable) -> list[Item[T]]:
        """Take a lane's items out: its session has ended."""
        items = list(self._lanes.pop(lane, ()))
        self.rows -= sum(item.rows for item in items)
        return items

    def next_batch(self) -> list[Item[T]]:
        """Take the items to run now; empty when nothing waits."""
        heads = [queue[0] for queue in self._lanes.values()]
        decode = [head for head in heads if head.rows <= DECODE_ROWS]
        prefill = [head for head in heads if head.rows > DECODE_ROWS]
        if decode and (not prefill or self._decode_turns < MAX_DECODE_TURNS):
            self._decode_turns += 1
            return self._take(self._together(decode))
        self._decode_turns = 0
        return self._take(prefill[:1])

    def _together(self, decode: list[Item[T]]) -> list[Item[T]]:
        """Steps that can share the longest waiting one's pass."""
        batch: list[Item[T]] = []
        room = BATCH_ROWS
        for item in decode:
            if item.group == decode[0].group and item.rows <= room:
                batch.append(item)
                room -= item.rows
        return batch

    def _take(self, batch: list[Item[T]]) -> list[Item[T]]:
        for item in batch:
            queue = self._lanes[item.lane]
            queue.popleft()
            self.rows -= item.rows
            if queue:
                self._lanes.move_to_end(item.lane)
            else:
                del self._lanes[item.lane]
        return batch
