"""How long to wait for an answer before asking somebody else too: learned from the answers so far.

For a peer that answered before: its smoothed time plus a few deviations (RFC 6298's estimator). For strangers:
quantiles of the last first answers, whoever gave them; those include the connection's set-up. Four limits:

    hedge    most would have answered by now: the next best peer may be asked as well
    soft     nearly all would have: if several peers are silent at once, they are dead
    late     half as long again: a lookup ends without this peer; a late answer still counts and teaches
    hard     no answer is expected any more

A slow link raises its own limits instead of being declared dead. `kademlia` waits 5 s for each dead peer; here the end
of a lookup waits 0.15 s on loopback and about 0.35 s on the Internet.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

from ..protocol.ids import PeerId

INITIAL_S: Final = 0.6
"""Before anybody has answered: a 150 ms path with connection set-up."""
FLOOR_S: Final = 0.15
"""A busy Python process on the same machine may take this long."""
CEILING_S: Final = 3.0
HEDGE_FLOOR_S: Final = 0.05
HARD_FACTOR: Final = 6
HARD_FLOOR_S: Final = 0.9
HARD_CEILING_S: Final = 5.0
DEVIATIONS: Final = 3
"""RFC 6298 has 4 because a retransmission is dear; a question to the next nearest peer is cheap."""
LATE_DEVIATIONS: Final = 6
HEDGE_QUANTILE: Final = 0.75
SOFT_QUANTILE: Final = 0.97
LATE_FACTOR: Final = 1.5
"""Against the soft limit. Measured: with 1.0 one in a hundred of the nearest is missed for being late."""
WINDOW: Final = 128
"""First answers whose quantiles count."""
MIN_SAMPLES: Final = 8
"""Fewer say nothing about quantiles: their maximum is doubled instead."""
CAPACITY: Final = 1024
"""Peers whose times are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Seconds from the question on; see the module's docstring."""

    hedge_s: float
    """The next best may be asked as well."""
    soft_s: float
    """Not waited for if others are silent, too."""
    late_s: float
    """Not waited for."""
    hard_s: float
    """Given up."""


@dataclass(slots=True)
class _Estimate:
    smoothed_s: float
    deviation_s: float

    def observe(self, sample_s: float) -> None:
        self.deviation_s += (abs(sample_s - self.smoothed_s) - self.deviation_s) / 4
        self.smoothed_s += (sample_s - self.smoothed_s) / 8


class Timeouts:
    """Answer times seen so far, and the waits they suggest."""

    def __init__(self) -> None:
        self._peers: OrderedDict[PeerId, _Estimate] = OrderedDict()
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def observe(self, peer: PeerId, sample_s: float) -> None:
        """Learn that a peer answered after so many seconds."""
        known = self._peers.get(peer)
        if known is not None:
            known.observe(sample_s)
            self._peers.move_to_end(peer)
            return
        self._peers[peer] = _Estimate(sample_s, sample_s / 4)
        if len(self._peers) > CAPACITY:
            self._peers.popitem(last=False)
        self._recent.append(sample_s)
        insort(self._sorted, sample_s)
        if len(self._recent) > WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def limits(self, peer: PeerId) -> Limits:
        """How patient to be with a peer."""
        known = self._peers.get(peer)
        if known is None:
            hedge_s, soft_s = self._quantile_s(HEDGE_QUANTILE), self._quantile_s(SOFT_QUANTILE)
            late_s = LATE_FACTOR * soft_s
        else:
            hedge_s = known.smoothed_s + known.deviation_s
            soft_s = known.smoothed_s + DEVIATIONS * known.deviation_s
            late_s = known.smoothed_s + LATE_DEVIATIONS * known.deviation_s
        soft_s = min(CEILING_S, max(FLOOR_S, soft_s))
        return Limits(
            hedge_s=min(soft_s, max(HEDGE_FLOOR_S, hedge_s)),
            soft_s=soft_s,
            late_s=min(CEILING_S, max(soft_s, late_s)),
            hard_s=min(HARD_CEILING_S, max(HARD_FLOOR_S, HARD_FACTOR * soft_s)),
        )

    def _quantile_s(self, share: float) -> float:
        if not self._sorted:
            return INITIAL_S
        if len(self._sorted) < MIN_SAMPLES:
            return 2 * self._sorted[-1]
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]
