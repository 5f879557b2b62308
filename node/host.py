"""The host: one identity, its connections, the protocols it speaks. What every other part of the node
builds on.

    async with Host(key, listen=[Multiaddr.parse("/ip4/0.0.0.0/tcp/0")]) as host:
        host.handle("/swarmnode/info/1.0.0", answer)
        stream = await host.open_stream(peer, "/swarmnode/info/1.0.0", addrs=[address])

Connections are shared: however many callers dial a peer at once, one dial happens, and all streams to it
use one connection. The base protocols (identify, ping) live in node/basics.py and use nothing but this
public surface.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Final

from ..protocol import multistream
from ..protocol.connection import Connection
from ..protocol.errors import ConfigError, DeadlineExceeded, PeerUnreachable, RemoteProtocolError
from ..protocol.ids import PeerId, PrivateKey
from ..protocol.multiaddr import Multiaddr
from ..protocol.noise import StaticKey
from ..protocol.yamux import Budget
from .basics import Basics
from .clock import Clock
from .dial import DialFailed, Race, order
from .peerbook import PeerBook
from .tasks import Supervisor
from .transport import loopback
from .transport.base import ConnectionClosed, Listener, ProtocolUnsupported, Stream, Transport
from .transport.stream import MuxedStream
from .transport.tcp import TcpTransport, expand
from .transport.wire import HANDSHAKE_TIMEOUT_S, Wire, WireEvents

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S: Final = 10.0
"""Default deadline of connect() and open_stream()."""
MAX_DIALS: Final = 256
"""Peers being dialed at once."""
MAX_STREAMS_PER_PEER: Final = 256
"""Default cap on streams that one peer may have open to one protocol."""
_CHUNK: Final = 1024

Handler = Callable[[Stream], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """What strangers may cost us. Connections over a limit are cut before any cryptography is done."""

    connections: int = 1024
    """Open connections, dialed and accepted."""
    connections_per_ip: int = 32
    """Accepted connections from one IP address; loopback is exempt."""
    handshakes: int = 128
    """Accepted connections that have not proven an identity yet."""
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    """How long a stranger may take to prove it."""
    window_bytes: int = 512 * 1024 * 1024
    """Receive windows beyond the protocol's minimum, over all connections."""

    def __post_init__(self) -> None:
        for name in ("connections", "connections_per_ip", "handshakes", "handshake_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"HostLimits.{name} is {getattr(self, name)}: it must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionInfo:
    """A snapshot of one connection."""

    peer: PeerId
    address: Multiaddr
    """The remote's address."""
    outbound: bool
    """We dialed it."""
    opened_at: float
    """On the host's monotonic clock."""
    rtt_s: float | None
    """Smoothed round trip, None before the first keepalive came back."""
    streams: int
    bytes_in: int
    bytes_out: int
    agent: str
    """The peer's software, from identify; empty before."""


@dataclass(slots=True)
class _Registered:
    handler: Handler
    max_per_peer: int


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
        agent: str = "swarmnode",
    ) -> None:
        self.key = key
        self.peer_id = key.peer_id
        self.clock = clock or Clock()
        self.rng = rng or random.Random(key.seed)
        self.limits = limits or HostLimits()
        self.agent = agent
        self.book = PeerBook()
        """What peers claim about themselves."""
        self.refused: Counter[str] = Counter()
        """Connections and streams turned away, by reason."""
        self._listen = tuple(listen)
        self._transports = tuple(transports) if transports is not None else (TcpTransport(),)
        self._static = StaticKey.create(key)
        self._budget = Budget(self.limits.window_bytes)
        self._tasks = Supervisor("host")
        self._listeners: list[Listener] = []
        self._handlers: dict[str, _Registered] = {}
        self._wires: dict[PeerId, list[Wire]] = {}
        self._handshaking: dict[Wire, asyncio.Future[None] | None] = {}
        self._per_ip: Counter[str] = Counter()
        self._open_streams: Counter[tuple[PeerId, str]] = Counter()
        self._dials: dict[PeerId, asyncio.Future[PeerId]] = {}
        self._on_disconnect: list[Callable[[PeerId], None]] = []
        self._on_connect: list[Callable[[PeerId], None]] = []
        self._basics = Basics(self, self._tasks)
        self._basics.register()

    # -- life
    # ---------------------------------------------------------------------------------------------------

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
        await self._tasks.aclose()
        for wire in list(self._handshaking):
            wire.abort("the host is closing")
        wires = [wire for group in self._wires.values() for wire in group]
        async with asyncio.TaskGroup() as group:
            for wire in wires:
                group.create_task(wire.aclose())

    async def listen(self, address: Multiaddr) -> Multiaddr:
        """Listen on one more address; returns the one really bound. Raises ConfigError."""
        address = address.without_peer()
        transport = next((t for t in self._transports if t.can_listen(address)), None)
        if transport is None:
            raise ConfigError(f"cannot listen on {address}: use /ip4/<ip>/tcp/<port> or /ip6/<ip>/tcp/<port>")
        listener = await transport.listen(address, self._accept)
        self._listeners.append(listener)
        return listener.address

    @property
    def listen_addrs(self) -> tuple[Multiaddr, ...]:
        """Addresses others can dial, wildcards expanded, each ending in our /p2p/<id>."""
        found = [real for listener in self._listeners for real in expand(listener.address)]
        return tuple(dict.fromkeys(address.with_peer(self.peer_id) for address in found))

    @property
    def observed_addrs(self) -> tuple[Multiaddr, ...]:
        """Our addresses as peers see them, most often reported first."""
        return self._basics.observed_addrs()

    # -- protocols
    # ----------------------------------------------------------------------------------------------

    def handle(self, protocol: str, handler: Handler, *, max_streams_per_peer: int = MAX_STREAMS_PER_PEER) -> None:
        """Answer a protocol: `handler(stream)` runs in a task of its own per stream.

        When it returns the stream is closed, when it raises or is cancelled the stream is reset. Connection
        errors and RemoteProtocolError end it quietly; anything else is logged as our bug.
        """
        self._handlers[protocol] = _Registered(handler, max_streams_per_peer)
        self._basics.changed()

    def unhandle(self, protocol: str) -> None:
        """Stop answering a protocol; streams that run go on."""
        self._handlers.pop(protocol, None)
        self._basics.changed()

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols we answer."""
        return tuple(self._handlers)

    # -- peers
    # --------------------------------------------------------------------------------------------------

    def add_addrs(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        """Remember where a peer may be dialed."""
        self.book.add(peer, addrs)

    def addrs(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        """Known addresses of a peer, newest first, without /p2p."""
        return self.book.get(peer).addrs

    def peers(self) -> tuple[PeerId, ...]:
        """Peers with an open connection."""
        return tuple(self._wires)

    def is_connected(self, peer: PeerId) -> bool:
        """Whether a connection to the peer is open."""
        return any(wire.is_open for wire in self._wires.get(peer, ()))

    def on_connect(self, callback: Callable[[PeerId], None]) -> Callable[[], None]:
        """Hear when the first connection to a peer opens; returns the unsubscription."""
        return _subscribe(self._on_connect, callback)

    def on_disconnect(self, callback: Callable[[PeerId], None]) -> Callable[[], None]:
        """Hear when the last connection to a peer is gone; returns the unsubscription."""
        return _subscribe(self._on_disconnect, callback)

    def on_identify(self, callback: Callable[[PeerId], None]) -> Callable[[], None]:
        """Hear when a peer has told its protocols and addresses (see `book`); returns the unsubscription."""
        return _subscribe(self._basics.listeners, callback)

    def connections(self) -> Sequence[ConnectionInfo]:
        """A snapshot of every open connection."""
        return [
            ConnectionInfo(
                peer=peer,
                address=wire.address,
                outbound=wire.outbound,
                opened_at=wire.opened_at,
                rtt_s=wire.rtt_s,
                streams=wire.stream_count,
                bytes_in=wire.bytes_in,
                bytes_out=wire.bytes_out,
                agent=self.book.get(peer).agent,
            )
            for peer, wires in self._wires.items()
            for wire in wires
        ]

    def rtt(self, peer: PeerId) -> float | None:
        """Smoothed round trip in seconds, None when not measured."""
        known = [wire.rtt_s for wire in self._wires.get(peer, ()) if wire.rtt_s is not None]
        return min(known, default=None)

    async def ping(self, peer: PeerId, *, timeout_s: float = DIAL_TIMEOUT_S) -> float:
        """Round trip to a peer's application in seconds; connects first if need be.

        Raises PeerUnreachable, ProtocolUnsupported or DeadlineExceeded.
        """
        return await self._basics.ping(peer, timeout_s)

    def address_of(self, stream: Stream) -> Multiaddr | None:
        """The remote address of the connection a stream runs on; None inside the process."""
        return stream.connection_address if isinstance(stream, MuxedStream) else None

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to a peer."""
        for wire in tuple(self._wires.get(peer, ())):
            await wire.aclose()

    # -- dialing
    # ------------------------------------------------------------------------------------------------

    async def connect(
        self, peer: PeerId | None, addrs: Sequence[Multiaddr] = (), *, timeout_s: float = DIAL_TIMEOUT_S
    ) -> PeerId:
        """Have a connection to `peer` (None: to whoever is at `addrs`), reusing an open one; returns its id.

        Known addresses are tried besides `addrs`. Raises PeerUnreachable naming each address and its cause.
        """
        if peer is None:
            named = {address.peer_id for address in addrs}
            if len(named) == 1:
                peer = named.pop()
        if peer is None:
            return await self._bounded_dial(None, addrs, timeout_s)
        if peer == self.peer_id:
            raise PeerUnreachable(f"{peer} is this node itself; give the address of another one")
        if self.is_connected(peer):
            return peer
        pending = self._dials.get(peer)
        if pending is None:  # the dial has this deadline itself, and says more when it passes
            return await asyncio.shield(self._start_dial(peer, addrs, timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(pending)
        except TimeoutError:
            raise PeerUnreachable(f"cannot reach {peer}: no answer within {timeout_s:g} s") from None

    def _start_dial(self, peer: PeerId, addrs: Sequence[Multiaddr], timeout_s: float) -> asyncio.Future[PeerId]:
        """Dial in the background: a caller that gives up must not break it for the others who wait."""
        if len(self._dials) >= MAX_DIALS:
            raise PeerUnreachable(f"cannot reach {peer}: {MAX_DIALS} other peers are being dialed; try again")
        result: asyncio.Future[PeerId] = asyncio.get_running_loop().create_future()
        # when every waiter is gone nobody retrieves the exception, and that is fine
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        task = self._tasks.start(self._dial_for(peer, addrs, timeout_s, result), f"dial {peer.short}")
        task.add_done_callback(lambda _: result.done() or result.cancel())
        self._dials[peer] = result
        return result

    async def _dial_for(
        self, peer: PeerId, addrs: Sequence[Multiaddr], timeout_s: float, result: asyncio.Future[PeerId]
    ) -> None:
        try:
            found = await self._bounded_dial(peer, addrs, timeout_s)
        except PeerUnreachable as exc:
            if not result.done():
                result.set_exception(exc)
        else:
            if not result.done():
                result.set_result(found)
        finally:
            self._dials.pop(peer, None)

    async def _bounded_dial(self, peer: PeerId | None, addrs: Sequence[Multiaddr], timeout_s: float) -> PeerId:
        who = "the peer" if peer is None else str(peer)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._dial(peer, addrs)
        except TimeoutError:
            tried = ", ".join(map(str, addrs)) or "its known addresses"
            raise PeerUnreachable(
                f"cannot reach {who}: no answer from {tried} within {timeout_s:g} s; "
                "check the address, and that the node is running and not behind a firewall"
            ) from None
        except DialFailed as exc:
            raise PeerUnreachable(f"cannot reach {who}: {exc}; check the address and that the node is running") from exc

    async def _dial(self, peer: PeerId | None, addrs: Sequence[Multiaddr]) -> PeerId:
        causes: list[tuple[Multiaddr, str]] = []
        usable: dict[Multiaddr, Transport] = {}
        known = self.book.get(peer).addrs if peer is not None else ()
        for address in dict.fromkeys((*addrs, *known)):
            transport = next((t for t in self._transports if t.can_dial(address)), None)
            if transport is None:
                causes.append((address, "no transport for this kind of address"))
            elif peer is not None and address.peer_id not in (None, peer):
                causes.append((address, "names another peer"))
            else:
                try:
                    found = await transport.resolve(address.without_peer())
                except OSError as exc:
                    causes.append((address, exc.strerror or str(exc)))
                    continue
                usable.update(dict.fromkeys(found, transport))
        if not usable:
            raise (
                DialFailed(causes)
                if causes
                else PeerUnreachable(
                    f"cannot reach {peer or 'a peer'}: no address is known for it; pass one with --peer"
                )
            )
        race = Race(partial(self._attempt, peer, usable), _dispose)
        try:
            wire = await race.run(order(usable))
        except DialFailed as exc:
            raise DialFailed([*exc.causes, *causes]) from exc
        self.book.add(wire.remote, [wire.address])
        return wire.remote

    async def _attempt(self, peer: PeerId | None, transports: dict[Multiaddr, Transport], address: Multiaddr) -> Wire:
        """Dial one address and finish the handshake. Raises OSError or SwarmError."""
        made: list[Wire] = []

        def factory(where: Multiaddr) -> Wire:
            made.append(self._wire(where, outbound=True, expected=peer))
            return made[-1]

        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            await transports[address].dial(address, factory)
            wire = made[0]
            if not wire.closed and not wire.is_open:
                self._handshaking[wire] = opened
                await opened
            wire.raise_if_closed()
        except BaseException:
            for wire in made:
                wire.abort("the dial was given up")
            raise
        return wire

    # -- wires
    # --------------------------------------------------------------------------------------------------

    def _wire(self, address: Multiaddr, *, outbound: bool, expected: PeerId | None = None) -> Wire:
        wire = Wire(
            Connection(self._static, initiator=outbound, expected=expected, node_budget=self._budget),
            address=address,
            outbound=outbound,
            clock=self.clock,
            events=WireEvents(opened=self._opened, stream=self._stream, closed=self._closed),
            handshake_timeout_s=self.limits.handshake_timeout_s,
        )
        self._handshaking[wire] = None
        return wire

    def _accept(self, address: Multiaddr) -> Wire:
        """A link came in. Over a limit it gets a wire that is dead before it starts."""
        wire = self._wire(address, outbound=False)
        reason = self._reason_to_refuse(address)
        if address.value("memory") is None and not address.is_loopback:
            self._per_ip[address.host or ""] += 1
        if reason is not None:
            self.refused[reason] += 1
            wire.abort(reason)
        return wire

    def _reason_to_refuse(self, address: Multiaddr) -> str | None:
        accepted = sum(1 for wire in self._handshaking if not wire.outbound) - 1
        if accepted >= self.limits.handshakes:
            return "too many handshakes"
        if sum(map(len, self._wires.values())) >= self.limits.connections:
            return "too many connections"
        if self._per_ip[address.host or ""] >= self.limits.connections_per_ip:
            return "too many connections from one address"
        return None

    def _opened(self, wire: Wire) -> None:
        waiter = self._handshaking.pop(wire, None)
        if wire.remote == self.peer_id:
            wire.abort("this address leads back to this node itself")
            _resolve(waiter)
            return
        group = self._wires.setdefault(wire.remote, [])
        group.append(wire)
        _resolve(waiter)
        if len(group) == 1:
            for callback in tuple(self._on_connect):
                callback(wire.remote)
        self._basics.connected(wire)

    def _closed(self, wire: Wire) -> None:
        _resolve(self._handshaking.pop(wire, None))
        if not wire.outbound and not wire.address.is_loopback:
            self._per_ip[wire.address.host or ""] -= 1
            self._per_ip += Counter()  # drop zeros
        self._basics.disconnected(wire)
        peer = next((peer for peer, wires in self._wires.items() if wire in wires), None)
        if peer is None:
            return
        self._wires[peer].remove(wire)
        if not self._wires[peer]:
            del self._wires[peer]
            self.book.forget_protocols(peer)
            for callback in tuple(self._on_disconnect):
                callback(peer)

    # -- streams
    # ------------------------------------------------------------------------------------------------

    async def open_stream(
        self,
        peer: PeerId,
        protocol: str,
        *,
        addrs: Sequence[Multiaddr] = (),
        timeout_s: float = DIAL_TIMEOUT_S,
    ) -> Stream:
        """A stream to the peer's handler of `protocol`, connecting first if need be.

        A peer known to speak the protocol costs no round trip: the proposal travels with the first bytes
        written. To our own peer id the stream stays inside the process. Raises PeerUnreachable,
        ProtocolUnsupported, DeadlineExceeded, or ConnectionClosed when the connection breaks meanwhile.
        """
        if peer == self.peer_id:
            return self._open_loopback(protocol)
        try:
            async with asyncio.timeout(timeout_s):
                await self.connect(peer, addrs, timeout_s=timeout_s)
                return await self._negotiated(await self._best_wire(peer).open(), protocol)
        except TimeoutError:
            raise DeadlineExceeded(f"{peer} did not answer for {protocol} within {timeout_s:g} s") from None

    def _best_wire(self, peer: PeerId) -> Wire:
        """The connection for a new stream: the oldest, the same one every time."""
        wire = next((wire for wire in self._wires.get(peer, ()) if wire.is_open), None)
        if wire is None:
            raise ConnectionClosed(f"the connection to {peer.short} was lost right after it opened")
        return wire

    async def open_on(self, wire: Wire, protocol: str) -> MuxedStream:
        """A negotiated stream on one particular connection (identify belongs to a connection, not a peer)."""
        return await self._negotiated(await wire.open(), protocol)

    async def _negotiated(self, stream: MuxedStream, protocol: str) -> MuxedStream:
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

    def _open_loopback(self, protocol: str) -> Stream:
        registered = self._handlers.get(protocol)
        if registered is None:
            raise ProtocolUnsupported(f"this node has no handler for {protocol}")
        ours, theirs = loopback.pair(self.peer_id, protocol)
        self._tasks.start(self._run_handler(theirs, registered), protocol)
        return ours

    def _stream(self, stream: MuxedStream) -> None:
        """The peer opened a stream."""
        self._tasks.start(self._serve(stream), "inbound stream")

    async def _serve(self, stream: MuxedStream) -> None:
        """Negotiate, then hand over to the protocol's handler."""
        try:
            async with asyncio.timeout(self.limits.handshake_timeout_s):
                protocol = await self._agree(stream)
        except (TimeoutError, OSError, EOFError, RemoteProtocolError) as exc:
            logger.debug("no protocol agreed on %r: %s", stream, exc)
            stream.reset()
            return
        except BaseException:
            stream.reset()
            raise
        registered = self._handlers.get(protocol)
        slot = (stream.remote, protocol)
        if registered is None or self._open_streams[slot] >= registered.max_per_peer:
            self.refused[f"too many streams of {protocol}"] += 1
            stream.reset()
            return
        stream.protocol = protocol
        self._open_streams[slot] += 1
        try:
            await self._run_handler(stream, registered)
        finally:
            self._open_streams[slot] -= 1
            if not self._open_streams[slot]:
                del self._open_streams[slot]

    async def _agree(self, stream: MuxedStream) -> str:
        """The responder's half of multistream-select. Raises RemoteProtocolError, OSError or EOFError."""
        responder = multistream.Responder(self._handlers.__contains__)
        while not responder.done:
            data = await stream.read(_CHUNK)
            if not data:
                raise EOFError("the peer ended the stream during the negotiation")
            reply = responder.feed(data)
            if reply:
                await stream.write(reply)
        stream.unread(responder.leftover)
        return responder.protocol or ""

    async def _run_handler(self, stream: Stream, registered: _Registered) -> None:
        finished = False
        try:
            await registered.handler(stream)
            await stream.close()
            finished = True
        except (OSError, EOFError) as exc:
            logger.debug("%r ended: %s", stream, exc)
        except RemoteProtocolError as exc:
            logger.info("%s broke %s: %s", stream.remote.short, stream.protocol, exc)
        finally:
            if not finished:
                stream.reset()


def _subscribe(callbacks: list[Callable[[PeerId], None]], callback: Callable[[PeerId], None]) -> Callable[[], None]:
    callbacks.append(callback)

    def unsubscribe() -> None:
        if callback in callbacks:
            callbacks.remove(callback)

    return unsubscribe


def _resolve(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _dispose(wire: Wire) -> None:
    wire.abort("another address of the peer answered first")
