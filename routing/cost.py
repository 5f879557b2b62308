"""What a hop costs: turns servers, measurements and a request into numbers the search can add up.

The cost of a chain is the time it adds to one step: for every hop half a round trip, the bytes over the narrower access
link, the server's fixed handling time, its queue, its blocks times its block time, and a price for the chance that it
fails. docs/routing.md explains the terms to readers of `swarmnode route`.

A link between two servers is measured (hops used before), else predicted from coordinates, else taken as the larger of
the two half round trips to us: the true value lies anywhere between their difference and their sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Final, NamedTuple

from ..protocol.ids import PeerId
from .announce import PREFILL_TOKENS, Announcement, State
from .coordinates import Coordinate
from .metrics import UNKNOWN_BANDWIDTH, Metrics, PeerMetrics
from .swarm import ServerInfo, SwarmView

HOP_OVERHEAD_S: Final = 0.001
"""A server's fixed time per frame, our own bar for it; also what makes a chain of fewer hops win a tie."""
FAILURE_PRICE_S: Final = 0.5
"""What a certain failure per request would cost a step: about one repair on a LAN."""
TOKEN_BYTES: Final = 4
FRAME_BYTES: Final = 96
"""Header, encryption and muxing around one payload."""
_BLURRED: Final = 0.7
"""Coordinates with a larger relative error than this are not used."""


class Policy(Enum):
    """What a good chain is."""

    MIN_LATENCY = "min-latency"
    """The smallest time of one step: decoding for one user."""
    MAX_THROUGHPUT = "max-throughput"
    """The most steps a second when stages overlap (the fastest slowest stage), ties by latency: prefill, training."""


class Reason(Enum):
    """Why a server that holds wanted blocks cannot be used."""

    LOADING = "still loading weights"
    DRAINING = "leaving the swarm"
    DENIED = "excluded by an allow or deny list"
    FAILED = "just failed"
    IN_USE = "already in the chain"
    BANNED = "banned after failures"
    CLASS = "of another compute class"
    KV = "short of KV room"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What a chain is needed for. Blocks are half-open; the defaults are one decode step over the whole model."""

    start: int = 0
    end: int | None = None
    """One past the last block; None: the whole model."""
    tokens: int = 1
    """Tokens per step, all lanes together."""
    bytes_per_token: int = 0
    """Size of one token's hidden state in the session's codec."""
    returned_tokens: int = 1
    """Tokens per step whose result the client wants back."""
    need_embed: bool = False
    """The client sends token ids: the first hop must announce the embedding."""
    need_head: bool = False
    """The client wants tokens or logits back: the last hop must announce the head."""
    kv_tokens: int = 0
    """Positions, all lanes together, that each server must have KV room for."""
    classes: tuple[tuple[int, int, bytes], ...] = ()
    """(start, end, compute class): blocks that only servers of that class may run."""
    allow: frozenset[PeerId] | None = None
    """Use only these peers; None: any."""
    deny: frozenset[PeerId] = frozenset()
    """Never use these peers."""
    banned: frozenset[PeerId] = frozenset()
    """Peers now banned for failing."""
    failed: frozenset[PeerId] = frozenset()
    """Peers that failed in this very session: never used."""
    in_use: frozenset[PeerId] = frozenset()
    """Peers that run other blocks of the session: a chain names a server once."""
    policy: Policy = Policy.MIN_LATENCY
    client: PeerId | None = None
    """Our own peer id: a server on this very node costs no network."""
    upstream: PeerId | None = None
    """The server that will send to the first hop; None: the client."""
    downstream: PeerId | None = None
    """The server the last hop will send to; None: the client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTerms:
    """The seconds one hop adds to a step, by cause."""

    network_s: float = 0.0
    """Half a round trip from the hop before."""
    transfer_s: float = 0.0
    """Bytes over bandwidth."""
    overhead_s: float = 0.0
    """The server's fixed handling of one frame."""
    queue_s: float = 0.0
    """Waiting for other users' steps."""
    compute_s: float = 0.0
    """Its blocks times its block time."""
    risk_s: float = 0.0
    """The price of its past failures."""

    @property
    def total_s(self) -> float:
        """All terms together."""
        return sum(seconds for _, seconds in self.items())

    def items(self) -> Iterator[tuple[str, float]]:
        """(name, seconds) of each term, in the order of a step."""
        yield "network", self.network_s
        yield "transfer", self.transfer_s
        yield "overhead", self.overhead_s
        yield "queue", self.queue_s
        yield "compute", self.compute_s
        yield "risk", self.risk_s


class Leg(NamedTuple):
    """The way between two ends: what a hop pays before the server has its input."""

    network_s: float
    transfer_s: float

    @property
    def total_s(self) -> float:
        """Both together."""
        return self.network_s + self.transfer_s


