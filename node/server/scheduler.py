"""What the compute thread does next: a pure state machine, items in, batches out.

Decode steps go first and together: one pass over the weights serves all of them, and each has a person waiting.
Prefill chunks never starve: after MAX_DECODE_TURNS batches of decode steps one chunk has its turn, and the decode steps
that wait ride along in its pass. Items of one lane keep their order. Only items of one group (same blocks) can share a
batch.

Fair between users: everyone has a count of the rows run for them, and whoever has the lowest is served first, however
many sessions the others open. Who comes (back) starts at the lowest count of those who wait: idleness saves up nothing.
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
    user: Hashable = None
    """Who asked for it: users are served evenly."""


class Scheduler(Generic[T]):
    """Queues per lane, batches on demand. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[Hashable, deque[Item[T]]] = OrderedDict()  # in order of waiting
        self._decode_turns = 0
        self._waiting: dict[Hashable, int] = {}  # items per user
        self._served: dict[Hashable, int] = {}  # rows run, of users who wait
        self.rows = 0
        """Rows waiting."""

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, item: Item[T]) -> None:
        """Queue an item behind its lane's others."""
        self._lanes.setdefault(item.lane, deque()).append(item)
        self.rows += item.rows
        if item.user not in self._waiting:
            self._served[item.user] = min(self._served.values(), default=0)
        self._waiting[item.user] = self._waiting.get(item.user, 0) + 1

    def remove(self, lane: Hashable) -> list[Item[T]]:
        """Take a lane's items out: its session has ended."""
        items = list(self._lanes.pop(lane, ()))
        for item in items:
            self._forget(item)
        return items

    def next_batch(self) -> list[Item[T]]:
        """Take the items to run now; empty when nothing waits."""
        heads = self._by_turn([queue[0] for queue in self._lanes.values()])
        decode = [head for head in heads if head.rows <= DECODE_ROWS]
        prefill = [head for head in heads if head.rows > DECODE_ROWS]
        if decode and (not prefill or self._decode_turns < MAX_DECODE_TURNS):
            self._decode_turns += 1
            return self._take(_together(decode, decode[0].group))
        self._decode_turns = 0
        if not prefill:
            return []
        return self._take([prefill[0], *_together(decode, prefill[0].group)])

    def _by_turn(self, heads: list[Item[T]]) -> list[Item[T]]:
        """Users by rows served, one item of each at a time; lanes of one user by waiting."""
        ahead = dict(self._served)
        turns = []
        for head in heads:
            turns.append(ahead[head.user])
            ahead[head.user] += head.rows
        return [heads[index] for index in sorted(range(len(heads)), key=turns.__getitem__)]

    def _take(self, batch: list[Item[T]]) -> list[Item[T]]:
        for item in batch:
            queue = self._lanes[item.lane]
            queue.popleft()
            if queue:
                self._lanes.move_to_end(item.lane)
            else:
                del self._lanes[item.lane]
            self._served[item.user] += item.rows
            self._forget(item)
        return batch

    def _forget(self, item: Item[T]) -> None:
        self.rows -= item.rows
        self._waiting[item.user] -= 1
        if not self._waiting[item.user]:
            del self._waiting[item.user], self._served[item.user]


def _together(decode: list[Item[T]], group: Hashable) -> list[Item[T]]:
    """Steps that can share a pass through these blocks, first come first."""
    batch: list[Item[T]] = []
    room = BATCH_ROWS
    for item in decode:
        if item.group == group and item.rows <= room:
            batch.append(item)
            room -= item.rows
    return batch
