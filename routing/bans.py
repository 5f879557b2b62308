"""Whom to leave alone for a while: a growing back-off after each failure, forgotten after a success.

The DHT and the client both use it: a peer that failed must not be dialed again in anybody's critical path, yet a
peer that was only slow must come back soon. So nothing is for ever: 5 s, 10 s, 20 s, ... up to ten minutes. Failures
that arrive while a peer is already avoided (parallel requests dying of one cause) count once. Names are any hashable
value: the DHT avoids (peer, addresses told by others) pairs, so that wrong addresses for a victim do not ban the
victim itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from random import Random
from typing import Final

BASE_S: Final = 5.0
CAP_S: Final = 600.0
FORGET_S: Final = 3600.0
"""A streak that is not continued for this long is over."""
CAPACITY: Final = 4096
"""Names remembered; the one whose failure lies longest back is forgotten first."""
JITTER: Final = 0.2
"""Back-offs vary by this share, so that a crowd does not come back at once."""


@dataclass(frozen=True, slots=True)
class _Streak:
    failures: int
    failed_at: float
    until: float


class BackOff:
    """Failure streaks by name, with how long each is to be avoided."""

    def __init__(self, rng: Random, *, base_s: float = BASE_S, cap_s: float = CAP_S, capacity: int = CAPACITY) -> None:
        self._rng = rng
        self._base_s = base_s
        self._cap_s = cap_s
        self._capacity = capacity
        self._streaks: OrderedDict[Hashable, _Streak] = OrderedDict()

    def failed(self, name: Hashable, now: float) -> float:
        """Note a failure; returns until when the name is avoided."""
        known = self._streaks.pop(name, None)
        if known is not None and now < known.until:
            self._streaks[name] = known
            return known.until
        failures = 1 if known is None or now - known.failed_at > FORGET_S else known.failures + 1
        wait_s = min(self._cap_s, self._base_s * 2.0 ** min(failures - 1, 32))
        wait_s *= 1 + JITTER * (2 * self._rng.random() - 1)
        self._streaks[name] = _Streak(failures, now, now + wait_s)
        if len(self._streaks) > self._capacity:
            self._streaks.popitem(last=False)
        return now + wait_s

    def succeeded(self, name: Hashable) -> None:
        """Forget a name's failures."""
        self._streaks.pop(name, None)

    def avoided(self, name: Hashable, now: float) -> bool:
        """True while the name's back-off lasts."""
        known = self._streaks.get(name)
        return known is not None and now < known.until

    def failures(self, name: Hashable) -> int:
        """Length of the current streak; 0 for a name without one."""
        known = self._streaks.get(name)
        return 0 if known is None else known.failures

    def __len__(self) -> int:
        return len(self._streaks)
