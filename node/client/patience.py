"""How long to wait for a step before asking what is wrong: a multiple of what steps take, within bounds.

No detector is right for every link and machine, so silence alone never condemns a server: it makes the client ask.
"""

from __future__ import annotations

from collections import deque
from typing import Final

RECENT: Final = 64
FACTOR: Final = 4.0
"""Of the slowest recent step."""
LAN_S: Final = 0.15
WAN_S: Final = 0.3
"""Beside two round trips."""
MOST_S: Final = 5.0
PROBE_S: Final = 0.5
"""A live server's loop answers a probe even while its compute thread is busy; this is room for a busy machine."""


class Patience:
    """Learns step times; says when to grow suspicious. Steps are compared with steps of about as many rows."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}
        """By the bits of the number of rows."""
        self._began: float | None = None
        self._rows = 0

    def began(self, now: float, rows: int) -> None:
        """Rows were fed; those of several frames before a result are one step."""
        self._rows = rows if self._began is None else self._rows + rows
        self._began = now

    def ended(self, now: float) -> None:
        """Their result came."""
        if self._began is not None:
            self._steps.setdefault(self._rows.bit_length(), deque(maxlen=RECENT)).append(now - self._began)
            self._began = None

    def deadline_s(self, rtt_s: float) -> float:
        """Time to wait for a result. The first steps of a session have nothing to compare with: wait long."""
        slowest = self._slowest_s(self._rows.bit_length())
        floor = max(LAN_S, 2 * rtt_s + WAN_S if rtt_s > LAN_S / 10 else LAN_S)
        return min(MOST_S, max(floor, FACTOR * slowest))

    def _slowest_s(self, bits: int) -> float:
        """The slowest recent step of so many rows; else what others make of it: twice the rows, twice the time at most.

        Guessed tokens make steps of ever other sizes: each new one must not mean to wait as if nothing were known.
        """
        known = {size: max(steps) for size, steps in self._steps.items() if len(steps) > 1}
        if bits in known:
            return known[bits]
        return min((seconds * 2 ** max(0, bits - size) for size, seconds in known.items()), default=MOST_S)

    def probe_s(self, rtt_s: float) -> float:
        """Time to wait for the answer to a probe."""
        return PROBE_S + 2 * rtt_s
