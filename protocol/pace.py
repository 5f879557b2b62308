"""How often a peer may make us work: by connecting, and by frames that carry nothing. Sans-IO.

limits.py bounds what is held at one time. Work that is over at once, such as pings, resets and handshakes, never
shows there, so it is measured here, by leaking buckets: a sum of costs that runs off at a constant rate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

from .errors import RemoteProtocolError
from .tally import Tally

CHORES_RATE: Final = 4000.0
"""Frames a second that a connection may send for nothing: about 2 % of a core."""
CHORES_BURST: Final = 16384
"""The same at once: room for every stream it may have open, and their resets."""
STREAM_COST: Final = 16
"""Frames that a stream opened to us counts as: it costs a task and a negotiation."""
CLOSED_WORTH: Final = 24
"""Frames that a stream earns which ended well."""
SENT_WORTH: Final = 2
"""Frames that a DATA frame of ours earns: its credit, and what it answers."""
BYTES_WORTH: Final = 64
"""Payload bytes that earn one frame."""
MAX_BUCKETS: Final = 4096
"""Sources of connections remembered; the one unused for longest is forgotten."""


class Pace:
    """What one connection's peer has cost beyond its use."""

    __slots__ = ("_at", "_debt", "_level")

    def __init__(self, now: float) -> None:
        self._at = now
        self._debt = 0
        self._level = 0.0

    def check(self, tally: Tally, now: float) -> None:
        """Call with the session's tally after each receive. Raises RemoteProtocolError when it was too much."""
        frames = tally.control_in + tally.stale_frames_in + sum(tally.frames_in)
        cost = frames + STREAM_COST * (tally.opened_there + tally.turned_away)
        worth = (
            sum(tally.bytes_in) // BYTES_WORTH
            + SENT_WORTH * sum(tally.frames_out)
            + CLOSED_WORTH * (tally.closed + tally.opened_here)
        )
        debt = cost - worth
        self._level = max(0.0, self._level + debt - self._debt - CHORES_RATE * (now - self._at))
        self._debt = debt
        self._at = now
        if self._level > CHORES_BURST:
            raise Chores(f"over {CHORES_BURST} frames and streams that carry nothing, {CHORES_RATE:g} a second allowed")


class Chores(RemoteProtocolError):
    """The peer keeps us busy with nothing: pings, resets, streams opened for no purpose, bytes sent one by one."""


class Buckets:
    """One leaking bucket per key, for events that each cost 1."""

    def __init__(self, *, rate: float, burst: int) -> None:
        self.rate = rate
        """Events a second in the long run."""
        self._burst = burst
        self._levels: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, key: Hashable, now: float) -> bool:
        """Whether one more event is allowed now; if so, it is counted."""
        if self._level(key, now) + 1 > self._burst:
            return False
        self.charge(key, 1, now)
        return True

    def charge(self, key: Hashable, amount: float, now: float) -> None:
        """Count this much, allowed or not; at most twice the burst is ever owed."""
        self._levels[key] = (min(self._level(key, now) + amount, 2 * self._burst), now)
        self._levels.move_to_end(key)
        if len(self._levels) > MAX_BUCKETS:
            self._levels.popitem(last=False)

    def _level(self, key: Hashable, now: float) -> float:
        level, at = self._levels.get(key, (0.0, now))
        return max(0.0, level - self.rate * (now - at))
