"""What this node has measured about other peers, with its age: the planner's own eyes.

Everything is an exponentially weighted mean whose weight also decays with time, so that a figure from an hour ago
counts little against a server's fresh announcement and a figure from this session counts almost fully. Nothing reads a
clock: every call takes `now`. The table is bounded; the peer not heard of for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, TypeVar

from ..protocol.ids import PeerId
from .announce import PREFILL_TOKENS
from .coordinates import Coordinate

_K = TypeVar("_K")
_V = TypeVar("_V")

MAX_PEERS: Final = 4096
MAX_HOPS: Final = 8192
"""Measured server-to-server links kept."""
HALF_LIFE_S: Final = 120.0
"""A measurement not repeated loses half of its weight in this time: Petals keeps pings for 300 s, unweighted."""
STALE_S: Final = 600.0
"""Round trips and links older than this are not used at all."""
FAILURE_HALF_LIFE_S: Final = 900.0
_MAX_WEIGHT: Final = 5.0
"""Sample weight saturates here: a gain of 0.2, Petals' own for pings."""
_DECODE_TOKENS: Final = 4
"""Steps of up to this many tokens teach the decode time."""
_PREFILL_TOKENS: Final = 64
"""Steps of at least this many tokens teach the prefill time; between the two, neither."""
UNKNOWN_RTT_S: Final = 0.1
"""Round trip assumed to a peer neither measured nor placed."""
UNKNOWN_BANDWIDTH: Final = 12.5e6
"""Bytes a second assumed for a link never measured: 100 Mbit/s."""


@dataclass(frozen=True, slots=True)
class Ewma:
    """A weighted mean and how much it is worth."""

    value: float
    weight: float
    """Samples it stands for, at most _MAX_WEIGHT, at time `at`."""
    at: float

    def updated(self, sample: float, now: float, half_life_s: float = HALF_LIFE_S) -> Ewma:
        """The mean after one more sample."""
        weight = min(self.weight * _decay(now - self.at, half_life_s) + 1.0, _MAX_WEIGHT)
        return Ewma(self.value + (sample - self.value) / weight, weight, now)

    def against(self, prior: float, now: float, half_life_s: float = HALF_LIFE_S) -> float:
        """The mean pulled towards `prior`, which counts as one sample, as it ages."""
        weight = self.weight * _decay(now - self.at, half_life_s)
        return (self.value * weight + prior) / (weight + 1.0)


def _decay(age_s: float, half_life_s: float) -> float:
    return float(0.5 ** (max(age_s, 0.0) / half_life_s))


def _fold(old: Ewma | None, sample: float, now: float, half_life_s: float = HALF_LIFE_S) -> Ewma:
    return Ewma(sample, 1.0, now) if old is None else old.updated(sample, now, half_life_s)


@dataclass(slots=True)
class PeerMetrics:
    """What is known of one peer; None means never measured."""

    rtt: Ewma | None = None
    jitter: Ewma | None = None
    """Mean deviation of the round trip."""
    bandwidth: Ewma | None = None
    """Bytes a second between it and us."""
    decode: Ewma | None = None
    """Seconds a block takes for one token."""
    prefill: Ewma | None = None
    """Seconds a block takes for PREFILL_TOKENS tokens."""
    failures: Ewma | None = None
    """Share of requests that failed, 0 to 1."""


