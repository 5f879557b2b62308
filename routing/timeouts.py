"""How long to wait for an answer before asking somebody else too: learned from the answers so far.

A smoothed time plus a few deviations (RFC 6298's estimator), per peer, and over first answers for peers not yet met:
those include the connection's set-up. The soft limit only means that somebody else is asked too; a late answer still
counts and teaches, so a slow link raises its own limit instead of being declared dead. Six times that is the hard
limit. `kademlia` waits 5 s for each dead peer; on loopback the soft limit comes to 0.15 s, on a 100 ms path to 0.4.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ..protocol.ids import PeerId

INITIAL_S: Final = 0.6
"""Before anybody has answered: a 150 ms path with connection set-up."""
FLOOR_S: Final = 0.15
"""A busy Python process on the same machine may take this long."""
CEILING_S: Final = 3.0
HARD_FACTOR: Final = 6
HARD_FLOOR_S: Final = 0.9
HARD_CEILING_S: Final = 5.0
DEVIATIONS: Final = 3
"""RFC 6298 has 4 because a retransmission is dear; a question to the next nearest peer is cheap."""
CAPACITY: Final = 1024
"""Peers whose times are remembered."""


@dataclass(slots=True)
class _Estimate:
    smoothed_s: float
    deviation_s: float

    def observe(self, sample_s: float) -> None:
        self.deviation_s += (abs(sample_s - self.smoothed_s) - self.deviation_s) / 4
        self.smoothed_s += (sample_s - self.smoothed_s) / 8

    @property
    def limit_s(self) -> float:
        return self.smoothed_s + DEVIATIONS * self.deviation_s


class Timeouts:
    """Answer times seen so far, and the waits they suggest."""

    def __init__(self) -> None:
        self._peers: OrderedDict[PeerId, _Estimate] = OrderedDict()
        self._first: _Estimate | None = None

    def observe(self, peer: PeerId, sample_s: float) -> None:
        """Learn that a peer answered after so many seconds."""
        known = self._peers.pop(peer, None)
        if known is None:
            known = _Estimate(sample_s, sample_s / 2)
            if self._first is None:
                self._first = _Estimate(sample_s, sample_s / 2)
            else:
                self._first.observe(sample_s)
        else:
            known.observe(sample_s)
        self._peers[peer] = known
        if len(self._peers) > CAPACITY:
            self._peers.popitem(last=False)

    def soft_s(self, peer: PeerId) -> float:
        """Seconds after which somebody else should be asked as well."""
        known = self._peers.get(peer, self._first)
        limit_s = INITIAL_S if known is None else known.limit_s
        return min(CEILING_S, max(FLOOR_S, limit_s))

    def hard_s(self, peer: PeerId) -> float:
        """Seconds after which no answer is expected any more."""
        return min(HARD_CEILING_S, max(HARD_FLOOR_S, HARD_FACTOR * self.soft_s(peer)))
