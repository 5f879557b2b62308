"""The connections of a host: who is connected by which wires, who may come in, who hears of comings and
goings."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar, cast

from ..protocol.connection import Connection
from ..protocol.ids import PeerId
from ..protocol.limits import Kind, OverLimit, Resource, Scope, WindowBudget
from ..protocol.multiaddr import Multiaddr
from ..protocol.noise import StaticKey
from ..protocol.yamux import WINDOW_BUDGET
from ..protocol.yamux_memory import HeldMemory
from .clock import Clock
from .gate import Gate, Ticket
from .limits import HostLimits
from .transport.base import ConnectionClosed
from .transport.life import Life
from .transport.stream import MuxedStream
from .transport.wire import Wire, WireEvents
from .trim import Candidate, Stranger, Trimmer, giving_way, idle

SILENT_GRACE_S: Final = 0.1
"""A stranger's first bytes come right behind its connection; one without them soon gives way to a newcomer."""
FIRST_FLIGHT: Final = 28
"""Bytes that every dialer sends at once: multistream's header and its proposal of /noise."""

BLAMED: Final = frozenset(("chores", "protocol-error", "stalled"))
"""Whoever is cut for one of these waits before it may come again."""

if TYPE_CHECKING:
    from .transport.trace import TraceFolder

PeerCallback = Callable[[PeerId], None]
T = TypeVar("T")