@dataclass(slots=True)
class Metrics:
    """Measurements of every peer this node has dealt with."""

    coordinate: Coordinate | None = None
    """Our own network coordinate."""
    _peers: OrderedDict[PeerId, PeerMetrics] = field(default_factory=OrderedDict)
    _hops: OrderedDict[tuple[PeerId, PeerId], Ewma] = field(default_factory=OrderedDict)
    _relayed: OrderedDict[tuple[PeerId, PeerId], float] = field(default_factory=OrderedDict)

    def peer(self, peer: PeerId) -> PeerMetrics | None:
        """What was measured of `peer`, or None."""
        return self._peers.get(peer)

    def observe_rtt(self, peer: PeerId, rtt_s: float, now: float) -> None:
        """A round trip to `peer` took this long."""
        known = self._entry(peer)
        if known.rtt is not None:
            known.jitter = _fold(known.jitter, abs(rtt_s - known.rtt.value), now)
        known.rtt = _fold(known.rtt, rtt_s, now)

    def observe_transfer(self, peer: PeerId, size_bytes: int, seconds: float, now: float) -> None:
        """`size_bytes` went to or came from `peer` in `seconds`, latency taken off."""
        if seconds > 0 and size_bytes > 0:
            known = self._entry(peer)
            known.bandwidth = _fold(known.bandwidth, size_bytes / seconds, now)

    def observe_step(self, peer: PeerId, blocks: int, tokens: int, seconds: float, now: float) -> None:
        """`peer` computed `blocks` blocks for `tokens` tokens in `seconds`, network and queue taken off."""
        known, per_block = self._entry(peer), seconds / blocks
        if tokens <= _DECODE_TOKENS:
            known.decode = _fold(known.decode, per_block, now)
        elif tokens >= _PREFILL_TOKENS:
            known.prefill = _fold(known.prefill, per_block * PREFILL_TOKENS / tokens, now)

    def observe_outcome(self, peer: PeerId, *, failed: bool, now: float) -> None:
        """A request to `peer` ended well, or failed."""
        known = self._entry(peer)
        known.failures = _fold(known.failures, float(failed), now, FAILURE_HALF_LIFE_S)

    def observe_hop(self, sender: PeerId, receiver: PeerId, one_way_s: float, now: float) -> None:
        """A message went from one server to the next in this time; also says that they reach each other."""
        pair = sender, receiver
        self._relayed.pop(pair, None)
        self._hops[pair] = _fold(self._hops.get(pair), one_way_s, now)
        _bound(self._hops, pair, MAX_HOPS)

    def observe_relayed(self, sender: PeerId, receiver: PeerId, now: float) -> None:
        """`sender` could not open a stream to `receiver`: that hop went through us."""
        pair = sender, receiver
        self._hops.pop(pair, None)
        self._relayed[pair] = now
        _bound(self._relayed, pair, MAX_HOPS)

    def rtt_s(self, peer: PeerId, coordinate: Coordinate | None, now: float) -> float:
        """Round trip between us and a peer: measured, else predicted from coordinates, else UNKNOWN_RTT_S."""
        known = self._peers.get(peer)
        if known is not None and known.rtt is not None and now - known.rtt.at < STALE_S:
            return known.rtt.value
        if coordinate is not None and self.coordinate is not None:
            return self.coordinate.rtt_s(coordinate)
        return UNKNOWN_RTT_S

    def special_hops(self, now: float) -> dict[tuple[PeerId, PeerId], float | None]:
        """Links between servers we know better than the estimate: one-way seconds, None where they go through us."""
        hops: dict[tuple[PeerId, PeerId], float | None] = {
            pair: mean.value for pair, mean in self._hops.items() if now - mean.at < STALE_S
        }
        hops.update((pair, None) for pair, at in self._relayed.items() if now - at < STALE_S)
        return hops

    def failure_rate(self, peer: PeerId, now: float) -> float:
        """Share of requests to `peer` that fail, 0 to 1; 0 for a stranger, and forgiven with time."""
        known = self._peers.get(peer)
        if known is None or known.failures is None:
            return 0.0
        return known.failures.against(0.0, now, FAILURE_HALF_LIFE_S)

    def _entry(self, peer: PeerId) -> PeerMetrics:
        known = self._peers.setdefault(peer, PeerMetrics())
        _bound(self._peers, peer, MAX_PEERS)
        return known


def _bound(table: OrderedDict[_K, _V], touched: _K, limit: int) -> None:
    """Mark one key as the freshest and drop the stalest beyond `limit`."""
    table.move_to_end(touched)
    while len(table) > limit:
        table.popitem(last=False)