@dataclass(slots=True)
class Place:
    """Where a peer is on the network, as this request feels it. Never changed; frozen would cost 3 us a server."""

    peer: PeerId
    half_s: float
    """One way between it and us."""
    transfer_s: float
    """This request's hidden states through its access link."""
    coordinate: Coordinate | None


@dataclass(slots=True)
class Candidate:
    """A server that may run blocks [start, end) for this request, with its prices. Never changed once built."""

    server: ServerInfo
    place: Place
    start: int
    end: int
    block_s: float
    """Seconds per block for this request's tokens."""
    risk_s: float
    visit_s: float
    """Paid once a hop, wherever it comes from: overhead, queue and risk."""
    entry: Leg
    """From the upstream end (client or server) when it is the first hop."""
    exit: Leg
    """To the downstream end when it is the last hop."""


class Links:
    """Prices of links between servers; special ones were measured or are known to go through the client."""

    def __init__(self, special: dict[tuple[PeerId, PeerId], float | None]) -> None:
        self.special = special

    def leg(self, sender: Place, receiver: Place) -> Leg:
        """One hop from server to server."""
        special = self.special
        if not special or (sender.peer, receiver.peer) not in special:
            return Leg(estimate_s(sender, receiver), wire_s(sender, receiver))
        measured = special[sender.peer, receiver.peer]
        if measured is not None:
            return Leg(measured, wire_s(sender, receiver))
        return Leg(sender.half_s + receiver.half_s, sender.transfer_s + receiver.transfer_s)


def estimate_s(sender: Place, receiver: Place) -> float:
    """One-way seconds between two servers never measured together."""
    if sender.coordinate is not None and receiver.coordinate is not None:
        return sender.coordinate.rtt_s(receiver.coordinate) / 2
    return max(sender.half_s, receiver.half_s)


def wire_s(sender: Place, receiver: Place) -> float:
    """Seconds the bytes take: the narrower of the two access links decides."""
    return max(sender.transfer_s, receiver.transfer_s)


def step_s(decode_s: float, prefill_s: float, tokens: int) -> float:
    """Seconds one block takes for `tokens` tokens, from its times for 1 and for PREFILL_TOKENS.

    Linear between the two, proportional beyond: exact at both ends, and right in the limit that compute decides.
    """
    full = max(prefill_s, decode_s)
    if tokens >= PREFILL_TOKENS:
        return full * tokens / PREFILL_TOKENS
    return decode_s + (full - decode_s) * (tokens - 1) / (PREFILL_TOKENS - 1)


