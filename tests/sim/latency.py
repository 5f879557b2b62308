"""How long messages take between two simulated peers.

`World` puts every peer in one of nine regions. The round trip between two peers is

    (region to region + distance inside the region) x detour(pair) + access link of each

Region to region are rounded figures of what cloud providers publish between their sites in Ireland, Virginia, Oregon,
Tokyo, Singapore, Mumbai, Sao Paulo, Sydney and Cape Town. Inside a region peers scatter over a plane. A detour is
log-normal and fixed for a pair: routes are not straight, and the triangle inequality breaks, as it does on the
Internet. Access links are log-normal (median 6 ms, one in twenty above 22). Each message adds an exponential 4 %, and
one in a hundred waits in somebody's full queue. Round trips come to 160 ms in the mean and the median; one in twenty
is over 310 ms.
"""

from __future__ import annotations

import math
from random import Random

REGIONS = ("europe", "us east", "us west", "japan", "singapore", "india", "brazil", "australia", "south africa")
WEIGHTS = (30, 20, 12, 9, 9, 8, 5, 4, 3)
_TRIANGLE_MS = (
    (0,),
    (80, 0),
    (145, 65, 0),
    (230, 155, 105, 0),
    (170, 220, 170, 70, 0),
    (125, 190, 220, 125, 60, 0),
    (190, 115, 175, 260, 320, 300, 0),
    (260, 200, 140, 105, 95, 150, 310, 0),
    (155, 225, 285, 350, 250, 255, 340, 400, 0),
)
BETWEEN_S = [
    [_TRIANGLE_MS[max(one, two)][min(one, two)] / 1000 for two in range(len(REGIONS))] for one in range(len(REGIONS))
]
SCATTER_S = 0.008
ACCESS_MEDIAN_S = 0.006
ACCESS_SIGMA = 0.8
DETOUR_SIGMA = 0.12
JITTER_SHARE = 0.04
QUEUE_CHANCE = 0.01
QUEUE_MEAN_S = 0.15
_DETOURS = 8191


class World:
    """Latencies of peers numbered from 0 in the order they ask for a place."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._places: list[tuple[int, float, float, float]] = []
        self._detours = [math.exp(rng.gauss(0, DETOUR_SIGMA)) for _ in range(_DETOURS)]

    def place(self, number: int) -> None:
        """Give a peer its region, its spot there and its access link."""
        while len(self._places) <= number:
            rng = self._rng
            region = rng.choices(range(len(REGIONS)), WEIGHTS)[0]
            access_s = ACCESS_MEDIAN_S * math.exp(rng.gauss(0, ACCESS_SIGMA))
            self._places.append((region, rng.gauss(0, SCATTER_S), rng.gauss(0, SCATTER_S), access_s))

    def region(self, number: int) -> int:
        """The region a peer lives in."""
        return self._places[number][0]

    def rtt_s(self, one: int, two: int) -> float:
        """The undisturbed round trip between two peers."""
        region, x, y, access_s = self._places[one]
        other, far_x, far_y, far_access_s = self._places[two]
        detour = self._detours[(one * 31 ^ two * 31) * 2654435761 % _DETOURS]
        path_s = BETWEEN_S[region][other] + math.hypot(x - far_x, y - far_y)
        return path_s * detour + access_s + far_access_s

    def delay_s(self, one: int, two: int, rng: Random) -> float:
        """What one message needs, one way, this time."""
        one_way_s = self.rtt_s(one, two) / 2
        delay_s = one_way_s * (1 + JITTER_SHARE * rng.expovariate(1))
        return delay_s + rng.expovariate(1 / QUEUE_MEAN_S) if rng.random() < QUEUE_CHANCE else delay_s


class Uniform:
    """Every exchange takes a random time between two bounds, whoever talks: for tests that want a plain network."""

    def __init__(self, low_s: float, high_s: float) -> None:
        self._low_s = low_s
        self._high_s = high_s

    def place(self, number: int) -> None:
        """Nobody lives anywhere."""

    def rtt_s(self, one: int, two: int) -> float:
        """The mean round trip."""
        return (self._low_s + self._high_s) / 2

    def delay_s(self, one: int, two: int, rng: Random) -> float:
        """Half of a random round trip."""
        return rng.uniform(self._low_s, self._high_s) / 2


class Busy:
    """Nodes of one machine that has too little time for them: every second message is held up."""

    def __init__(self, hold_up_s: float) -> None:
        self.hold_up_s = hold_up_s
        """In the mean."""

    def place(self, number: int) -> None:
        """All live at one place."""

    def rtt_s(self, one: int, two: int) -> float:
        """A loopback's round trip."""
        return 0.001

    def delay_s(self, one: int, two: int, rng: Random) -> float:
        """Half of it, and the time until the receiver's turn comes."""
        waits = self.hold_up_s and rng.random() < 0.5
        return 0.0005 + (rng.expovariate(1 / self.hold_up_s) if waits else 0.0)
