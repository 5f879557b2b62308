"""Our own network coordinate, learned from round trips to peers that say where they are (coordinates.py).

Every DHT answer carries its sender's coordinate. The round trip to it, or a later one to a peer whose coordinate is
still known, moves us. A peer counts once in COUNTS_EVERY_S, with the lower median of its last round trips: one that
answers often, or one slow answer, says no more than others. Nor does one whose claims do not fit the round trips to it,
time after time, while those of most others do. When we are the one who is wrong nobody fits, and everybody is believed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from ..protocol.ids import PeerId
from .coordinates import Coordinate, moved

MAX_NEIGHBOURS: Final = 64
"""Peers whose coordinates are remembered; the one heard of longest ago goes first."""
COUNTS_EVERY_S: Final = 2.0
REMEMBERED_S: Final = 600.0
"""A coordinate heard longer ago is not used any more."""
BLURRED: Final = 0.7
"""With a larger relative error than this a place means nothing: the planner takes no notice of it either."""
SAMPLES: Final = 4
"""Last round trips to a peer that are kept."""
MIN_WITNESSES: Final = 8
"""Fewer neighbours cannot say who of them does not fit."""
MISFIT: Final = 4.0
"""A neighbour does not fit if predictions are off by so many times the round trip to it, in the mean. Measured: with
0.5 those who are themselves misplaced do not find back, near neighbours being the ones who contradict them most...
"""
MISFIT_FACTOR: Final = 4.0
"""... and if that is so many times what they are off for half of the neighbours."""
MAX_MISFIT: Final = 16.0
"""One sample counts for so much at most."""
_MISFIT_GAIN: Final = 0.25


@dataclass(slots=True)
class _Neighbour:
    coordinate: Coordinate
    heard_at: float
    rtts: deque[float]
    counted_at: float = float("-inf")
    misfit: float = 0.0
    """Relative error of the predictions so far, smoothed."""


class Whereabouts:
    """See the module's docstring."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._coordinate = Coordinate()
        self._neighbours: OrderedDict[PeerId, _Neighbour] = OrderedDict()
        self.samples = 0
        """Round trips that counted."""

    def __len__(self) -> int:
        return len(self._neighbours)

    @property
    def coordinate(self) -> Coordinate | None:
        """Where we are, None while we have hardly an idea."""
        return self._coordinate if self._coordinate.error <= BLURRED else None

    def told(self) -> tuple[float, float, float, float]:
        """What an answer says: without any round trip, that we have no idea."""
        return self._coordinate.as_floats()

    def heard(self, peer: PeerId, claim: tuple[float, float, float, float] | None, rtt_s: float, now: float) -> None:
        """A peer answered after `rtt_s` and said where it is. Raises RemoteProtocolError if that is nowhere."""
        if claim is None:
            return
        coordinate = Coordinate.from_floats(claim)
        neighbour = self._neighbours.get(peer)
        if neighbour is None:
            neighbour = self._neighbours[peer] = _Neighbour(coordinate, now, deque(maxlen=SAMPLES))
        neighbour.coordinate, neighbour.heard_at = coordinate, now
        self._neighbours.move_to_end(peer)
        if len(self._neighbours) > MAX_NEIGHBOURS:
            self._neighbours.popitem(last=False)
        self._count(neighbour, rtt_s, now)

    def measure(self, rtt_of: Callable[[PeerId], float | None], now: float) -> None:
        """Learn from one more round trip, as the transport knows it, to the neighbour that counted longest ago."""
        while self._neighbours and now - next(iter(self._neighbours.values())).heard_at > REMEMBERED_S:
            self._neighbours.popitem(last=False)
        for neighbour, rtt_s in sorted(
            ((neighbour, rtt_s) for peer, neighbour in self._neighbours.items() if (rtt_s := rtt_of(peer)) is not None),
            key=lambda pair: pair[0].counted_at,
        )[:1]:
            self._count(neighbour, rtt_s, now)

    def _count(self, neighbour: _Neighbour, rtt_s: float, now: float) -> None:
        neighbour.rtts.append(rtt_s)
        if now - neighbour.counted_at < COUNTS_EVERY_S:
            return
        neighbour.counted_at = now
        typical_s = sorted(neighbour.rtts)[(len(neighbour.rtts) - 1) // 2]
        error = abs(self._coordinate.rtt_s(neighbour.coordinate) - typical_s) / max(typical_s, 1e-6)
        neighbour.misfit += (min(error, MAX_MISFIT) - neighbour.misfit) * _MISFIT_GAIN
        if not self._misfits(neighbour):
            self._coordinate = moved(self._coordinate, neighbour.coordinate, typical_s, self._rng)
            self.samples += 1

    def _misfits(self, neighbour: _Neighbour) -> bool:
        if neighbour.misfit <= MISFIT or len(self._neighbours) < MIN_WITNESSES:
            return False
        misfits = sorted(other.misfit for other in self._neighbours.values())
        return neighbour.misfit > MISFIT_FACTOR * misfits[len(misfits) // 2]