class Pricing:
    """Builds the candidates of one request; pure, made anew for each plan."""

    def __init__(self, request: PlanRequest, view: SwarmView, metrics: Metrics, now: float) -> None:
        self._request = request
        self._view = view
        self._metrics = metrics
        self._now = now
        self.start = request.start
        self.end = view.num_blocks if request.end is None else request.end
        self._classes = _merged(request.classes)
        self._excluded = _excluded(request)
        self.links = Links(metrics.special_hops(now))
        self._upstream = self._end_place(request.upstream)
        self._downstream = self._end_place(request.downstream)

    def candidates(self) -> tuple[list[Candidate], Counter[Reason]]:
        """Usable servers in the view's order, and how many were ruled out for which reason."""
        ruled_out: Counter[Reason] = Counter()
        usable = []
        for server in self._view.servers:
            announced = server.announcement
            low, high = max(announced.start, self.start), min(announced.end, self.end)
            if low >= high:
                continue
            reason = self._reason(server, announced)
            if reason is not None:
                ruled_out[reason] += 1
            elif not self._classes:
                usable.append(self._price(server, low, high))
            else:
                usable += [self._price(server, *span) for span in self._spans(announced, low, high)]
        return usable, ruled_out

    def metric_ends(self, candidates: Sequence[Candidate]) -> tuple[bool, bool]:
        """Whether links from the upstream end, and to the downstream end, obey the triangle inequality.

        They do when that end is a server and everybody has coordinates; our own measured links obey nothing, and
        neither does a server that must come first or last.
        """
        located = not self.links.special and all(c.place.coordinate is not None for c in candidates)
        roles = self._request.need_embed or self._request.need_head
        ends = (None, None) if roles else (self._upstream, self._downstream)
        upstream, downstream = (located and place is not None and place.coordinate is not None for place in ends)
        return upstream, downstream

    def _spans(self, announced: Announcement, low: int, high: int) -> list[tuple[int, int]]:
        """The parts of [low, high) that a server of this class may run."""
        return [
            (max(low, start), min(high, end))
            for start, end, compute_class in self._classes
            if compute_class == announced.compute_class and max(low, start) < min(high, end)
        ]

    def _reason(self, server: ServerInfo, announced: Announcement) -> Reason | None:
        request, state, peer = self._request, announced.state, announced.peer
        if state is not State.ONLINE:
            return Reason.LOADING if state is State.JOINING else Reason.DRAINING
        if self._excluded and peer in self._excluded:
            return self._excluded[peer]
        if request.allow is not None and peer not in request.allow:
            return Reason.DENIED
        if self._classes and not self._spans(announced, max(announced.start, self.start), min(announced.end, self.end)):
            return Reason.CLASS
        return Reason.KV if request.kv_tokens and server.kv_free < request.kv_tokens else None

    def _price(self, server: ServerInfo, start: int, end: int) -> Candidate:
        announced, now = server.announcement, self._now
        decode_s, prefill_s, risk_s = announced.decode_s, announced.prefill_s, 0.0
        known = self._metrics.peer(announced.peer)
        if known is not None:
            decode_s = known.decode.against(decode_s, now) if known.decode is not None else decode_s
            prefill_s = known.prefill.against(prefill_s, now) if known.prefill is not None else prefill_s
            risk_s = FAILURE_PRICE_S * self._metrics.failure_rate(announced.peer, now)
        place, bandwidth = self._place(announced.peer, announced.coordinate, known)
        return Candidate(
            server,
            place,
            start,
            end,
            step_s(decode_s, prefill_s, self._request.tokens),
            risk_s,
            HOP_OVERHEAD_S + server.queue_s + risk_s,
            self._entry(place, bandwidth),
            self._exit(place, bandwidth),
        )

    def _entry(self, place: Place, bandwidth: float) -> Leg:
        if self._upstream is not None:
            return self.links.leg(self._upstream, place)
        request = self._request
        per_token = TOKEN_BYTES if request.need_embed else request.bytes_per_token
        return Leg(place.half_s, (request.tokens * per_token + FRAME_BYTES) / bandwidth)

    def _exit(self, place: Place, bandwidth: float) -> Leg:
        if self._downstream is not None:
            return self.links.leg(place, self._downstream)
        request = self._request
        per_token = TOKEN_BYTES if request.need_head else request.bytes_per_token
        tokens = min(request.returned_tokens, request.tokens)
        return Leg(place.half_s, (tokens * per_token + FRAME_BYTES) / bandwidth)

    def _place(self, peer: PeerId, coordinate: Coordinate | None, known: PeerMetrics | None) -> tuple[Place, float]:
        """A peer's place and the bandwidth between it and us."""
        size = self._request.tokens * self._request.bytes_per_token + FRAME_BYTES
        sharp = coordinate if coordinate is not None and coordinate.error <= _BLURRED else None
        if peer == self._request.client:
            return Place(peer, 0.0, 0.0, sharp), inf
        bandwidth, jitter_s = UNKNOWN_BANDWIDTH, 0.0
        if known is not None:
            bandwidth = known.bandwidth.against(bandwidth, self._now) if known.bandwidth is not None else bandwidth
            jitter_s = known.jitter.value if known.jitter is not None else 0.0
        rtt_s = self._metrics.rtt_s(peer, sharp, self._now)
        return Place(peer, (rtt_s + jitter_s) / 2, size / bandwidth, sharp), bandwidth

    def _end_place(self, peer: PeerId | None) -> Place | None:
        if peer is None:
            return None
        server = self._view.server(peer)
        coordinate = server.announcement.coordinate if server is not None else None
        return self._place(peer, coordinate, self._metrics.peer(peer))[0]


def floor_s(place: Place) -> float:
    """A share of every estimated link of this place, whichever the other end: link >= floor(a) + floor(b).

    Holds for both estimates: distance + heights >= heights, max(a, b) >= (a + b) / 2. It lets the search stop early.
    """
    half_s = place.half_s / 2
    if place.coordinate is not None:
        half_s = min(half_s, place.coordinate.height / 2)
    return half_s + place.transfer_s / 2


def _excluded(request: PlanRequest) -> dict[PeerId, Reason]:
    """Every peer the request rules out by name, with the weightiest reason."""
    reasons = dict.fromkeys(request.banned, Reason.BANNED)
    reasons |= dict.fromkeys(request.in_use, Reason.IN_USE)
    reasons |= dict.fromkeys(request.failed, Reason.FAILED)
    return reasons | dict.fromkeys(request.deny, Reason.DENIED)


def _merged(classes: tuple[tuple[int, int, bytes], ...]) -> list[tuple[int, int, bytes]]:
    """The same rule with touching spans of one class joined, so that one run may cross them."""
    merged: list[tuple[int, int, bytes]] = []
    for start, end, compute_class in sorted(classes):
        if merged and merged[-1][1] == start and merged[-1][2] == compute_class:
            merged[-1] = (merged[-1][0], end, compute_class)
        else:
            merged.append((start, end, compute_class))
    return merged
