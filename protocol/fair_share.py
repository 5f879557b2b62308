"""A rate shared fairly: who has had least goes first. Sans-IO.

Start-time fair queueing (Goyal, Vin, Cheng 1996) in front of a bucket that fills at the rate: each turn gets a start
tag, the end of its key's last turn or the present virtual time, whichever is later, and turns go in order of tags.
So those that ask for all get equal parts, however many turns each asks for at once. A key that has had less than its
part goes first until it has caught up CREDIT bytes, so who asks for little hardly waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

BURST_S: Final = 0.02
"""The bucket holds the rate of this long, so that a timer's delay loses nothing."""
MIN_BURST: Final = 128 * 1024
CREDIT: Final = 256 * 1024
"""Bytes that a key may have had less than others and still be given at once."""
MAX_KEYS: Final = 4096
"""Keys remembered; beyond that, those that have had no more than others are forgotten."""


@dataclass(order=True, slots=True)
class Turn:
    """A piece that waits to go."""

    start: float
    number: int
    size: int = field(compare=False)
    cancelled: bool = field(compare=False, default=False)


class FairShare:
    """One rate and who waits for it. Rate 0: nobody ever waits."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        """Bytes a second."""
        self._burst = max(MIN_BURST, rate * BURST_S)
        self._level = self._burst
        self._at = now
        self._virtual = 0.0
        self._ends: dict[Hashable, float] = {}
        self._waiting: list[Turn] = []
        self._count = 0

    def __len__(self) -> int:
        """Turns that wait."""
        return sum(not turn.cancelled for turn in self._waiting)

    def ask(self, key: Hashable, size: int, now: float) -> Turn | None:
        """Let `size` bytes of a key go: None when they may at once, else their turn, which due() will name."""
        if not self.rate:
            return None
        self._fill(now)
        known = self._ends.get(key)
        start = self._virtual if known is None else max(self._virtual - CREDIT, known)
        self._ends[key] = start + size
        if len(self._ends) > MAX_KEYS:
            self._forget()
        turn = Turn(start, self._count, size)
        self._count += 1
        if not self._waiting and self._level > 0:
            self._go(turn)
            return None
        heapq.heappush(self._waiting, turn)
        return turn

    def due(self, now: float) -> list[Turn]:
        """The turns that may go now, in order."""
        self._fill(now)
        found = []
        while self._waiting and (self._level > 0 or self._waiting[0].cancelled):
            turn = heapq.heappop(self._waiting)
            if not turn.cancelled:
                self._go(turn)
                found.append(turn)
        return found

    def wait_s(self) -> float | None:
        """Seconds from the last look until the next turn; None when nobody waits."""
        return max(0.0, 1 - self._level) / self.rate if self._waiting else None

    def _go(self, turn: Turn) -> None:
        self._level -= turn.size
        self._virtual = max(self._virtual, turn.start)

    def _fill(self, now: float) -> None:
        self._level = min(self._burst, self._level + self.rate * (now - self._at))
        self._at = now
        if self._level >= self._burst and not self._waiting:
            self._ends.clear()  # there was enough for all: nobody owes anybody

    def _forget(self) -> None:
        """Too many keys: keep those that have had more than others, or none if all have."""
        self._ends = {key: end for key, end in self._ends.items() if end > self._virtual}
        if len(self._ends) > MAX_KEYS:
            self._virtual = max(self._ends.values())
            self._ends.clear()
