"""The host: one identity, its connections, the protocols it speaks. What every other part of the node
builds on.

    async with Host(key, listen=[Multiaddr.parse("/ip4/0.0.0.0/tcp/0")]) as host:
        host.handle("/swarmnode/info/1.0.0", answer)
        stream = await host.open_stream(peer, "/swarmnode/info/1.0.0", addrs=[address])

Connections are shared: however many callers dial a peer at once, one dial happens, and all streams to it
use one connection. A facade over wires.py (connections), dialer.py, handlers.py (inbound streams) and
basics.py (identify and ping).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from ..protocol import identify, ping
from ..protocol.errors import ConfigError, DeadlineExceeded, PeerUnreachable
from ..protocol.ids import PeerId, PrivateKey
from ..protocol.limits import Limiter
from ..protocol.multiaddr import Multiaddr
from ..protocol.noise import StaticKey
from ..protocol.trace import clean
from .basics import Basics
from .bulk import Bulk
from .clock import Clock
from .dialer import Dialer
from .gate import Gate
from .handlers import MAX_STREAMS_PER_PEER, Handler, Handlers
from .journal import DialFailure, EndedConnection, Journal
from .limits import AllowList, HostLimits, Rules, descriptors
from .metrics import ConnectionMetrics, HostMetrics, of
from .peerbook import PeerBook
from .relay.circuits import Circuits
from .tasks import Supervisor
from .transport.base import Listener, ProtocolUnsupported, Stream, Transport
from .transport.stream import MuxedStream
from .transport.tcp import TcpTransport, expand
from .transport.wire import Wire
from .wires import PeerCallback, Wires

__all__ = ["DIAL_TIMEOUT_S", "ConnectionInfo", "Handler", "Host", "HostLimits"]

DIAL_TIMEOUT_S: Final = 10.0
"""Default deadline of connect() and open_stream()."""
BESIDE_WORK: Final = frozenset((identify.PROTOCOL, identify.PUSH_PROTOCOL, ping.PROTOCOL))
"""What may go over a connection whose relay passes hardly anything on."""
ADDRS_FOR_S: Final = 10.0
"""How long the machine's own addresses, behind a wildcard, are believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionInfo:
    """A snapshot of one connection."""

    peer: PeerId
    address: Multiaddr
    """The remote's address."""
    outbound: bool
    """We dialed it."""
    bulk: bool
    """Made for throughput, beside another one for latency."""
    opened_at: float
    """On the host's monotonic clock."""
    rtt_s: float | None
    """Smoothed round trip, None before the first keepalive came back."""
    streams: int
    bytes_in: int
    bytes_out: int
    agent: str
    """The peer's software, from identify: printable, at most 128 characters; empty before."""
    age_s: float
    relayed: bool
    """Another peer carries it, to judge by the address."""
    rtt_min_s: float | None
    """Least round trip so far: the path without queues."""
    rtt_last_s: float | None
    handshake_s: float
    """From the link to the peer's proven identity."""
    early_muxer: bool
    """The muxer was agreed inside the Noise handshake, a round trip earlier."""
    protocols: tuple[tuple[str, int], ...]
    """Open streams by protocol, both ways; "" for those that have none yet."""
    protected_by: tuple[str, ...]
    """Why it is kept when idle connections are closed: tags of protect(), "wanted" for protect_if()."""
    metrics: ConnectionMetrics
    """What it has carried so far."""


