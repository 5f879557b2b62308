"""What the compute thread does next: a pure state machine, items in, batches out.

Decode steps go first and together: one pass over the weights serves all of them, and each has a person waiting.
Prefill chunks never starve: after MAX_DECODE_TURNS batches of decode steps one chunk has its turn, and the decode steps
that wait ride along in its pass. Items of one lane keep their order. Only items of one group (same blocks) can share a
batch. An item without rows is a move: it costs nothing, may stand in the queues of two lanes, and goes by itself once
it heads both.

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


@dataclass(frozen=True, slots=True, eq=False)
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
    also: Hashable = None
    """A second lane it keeps its place in: a move from one to the other."""

    @property
    def lanes(self) -> tuple[Hashable, ...]:
        """The lanes in whose order it stands."""
        return (self.lane,) if self.also is None else (self.lane, self.also)


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
        return sum(self._waiting.values())

    def add(self, item: Item[T]) -> None:
        """Queue an item behind its lane's others."""
        for lane in item.lanes:
            self._lanes.setdefault(lane, deque()).append(item)
        self.rows += item.rows
        if item.user not in self._waiting:
            self._served[item.user] = min(self._served.values(), default=0)
        self._waiting[item.user] = self._waiting.get(item.user, 0) + 1

    def remove(self, lane: Hashable) -> list[Item[T]]:
        """Take a lane's items out: its session has ended."""
        items = list(self._lanes.get(lane, ()))
        for item in items:
            for each in item.lanes:
                self._lanes[each].remove(item)
                if not self._lanes[each]:
                    del self._lanes[each]
            self._forget(item)
        return items

    def next_batch(self) -> list[Item[T]]:
        """Take the items to run now; empty when nothing waits."""
        firsts = [queue[0] for queue in self._lanes.values()]
        for first in firsts:
            if not first.rows and all(self._lanes[lane][0] is first for lane in first.lanes):
                return self._take([first])
        heads = self._by_turn([first for first in firsts if first.rows])
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
            for lane in item.lanes:
                queue = self._lanes[lane]
                queue.popleft()
                if queue:
                    self._lanes.move_to_end(lane)
                else:
                    del self._lanes[lane]
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