class Wires:
    """Every wire of one host, from its first byte to its end."""

    def __init__(
        self,
        static: StaticKey,
        *,
        clock: Clock,
        limits: HostLimits,
        gate: Gate,
        refused: Counter[str],
        on_stream: Callable[[MuxedStream], None],
    ) -> None:
        self.limits = limits
        self.on_connect: list[PeerCallback] = []
        """Told when the first wire to a peer opens."""
        self.on_disconnect: list[PeerCallback] = []
        """Told when the last wire to a peer is gone."""
        self.on_open: list[Callable[[Wire], None]] = []
        """Told of every wire that opens."""
        self.on_close: list[Callable[[Wire], None]] = []
        """Told of every wire that ends, opened or not."""
        self.traces: TraceFolder | None = None
        """Where every connection made from now on is traced."""
        self.protectors: list[Callable[[PeerId], bool]] = []
        """Who says which peers' idle wires are to be kept, besides protect()."""
        self.dial_turns = asyncio.Semaphore(limits.dials)
        """To be held while dialing one address."""
        self._static = static
        self._me = static.identity.peer_id
        self._clock = clock
        self._gate = gate
        self._refused = refused
        self._held = HeldMemory()
        self._on_stream = on_stream
        self._tickets: dict[Wire, Ticket] = {}  # of every wire that is not closed
        self._handshaking: dict[Wire, asyncio.Future[None] | None] = {}
        self._open: dict[PeerId, list[Wire]] = {}
        self._peer_of: dict[Wire, PeerId] = {}  # of every open wire
        self._tags: dict[PeerId, set[str]] = {}
        self._trimmer: Trimmer[Wire] = Trimmer(
            self._candidates,
            self._trim,
            now=clock.now,
            high_water=limits.high_water,
            low_water=limits.low_water,
            grace_s=limits.grace_s,
        )

    def __iter__(self) -> Iterator[Wire]:
        """Every open wire."""
        return iter(tuple(self._peer_of))

    def peers(self) -> tuple[PeerId, ...]:
        """Peers with an open wire."""
        return tuple(self._open)

    def to(self, peer: PeerId) -> tuple[Wire, ...]:
        """The wires to a peer, oldest first."""
        return tuple(self._open.get(peer, ()))

    def has_latency(self, peer: PeerId) -> bool:
        """Whether a wire is open that is not for bulk."""
        return any(wire.is_open and not wire.bulk for wire in self.to(peer))

    def direct(self, peer: PeerId) -> Wire | None:
        """A wire that no relay carries; for bulk only if there is no other."""
        found = (wire for wire in self.to(peer) if wire.is_open and not wire.relayed)
        return min(found, key=lambda wire: wire.bulk, default=None)

    def best(self, peer: PeerId) -> Wire:
        """The wire for a new stream: the oldest that is good, the same one every time; for bulk, or over a relay, only
        if there is no other.

        Raises ConnectionClosed, or OverLimit when we have too many streams with the peer.
        """
        limit = self.limits.streams_out_per_peer
        if sum(wire.streams_out for wire in self.to(peer)) >= limit:
            raise OverLimit(Scope(Kind.PEER, peer), Resource.STREAMS_OUT, limit)
        found = (wire for wire in self.to(peer) if wire.is_open)
        wire = min(found, key=lambda wire: (wire.relayed, wire.bulk), default=None)
        if wire is None:
            raise ConnectionClosed(f"the connection to {peer.short} was lost right after it opened")
        return wire

    # -- making them --

    def dialing(self, address: Multiaddr, expected: PeerId | None) -> Wire:
        """A wire for a link we make; over a limit, one that is dead before it starts."""
        try:
            ticket = self._gate.admit_dial(expected)
        except OverLimit as exc:
            self._refused[exc.reason] += 1
            wire = self._make(address, outbound=True, expected=expected, ticket=None)
            wire.abort(str(exc))
            return wire
        return self._make(address, outbound=True, expected=expected, ticket=ticket)

    async def opened(self, wire: Wire) -> None:
        """Wait for the end of a handshake. Raises ConnectionClosed with the cause when it fails."""
        if not wire.closed and not wire.is_open:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._handshaking[wire] = waiter
            await waiter
        wire.raise_if_closed()

    def accept(self, address: Multiaddr) -> asyncio.BufferedProtocol:
        """A wire for a link that came in; over a limit, what ends the link at once, at no cost."""
        try:
            ticket = self._admit(address)
        except OverLimit as exc:
            self._refused[exc.reason] += 1
            return _Refusal()
        return self._make(address, outbound=False, expected=None, ticket=ticket)

    def _admit(self, address: Multiaddr) -> Ticket:
        try:
            return self._gate.admit(address)
        except OverLimit as exc:
            wire = self._giving_way(exc, address)
            if wire is None:
                raise
        wire.cut_for = "gave-way"
        wire.abort("too many handshakes, and this one was slow")
        return self._gate.admit(address)

    def _giving_way(self, full: OverLimit, address: Multiaddr) -> Wire | None:
        """The handshake that ends for a newcomer, if handshakes are what is too many."""
        if full.scope.kind not in (Kind.TRANSIENT, Kind.ALLOWED_TRANSIENT):
            return None
        strangers = [
            Stranger(wire, ticket.subnet, wire.opened_at + self._grace_of(wire))
            for wire in self._handshaking
            if not wire.outbound and full.scope in (ticket := self._tickets[wire]).reservation.scopes
        ]
        return giving_way(
            strangers,
            group=self._gate.subnet(address),
            now=self._clock.now(),
        )

    def _grace_of(self, stranger: Wire) -> float:
        """How long it keeps its place for certain: less while it has not said what a dialer says at once."""
        grace_s = self.limits.handshake_grace_s
        return grace_s if stranger.bytes_in >= FIRST_FLIGHT else min(grace_s, SILENT_GRACE_S)

    def _make(self, address: Multiaddr, *, outbound: bool, expected: PeerId | None, ticket: Ticket | None) -> Wire:
        budget = WindowBudget(ticket.reservation, WINDOW_BUDGET) if ticket is not None else None
        trace = self.traces.begin(address, outbound=outbound) if self.traces is not None else None
        kind = Connection if trace is None else trace.connection
        wire = Wire(
            kind(self._static, initiator=outbound, expected=expected, node_budget=budget),
            address=address,
            outbound=outbound,
            clock=self._clock,
            events=WireEvents(opened=self._opened, stream=self._on_stream, closed=self._closed, shed=self._count),
            handshake_timeout_s=self.limits.handshake_timeout_s,
            life=Life(self._clock, trace),
        )
        wire.session.share(self._held)
        if ticket is not None:
            self._tickets[wire] = ticket
            self._handshaking[wire] = None
        return wire

    # -- their life --

    def _opened(self, wire: Wire) -> None:
        waiter = self._handshaking.pop(wire, None)
        if self._may_stay(wire):
            self._peer_of[wire] = wire.remote
            group = self._open.setdefault(wire.remote, [])
            group.append(wire)
            _resolve(waiter)
            if len(group) == 1:
                _tell(self.on_connect, wire.remote)
            _tell(self.on_open, wire)
            self._trimmer.check(len(self._peer_of))
        else:
            _resolve(waiter)

    def _may_stay(self, wire: Wire) -> bool:
        """Its identity is known: find room for it there, too, or end it."""
        if wire.remote == self._me:
            wire.abort("this address leads back to this node itself")
            return False
        ticket = self._tickets[wire]
        try:
            try:
                self._gate.prove(ticket, wire.remote)
            except OverLimit as exc:
                if not self._end_spare(exc, wire.remote):
                    raise
                self._gate.prove(ticket, wire.remote)
        except OverLimit as exc:
            wire.cut_for = exc.reason
            wire.close(str(exc))
            return False
        return True

    def _count(self, reason: str) -> None:
        self._refused[reason] += 1

    def _end_spare(self, full: OverLimit, peer: PeerId) -> bool:
        """A peer has all the connections it may: end an idle one, for a peer that lost its network makes new ones."""
        if full.scope.kind is not Kind.PEER:
            return False
        victims = idle(map(self._candidate, self.to(peer)), now=self._clock.now(), grace_s=0, keep_protected=False)
        for victim in victims[:1]:
            self._trim(victim.connection)
        return bool(victims)

    def _closed(self, wire: Wire) -> None:
        _resolve(self._handshaking.pop(wire, None))
        ticket = self._tickets.pop(wire, None)
        if ticket is not None:
            ticket.reservation.release()
        if wire.cut_for:
            self._refused[wire.cut_for] += 1
            if wire.cut_for in BLAMED and not wire.outbound:
                self._gate.blame(wire.address)
        _tell(self.on_close, wire)
        peer = self._peer_of.pop(wire, None)
        if peer is None:
            return
        self._open[peer].remove(wire)
        if not self._open[peer]:
            del self._open[peer]
            _tell(self.on_disconnect, peer)

    # -- too many of them --

    def protect(self, peer: PeerId, tag: str) -> None:
        """Keep the peer's wires though they are idle, until each tag is taken back."""
        self._tags.setdefault(peer, set()).add(tag)

    def unprotect(self, peer: PeerId, tag: str) -> None:
        """Take one tag back."""
        tags = self._tags.get(peer, set())
        tags.discard(tag)
        if not tags:
            self._tags.pop(peer, None)

    def protected_by(self, peer: PeerId) -> tuple[str, ...]:
        """Why the peer's idle wires are kept: the tags of protect(), and "wanted" when a protector names it."""
        wanted = ("wanted",) if any(wants(peer) for wants in self.protectors) else ()
        return (*sorted(self._tags.get(peer, ())), *wanted)

    def _candidates(self) -> list[Candidate[Wire]]:
        return [self._candidate(wire) for wire in self]

    def _candidate(self, wire: Wire) -> Candidate[Wire]:
        peer = wire.remote
        return Candidate(
            connection=wire,
            peer=peer,
            opened_at=wire.opened_at,
            used_at=wire.used_at,
            streams=wire.stream_count,
            protected=bool(self.protected_by(peer)),
        )

    def _trim(self, wire: Wire) -> None:
        wire.cut_for = "trimmed"
        wire.close("idle, and there are too many connections")

    async def aclose(self) -> None:
        """Cut the handshakes, say good-bye on every open wire."""
        self._trimmer.aclose()
        for wire in list(self._handshaking):
            wire.abort("the host is closing")
        async with asyncio.TaskGroup() as group:
            for wire in self:
                group.create_task(wire.aclose())


class _Refusal(asyncio.BufferedProtocol):
    """Ends a link before a byte of it was read."""

    def __init__(self) -> None:
        self._buffer = bytearray(1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).abort()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer


def _tell(callbacks: list[Callable[[T], None]], subject: T) -> None:
    for callback in tuple(callbacks):
        callback(subject)


def _resolve(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