class Host:
    """A libp2p host. Use as an async context manager; everything it started ends with it."""

    def __init__(
        self,
        key: PrivateKey,
        *,
        listen: Sequence[Multiaddr] = (),
        transports: Sequence[Transport] | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        limits: HostLimits | None = None,
        allow: Sequence[str] = (),
        agent: str = "swarmnode",
        trace_dir: Path | None = None,
    ) -> None:
        self.key = key
        self.peer_id = key.peer_id
        self.clock = clock or Clock()
        self.rng = rng or random.Random(key.seed)
        self.limits = (limits or HostLimits()).fitted(descriptors())
        self.agent = agent
        self.book = PeerBook(self.clock.now)
        """What peers claim about themselves."""
        self.refused: Counter[str] = Counter()
        """Connections and streams turned away or cut, by the reasons of docs/spec/transport.md."""
        rules = Rules(self.limits)
        self.limiter = Limiter(rules)
        """What is in use, by scope."""
        self._listen = tuple(listen)
        self._transports = tuple(transports) if transports is not None else (TcpTransport(),)
        self._listeners: list[Listener] = []
        self._addrs: tuple[Multiaddr, ...] = ()
        self._addrs_until = 0.0
        self._advertised: dict[str, tuple[Multiaddr, ...]] = {}
        self._tasks = Supervisor("host")
        self._journal = Journal(self.clock)
        self._handlers = Handlers(
            self._tasks,
            limiter=self.limiter,
            rules=rules,
            refused=self.refused,
            negotiation_timeout_s=self.limits.handshake_timeout_s,
        )
        self._wires = Wires(
            StaticKey.create(key),
            clock=self.clock,
            limits=self.limits,
            gate=Gate(self.limiter, self.limits, AllowList(allow), now=self.clock.now),
            refused=self.refused,
            on_stream=self._handlers.take,
        )
        self._wires.on_disconnect.append(self.book.left)
        self.circuits = Circuits(self, self._wires, self._tasks)
        """Connections through relays, and our places at them."""
        self._transports = (*self._transports, self.circuits)
        self._dialer = Dialer(self._wires, self.book, self._tasks, self._transports, self._journal)
        self._basics = Basics(self, self._tasks)
        if trace_dir is not None:
            from .transport.trace import TraceFolder  # most nodes never trace: they need not hold its code

            self._wires.traces = TraceFolder(trace_dir, self.clock, self.peer_id)
        self._wires.on_open.append(self._journal.opened)
        self._wires.on_close.append(self._journal.closed)
        self._wires.on_open.append(self._basics.connected)
        self._wires.on_close.append(self._basics.disconnected)
        self._basics.register()
        self._bulk = Bulk(self, self._wires, self._dialer, self._tasks)
        self._bulk.register()

    # -- life --

    async def __aenter__(self) -> Host:
        await self._tasks.__aenter__()
        try:
            for address in self._listen:
                await self.listen(address)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop listening, cancel every handler, say good-bye on every connection. Safe to call twice."""
        for listener in self._listeners:
            await listener.aclose()
        self._listeners.clear()
        self._addrs_until = 0.0
        await self._tasks.aclose()
        await self._wires.aclose()
        if self._wires.traces is not None:
            await self._wires.traces.aclose()

    async def listen(self, address: Multiaddr) -> Multiaddr:
        """Listen on one more address; returns the one really bound. Raises ConfigError."""
        address = address.without_peer()
        transport = next((t for t in self._transports if t.can_listen(address)), None)
        if transport is None:
            raise ConfigError(f"cannot listen on {address}: use /ip4/<ip>/tcp/<port> or /ip6/<ip>/tcp/<port>")
        listener = await transport.listen(address, self._wires.accept)
        self._listeners.append(listener)
        self.readdress()
        return listener.address

    @property
    def bound_addrs(self) -> tuple[Multiaddr, ...]:
        """Addresses we listen on ourselves, wildcards expanded, without /p2p."""
        return tuple(dict.fromkeys(real for listener in self._listeners for real in expand(listener.address)))

    @property
    def listen_addrs(self) -> tuple[Multiaddr, ...]:
        """Addresses others can dial, each ending in our /p2p/<id>: those advertised, then wildcards expanded,
        relayed ones last."""
        now = self.clock.now()
        if now >= self._addrs_until:  # asking the kernel for its routes is not for every message
            found = [addr for addrs in self._advertised.values() for addr in addrs]
            found += self.bound_addrs
            found.sort(key=lambda addr: addr.is_relayed)
            self._addrs = tuple(dict.fromkeys(address.with_peer(self.peer_id) for address in found))
            self._addrs_until = now + ADDRS_FOR_S
        return self._addrs

    def advertise(self, source: str, addrs: Sequence[Multiaddr]) -> None:
        """Announce these addresses besides those we listen on, such as a router's; they replace the former."""
        if self._advertised.get(source, ()) != tuple(addrs):
            self._advertised[source] = tuple(addrs)
            self.readdress()

    def readdress(self) -> None:
        """Our addresses may be others now: look again, and tell everybody connected."""
        self._addrs_until = 0.0
        self._basics.changed()

    @property
    def observed_addrs(self) -> tuple[Multiaddr, ...]:
        """Our addresses as peers see them, most often reported first."""
        return self._basics.observed_addrs()

    def observations(self) -> tuple[tuple[Wire, Multiaddr], ...]:
        """Each direct connection whose peer told where it sees us, and where."""
        return tuple((wire, seen) for wire, seen in self._basics.observations() if not wire.address.is_relayed)

    def dial_from_listener(self, wanted: Callable[[Multiaddr], bool]) -> None:
        """Dial the addresses that `wanted` names from the port that others dial."""
        self._dialer.from_listener = wanted

    async def dial_anew(self, peer: PeerId, address: Multiaddr) -> Wire:
        """One more connection to a peer, at exactly this address, from a port of its own. The caller closes it.

        Raises PeerUnreachable.
        """
        return await self._dialer.dial_bulk(peer, [address])

    @property
    def wires(self) -> Sequence[Wire]:
        """Every open connection itself."""
        return tuple(self._wires)

    # -- protocols --

    def handle(self, protocol: str, handler: Handler, *, max_streams_per_peer: int = MAX_STREAMS_PER_PEER) -> None:
        """Answer a protocol: `handler(stream)` runs in a task of its own per stream.

        When it returns the stream is closed, when it raises or is cancelled the stream is reset. Connection
        errors and RemoteProtocolError end it quietly; anything else is logged as our bug. A handler learns
        of the other side's death by reading or writing: it is not cancelled, for it may have things to put
        in order.
        """
        self._handlers.add(protocol, handler, max_streams_per_peer)
        self._basics.changed()

    def unhandle(self, protocol: str) -> None:
        """Stop answering a protocol; streams that run go on."""
        self._handlers.remove(protocol)
        self._basics.changed()

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols we answer."""
        return self._handlers.protocols

    # -- peers --

    def add_addrs(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        """Remember where a peer may be dialed."""
        self.book.add(peer, addrs)

    def addrs(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Known addresses of a peer, the best first (see PeerBook), without /p2p."""
        return self.book.get(peer).addrs

    def peers(self) -> tuple[PeerId, ...]:
        """Peers with an open connection."""
        return self._wires.peers()

    def is_connected(self, peer: PeerId) -> bool:
        """Whether a connection to the peer is open."""
        return any(wire.is_open for wire in self._wires.to(peer))

    def direct_wire(self, peer: PeerId) -> Wire | None:
        """The connection to a peer that no relay carries, if there is one."""
        return self._wires.direct(peer)

    def on_connect(self, callback: PeerCallback) -> Callable[[], None]:
        """Hear when the first connection to a peer opens; returns the unsubscription."""
        return _subscribe(self._wires.on_connect, callback)

    def on_disconnect(self, callback: PeerCallback) -> Callable[[], None]:
        """Hear when the last connection to a peer is gone; returns the unsubscription."""
        return _subscribe(self._wires.on_disconnect, callback)

    def on_identify(self, callback: PeerCallback) -> Callable[[], None]:
        """Hear when a peer has told its protocols and addresses (see `book`); returns the unsubscription."""
        return _subscribe(self._basics.listeners, callback)

    def connections(self) -> Sequence[ConnectionInfo]:
        """A snapshot of every open connection, in order of their peers' ids and then of age."""
        wires = sorted(self._wires, key=lambda wire: (wire.remote, wire.opened_at))
        return [self._info(wire) for wire in wires]

    def _info(self, wire: Wire) -> ConnectionInfo:
        return ConnectionInfo(
            peer=wire.remote,
            address=wire.address,
            outbound=wire.outbound,
            bulk=wire.bulk,
            opened_at=wire.opened_at,
            age_s=self.clock.now() - wire.opened_at,
            relayed=wire.relayed,
            rtt_s=wire.rtt_s,
            rtt_min_s=wire.life.rtt_min_s,
            rtt_last_s=wire.life.rtt_last_s,
            handshake_s=wire.life.handshake_s or 0.0,
            early_muxer=wire.life.early_muxer,
            streams=wire.stream_count,
            protocols=tuple(sorted(Counter(stream.protocol for stream in wire.session.streams()).items())),
            bytes_in=wire.bytes_in,
            bytes_out=wire.bytes_out,
            agent=clean(self.book.get(wire.remote).agent),
            protected_by=self._wires.protected_by(wire.remote),
            metrics=of((wire,)),
        )

    def metrics(self) -> HostMetrics:
        """Every counter of the transport in one snapshot; cheap enough to be asked every second."""
        return self._journal.metrics(self._wires, self.refused)

    def ended_connections(self) -> Sequence[EndedConnection]:
        """The last connections that ended, oldest first; of strangers who never proved an identity, too."""
        return sorted((*self._journal.ended, *self._journal.strangers), key=lambda ended: ended.ended_at)

    def dial_failures(self) -> Sequence[DialFailure]:
        """The last addresses that were tried in vain, oldest first."""
        return tuple(self._journal.dial_failures)

    def rtt(self, peer: PeerId) -> float | None:
        """Smoothed round trip in seconds, None when not measured."""
        return min((wire.rtt_s for wire in self._wires.to(peer) if wire.rtt_s is not None), default=None)

    async def ping(self, peer: PeerId, *, timeout_s: float = DIAL_TIMEOUT_S) -> float:
        """Round trip to a peer's application in seconds; connects first if need be.

        Raises PeerUnreachable, ProtocolUnsupported or DeadlineExceeded.
        """
        return await self._basics.ping(peer, timeout_s)

    def address_of(self, stream: Stream) -> Multiaddr | None:
        """The remote address of the connection a stream runs on; None inside the process."""
        return stream.connection_address if isinstance(stream, MuxedStream) else None

    def protect(self, peer: PeerId, tag: str) -> None:
        """Keep connections to the peer when idle ones are closed for being too many; until unprotect()."""
        self._wires.protect(peer, tag)

    def unprotect(self, peer: PeerId, tag: str) -> None:
        """Take one tag back; a peer with others stays protected."""
        self._wires.unprotect(peer, tag)

    def protect_if(self, wanted: Callable[[PeerId], bool]) -> Callable[[], None]:
        """Keep connections to all peers that `wanted` names at that time; returns the way to end it."""
        self._wires.protectors.append(wanted)
        return lambda: self._wires.protectors.remove(wanted)

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer."""
        for wire in self._wires.to(peer):
            await wire.aclose()

    # -- connections and streams --

    async def connect(
        self,
        peer: PeerId | None,
        addrs: Sequence[Multiaddr] = (),
        *,
        timeout_s: float = DIAL_TIMEOUT_S,
        direct: bool = False,
    ) -> PeerId:
        """Have a connection to `peer` (None: to whoever is at `addrs`), reusing an open one; returns its id.

        Known addresses are tried besides `addrs`. `direct`: one over a relay will not do. Raises PeerUnreachable naming
        each address and its cause.
        """
        if peer is None:
            named = {address.peer_id for address in addrs}
            peer = named.pop() if len(named) == 1 else None
        if peer is None:
            return await self._dialer.dial(None, addrs, timeout_s, direct=direct)
        if peer == self.peer_id:
            raise PeerUnreachable(f"{peer} is this node itself; give the address of another one")
        if self._wires.direct(peer) if direct else self._wires.has_latency(peer):
            return peer
        try:
            return await self._dialer.connect(peer, addrs, timeout_s, direct=direct)
        except PeerUnreachable:
            if self.is_connected(peer) and not direct:  # by connections for bulk only, and those must do
                return peer
            raise

    async def open_stream(
        self,
        peer: PeerId,
        protocol: str,
        *,
        addrs: Sequence[Multiaddr] = (),
        timeout_s: float = DIAL_TIMEOUT_S,
        bulk: bool = False,
    ) -> Stream:
        """A stream to the peer's handler of `protocol`, connecting first if need be.

        `bulk`: much will flow, and nobody waits for single bytes. On a long path such streams get connections of
        their own; keep bulk_lanes() of them open to fill the line.
        A peer known to speak the protocol costs no round trip: the proposal travels with the first bytes
        written. To our own peer id the stream stays inside the process. Raises PeerUnreachable,
        ProtocolUnsupported, DeadlineExceeded, or ConnectionClosed when the connection breaks meanwhile.
        """
        if peer == self.peer_id:
            return self._handlers.open_loopback(peer, protocol)
        try:
            async with asyncio.timeout(timeout_s):
                await self.connect(peer, addrs, timeout_s=timeout_s)
                if bulk:
                    if (lane := await self._bulk.wire(peer)) is not None:
                        return await self.open_on(lane, protocol)
                    await self.connect(peer, addrs, timeout_s=timeout_s)  # a full peer may have dropped that one
                return await self.open_on(_fit(self._wires.best(peer), protocol), protocol)
        except TimeoutError:
            raise DeadlineExceeded(f"{peer} did not answer for {protocol} within {timeout_s:g} s") from None

    def bulk_lanes(self, peer: PeerId) -> int:
        """How many bulk streams at once fill the line to a connected peer, as far as it has shown what it can.

        1 at first and where more would not help; ask again while data flows.
        """
        return max(1, self._bulk.lanes(peer))

    async def open_on(self, wire: Wire, protocol: str) -> MuxedStream:
        """open_stream() on one particular connection (identify belongs to a connection, not to a peer)."""
        stream = await wire.open()
        stream.propose(protocol)
        if protocol in self.book.get(stream.remote).protocols:
            return stream
        try:
            agreed = await stream.agreed()
        except BaseException:
            stream.reset()
            raise
        if not agreed:
            await stream.close()
            raise ProtocolUnsupported(f"{stream.remote} does not speak {protocol}; it may be an older version")
        return stream


def _fit(wire: Wire, protocol: str) -> Wire:
    """The wire, if the relay that carries it lets pass enough for the protocol. Raises PeerUnreachable."""
    if wire.hindered and protocol not in BESIDE_WORK:
        raise PeerUnreachable(
            f"{wire.remote} is connected over a relay that passes little on ({wire.limit}): too little for {protocol}; "
            "use a relay without such limits, or make one end reachable"
        )
    return wire


def _subscribe(callbacks: list[PeerCallback], callback: PeerCallback) -> Callable[[], None]:
    callbacks.append(callback)

    def unsubscribe() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return unsubscribe
