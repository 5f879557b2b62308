"""One connection to one peer: feeds a byte link into the sans-IO connection and drains it back.

Knows no protocol rule. It receives in place (BufferedProtocol), wakes whoever waits, pulls frames while the
link takes them, and keeps two timers: the handshake's deadline, then the keepalive that measures the round
trip too. When the link breaks, everybody waiting on any of its streams is woken in the same instant:
failover starts here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from ...protocol.connection import Connection
from ...protocol.errors import RemoteProtocolError
from ...protocol.ids import PeerId
from ...protocol.link_rate import SMALL_FRAME, LinkRate
from ...protocol.multiaddr import Multiaddr
from ...protocol.pace import Chores, Pace
from ...protocol.relay import Limit
from ...protocol.yamux import MAX_DATA, MAX_UNACKED, Event, Opened, Pong, Session, WentAway
from ...protocol.yamux_frames import GoAway
from ...protocol.yamux_stream import MuxStream, Part, Readable, Writable
from ..clock import Clock
from .base import ConnectionClosed
from .life import Life
from .stream import MuxedStream
from .tcp import Tunable

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S: Final = 10.0
"""A stranger gets this long to prove who it is."""
KEEPALIVE_S: Final = 15.0
"""Time between keepalive pings; NAT tables forget quiet TCP connections after minutes at the earliest."""
MISSED_PINGS: Final = 2
"""Unanswered keepalives after which the peer is dead; also keepalives without progress on a full link."""
MIN_PROGRESS: Final = 4096
"""Bytes a full link must take between two keepalives, or the peer is only holding our buffers."""
EARLY_STREAMS: Final = 8
"""Streams opened before the peer has said anything on one. js-libp2p takes 10 before its own upgrade is over, and
breaks the connection at the next."""
LINGER_S: Final = 10.0
"""How long a closed stream waits for the peer's end before it is reset."""
CLOSE_GRACE_S: Final = 1.0
"""How long a closing link may flush before it is cut."""
WRITE_BUFFER: Final = 0
"""Bytes the event loop may hold for the link before it pauses us: none, for they would queue in front of
decode frames. What the kernel takes is bounded by TCP_NOTSENT_LOWAT."""
PACE_BYTES: Final = 64 * 1024
"""Bytes received between two looks at what they were good for: at most 5,461 frames."""
_RTT_WEIGHT: Final = 0.25


def _ignore(reason: str) -> None:
    """Nobody counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireEvents:
    """Whom a wire tells about its life. Each callback runs on the loop and must not block."""

    opened: Callable[[Wire], None]
    """The handshake is over, `remote` is known."""
    stream: Callable[[MuxedStream], None]
    """The peer opened a stream; its protocol is not negotiated yet."""
    closed: Callable[[Wire], None]
    """The connection is gone; called once, also when it never opened."""
    shed: Callable[[str], None] = _ignore
    """A stream was reset for the unread bytes it held; the argument is the bound's name."""


class Wire(asyncio.BufferedProtocol):
    """A multiplexed connection. Made by a transport, owned by the host."""

    __slots__ = (
        "_bytes_out_then",
        "_clock",
        "_connection",
        "_descriptor",
        "_early",
        "_events",
        "_handshake_timeout_s",
        "_lingering",
        "_lost",
        "_openers",
        "_pace",
        "_pace_due",
        "_paused",
        "_ping_id",
        "_pings",
        "_pump_due",
        "_rate",
        "_session",
        "_stalls",
        "_timer",
        "_transport",
        "address",
        "bulk",
        "bytes_in",
        "bytes_out",
        "cut_for",
        "error",
        "from_listener",
        "largest_frame",
        "life",
        "limit",
        "loop",
        "opened_at",
        "outbound",
        "readers",
        "rtt_s",
        "used_at",
        "writers",
    )

    def __init__(
        self,
        connection: Connection,
        *,
        address: Multiaddr,
        outbound: bool,
        clock: Clock,
        events: WireEvents,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
        life: Life | None = None,
    ) -> None:
        self.address = address
        """The remote's address, without peer id."""
        self.outbound = outbound
        """We dialed it."""
        self.bulk = False
        """Made for throughput: no stream that is in a hurry goes here while there is another."""
        self.from_listener = False
        """We dialed it from the port that others dial: a router in between shows that port's address."""
        self.limit: Limit | None = None
        """What the relay lets pass of a relayed connection; None: everything, as far as it says."""
        self.largest_frame = MAX_DATA
        """Payload bytes of a frame at most."""
        self.opened_at = clock.now()
        self.life = life or Life(clock)
        """Numbers and events that tell how it went."""
        self.rtt_s: float | None = None
        """Smoothed round trip of the keepalive pings."""
        self.used_at = self.opened_at
        """When a stream was opened or last known to be open, to a keepalive's precision."""
        self.cut_for = ""
        """The stable name of the rule by which we cut the connection, if we did."""
        self.bytes_in = 0
        self.bytes_out = 0
        self.readers: dict[int, asyncio.Future[None]] = {}
        """Tasks waiting to read, by stream id."""
        self.writers: dict[int, asyncio.Future[None]] = {}
        """Tasks waiting for their bytes to be framed, by stream id."""
        self.error: ConnectionClosed | None = None
        """Why the connection is gone."""
        self._connection = connection
        self._session = connection.session
        self._session.on_shed = self._shed
        self._clock = clock
        self._events = events
        self._transport: asyncio.Transport | None = None
        self._descriptor = -1  # of the socket, when frames can be written to it directly
        self._paused = False
        self.loop = asyncio.get_running_loop()
        self._pump_due = False
        self._rate = LinkRate()
        self._lost = self.loop.create_future()
        self._openers: dict[asyncio.Future[None], None] = {}
        self._early = 0  # streams opened before the peer's first words, -1 after them
        self._lingering: dict[int, tuple[MuxStream, float]] = {}
        self._handshake_timeout_s = handshake_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._pace = Pace(self.opened_at)
        self._pace_due = PACE_BYTES
        self._stalls = 0
        self._bytes_out_then = 0
        self._pings: dict[int, float] = {}
        self._ping_id = 0

    def __repr__(self) -> str:
        who = self.remote.short if self._connection.is_open else "?"
        return f"<wire {'to' if self.outbound else 'from'} {who} {self.address}>"

    # -- state --

    @property
    def remote(self) -> PeerId:
        """The authenticated peer. Raises LocalProtocolError before the handshake is over."""
        return self._connection.remote

    @property
    def is_open(self) -> bool:
        """Streams can be opened: the handshake is over and nobody said good-bye."""
        return self.error is None and self._connection.is_open and not self._session.went_away

    @property
    def closed(self) -> bool:
        """The connection is gone."""
        return self.error is not None

    @property
    def session(self) -> Session:
        """The yamux session, to look at."""
        return self._session

    @property
    def relayed(self) -> bool:
        """Another peer carries it."""
        return self.address.is_relayed

    @property
    def hindered(self) -> bool:
        """Its relay allows too little for work: only what makes better connections goes over it."""
        return self.limit is not None and not self.limit.is_ample

    @property
    def stream_count(self) -> int:
        """Open streams, both ways."""
        return len(self._session)

    @property
    def streams_out(self) -> int:
        """Open streams that we opened."""
        return len(self._session) - self._session.inbound

    @property
    def socket(self) -> Tunable | None:
        """The socket below, when there is one."""
        return self._transport.get_extra_info("socket") if self._transport else None

    @property
    def local_ip(self) -> str | None:
        """Our own IP address on this link, when it has one."""
        name = self._transport.get_extra_info("sockname") if self._transport else None
        return name[0] if isinstance(name, tuple) else None

    def raise_if_closed(self) -> None:
        """Raise ConnectionClosed when the connection is gone."""
        if self.error is not None:
            raise ConnectionClosed(*self.error.args)

    # -- asyncio.BufferedProtocol --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The link is up: start the handshake."""
        # uvloop's transports are not subclasses of asyncio's
        transport = cast("asyncio.Transport", transport)
        self._transport = transport
        if self.error is not None:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        sock = transport.get_extra_info("socket")
        if sock is not None and os.name == "posix":
            self._descriptor = sock.fileno()
        self._timer = asyncio.get_running_loop().call_later(self._handshake_timeout_s, self._handshake_late)
        self.pump()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._connection.get_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes arrived: decode, wake, answer."""
        if self.error is not None:
            return
        self.bytes_in += nbytes
        self._session.now = self._clock.now()
        connection = self._connection
        was_open = connection.is_open
        try:
            events = connection.received(nbytes)
            if self.bytes_in >= self._pace_due:
                self._pace_due = self.bytes_in + PACE_BYTES
                self._pace.check(self._session.tally, self._session.now)
        except Chores as exc:
            self.cut_for = "chores"
            self._break(exc)
            return
        except RemoteProtocolError as exc:
            self._break(exc)
            return
        if not was_open and connection.is_open:
            self._handshake_done()
        for event in events:
            if isinstance(event, Readable):
                self._arrived(event.stream)
            else:
                self._dispatch(event)
        if self._session.has_output or not was_open:
            self.pump()

    def _arrived(self, mux: MuxStream) -> None:
        """Bytes, EOF or a reset: wake the reader when all is here that it waits for."""
        if self._early >= 0:
            self._early = -1
            self._wake_openers()
        if mux.reset_by is not None:
            self._wake_stream(mux.id)
            self._wake_openers()
        elif mux.buffered >= mux.wanted or mux.remote_fin:
            waiter = self.readers.get(mux.id)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def eof_received(self) -> bool:
        """The peer closed its side of the link: it is gone, libp2p has no half-closed connections."""
        self._die("the peer closed the connection")
        return False

    def pause_writing(self) -> None:
        """The link is full."""
        self._paused = True
        self.life.paused()

    def resume_writing(self) -> None:
        """The link has room again."""
        self._paused = False
        self.life.resumed()
        self.pump()
        self._rate.resumed(self._clock.now(), self.bytes_out, full=self._paused)
        self._session.frame_limit = SMALL_FRAME if self._rate.is_slow else self.largest_frame

    def connection_lost(self, exc: Exception | None) -> None:
        """The link is gone."""
        if isinstance(exc, ConnectionError | OSError | None):
            self._die(str(exc) if exc else "the connection was closed")
        else:
            self._die(repr(exc))
        if self._timer is not None:
            self._timer.cancel()
        if not self._lost.done():
            self._lost.set_result(None)

    # -- sending --

    def pump(self) -> None:
        """Send what is ready while the link takes it. Called after anything that may have made output."""
        transport = self._transport
        if transport is None or self.error is not None:
            return
        connection = self._connection
        while not self._paused and self.error is None and (frame := connection.pull()) is not None:
            self.bytes_out += len(frame)
            self._send(transport, frame)
        if self._session.drained:
            self._wake_drained()

    def pump_soon(self) -> None:
        """pump() at the end of this turn of the loop: credit to give back rides with the answer, if there is one."""
        if not self._pump_due:
            self._pump_due = True
            self.loop.call_soon(self._pump_late)

    def _pump_late(self) -> None:
        self._pump_due = False
        self.pump()

    def send_now(self, mux: MuxStream, parts: tuple[Part, ...]) -> bool:
        """Send a message at once if it fits one frame and nothing waits to go before it."""
        transport = self._transport
        if transport is None or self._paused:
            return False
        frame = self._connection.frame_now(mux, parts)
        if frame is None:
            return False
        self.bytes_out += len(frame)
        self._send(transport, frame)
        return True

    def _send(self, transport: asyncio.Transport, frame: bytes | bytearray) -> None:
        """Give a frame to the kernel; only what it does not take goes through the event loop's queue.

        Writing to the descriptor ourselves saves uvloop's turn of the loop per write and both loops'
        copies. It is sound because the loop holds nothing while we are not paused: WRITE_BUFFER is 0.
        """
        rest: bytes | bytearray | memoryview = frame
        if self._descriptor >= 0 and not transport.is_closing():
            try:
                sent = os.write(self._descriptor, frame)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                self.abort(exc.strerror or str(exc))
                return
            if sent == len(frame):
                return
            rest = memoryview(frame)[sent:]
        transport.write(rest)

    def _wake_drained(self) -> None:
        drained = self._session.drained
        for mux in drained:
            _wake(self.writers.pop(mux.id, None))
        drained.clear()

    # -- streams --

    async def open(self) -> MuxedStream:
        """A new stream, not negotiated yet; waits while too many are unacknowledged.

        Raises ConnectionClosed.
        """
        while True:
            self.raise_if_closed()
            if not self.is_open:
                raise ConnectionClosed(f"the connection to {self.address} is closing")
            if self._room() > 0:
                self._early += self._early >= 0
                self.used_at = self._clock.now()
                return MuxedStream(self, self._session.open())
            waiter = asyncio.get_running_loop().create_future()
            self._openers[waiter] = None
            try:
                await waiter
            finally:
                self._openers.pop(waiter, None)

    def reset(self, mux: MuxStream, reason: str) -> None:
        """Tear one stream down."""
        if self.error is not None:
            return
        try:
            self._session.reset(mux, reason)
        except RemoteProtocolError as exc:
            self._break(exc)
            return
        self._wake_stream(mux.id)
        self._wake_openers()
        self.pump()

    def _shed(self, mux: MuxStream, reason: str) -> None:
        logger.info("%r: stream %d reset: %s", self, mux.id, mux.reset_by)
        self.life.note("connectivity:stream_shed", stream=mux.id, reason=reason)
        self._wake_stream(mux.id)
        self._wake_openers()
        self.pump_soon()
        self._events.shed(reason)

    def linger(self, mux: MuxStream) -> None:
        """The stream is closed here; reset it if the peer does not end it too."""
        if not mux.remote_fin:
            self._lingering[mux.id] = (mux, self._clock.now())

    def wake_reader(self, mux: MuxStream) -> None:
        """Let the task that reads a stream look at it again."""
        _wake(self.readers.get(mux.id))

    def _wake_stream(self, stream_id: int) -> None:
        _wake(self.readers.get(stream_id))
        _wake(self.writers.pop(stream_id, None))

    def _wake_openers(self) -> None:
        for waiter in tuple(self._openers)[: self._room()] if self._openers else ():
            _wake(waiter)

    def _room(self) -> int:
        """How many streams may be opened now."""
        room = MAX_UNACKED - self._session.unacked
        return max(0, min(room, EARLY_STREAMS - self._early) if self._early >= 0 else room)

    # -- events --

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, Writable):
            if self._openers:
                self._wake_openers()
        elif isinstance(event, Opened):
            self._pace_due = 0  # streams cost more than their bytes
            if event.stream.reset_by is None:  # else it was over before we looked
                self.used_at = self._session.now
                self._events.stream(MuxedStream(self, event.stream))
        elif isinstance(event, Pong):
            self._ponged(event.opaque)
        elif isinstance(event, WentAway):
            logger.debug("%r: go-away %d", self, event.code)
            self.life.note("connectivity:go_away_received", code=event.code)

    def _handshake_done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.life.secured(str(self.remote), early_muxer=self._connection.early_muxer)
        self._keepalive()
        self._events.opened(self)

    def _handshake_late(self) -> None:
        self.cut_for = "handshake-timeout"
        self.abort(f"no handshake within {self._handshake_timeout_s:g} s")

    def _keepalive(self) -> None:
        """Ping, give back what a quiet connection does not need, reset streams nobody will end."""
        if self.error is not None:
            return
        if len(self._pings) >= MISSED_PINGS:
            self.abort(f"no answer to keepalives for {KEEPALIVE_S * MISSED_PINGS:g} s")
            return
        if self._is_stalled():
            self.cut_for = "stalled"
            self.abort(f"the peer took nothing for {KEEPALIVE_S * MISSED_PINGS:g} s")
            return
        now = self._clock.now()
        if len(self._session):
            self.used_at = now
        self._ping_id = (self._ping_id + 1) & 0xFFFFFFFF
        self._pings[self._ping_id] = now
        self._connection.trim()
        self._session.ping(self._ping_id)
        self.life.pinged()
        for stream_id, (mux, since) in tuple(self._lingering.items()):
            if mux.remote_fin or mux.reset_by is not None:
                del self._lingering[stream_id]
            elif now - since >= LINGER_S:
                del self._lingering[stream_id]
                self.reset(mux, "the peer did not end the stream")
        self._timer = asyncio.get_running_loop().call_later(KEEPALIVE_S, self._keepalive)
        self.pump()

    def _is_stalled(self) -> bool:
        """Output has waited for a full link through some keepalives. Pongs may be guessed, this cannot."""
        stuck = self._connection.has_output and self.bytes_out - self._bytes_out_then < MIN_PROGRESS
        self._stalls = self._stalls + 1 if stuck else 0
        self._bytes_out_then = self.bytes_out
        return self._stalls >= MISSED_PINGS

    def _ponged(self, opaque: int) -> None:
        sent = self._pings.get(opaque)
        if sent is None:
            return
        self._pings.clear()
        sample = self._clock.now() - sent
        self.note_rtt(sample)

    def note_rtt(self, sample_s: float) -> None:
        """Fold in a measured round trip."""
        self.life.measured(sample_s)
        old = self.rtt_s
        self.rtt_s = sample_s if old is None else old + _RTT_WEIGHT * (sample_s - old)
        self._session.rtt_s = self.rtt_s

    # -- the end --

    def _break(self, exc: RemoteProtocolError) -> None:
        """The peer broke the protocol: tell it, and hang up."""
        logger.info("%s: protocol error from the peer: %s", self.address, exc)
        self.cut_for = self.cut_for or "protocol-error"
        self._connection.go_away(GoAway.PROTOCOL_ERROR)
        self._hang_up(str(exc))

    def abort(self, reason: str) -> None:
        """Cut the link at once."""
        self._die(reason)
        if self._transport is not None:
            self._transport.abort()

    def close(self, reason: str) -> None:
        """Say go-away, flush and close, without waiting for it."""
        if self.error is None:
            self._connection.go_away()
            self._hang_up(reason)

    def _hang_up(self, reason: str) -> None:
        """Flush what is framed, then close; cut when the peer does not read."""
        self._descriptor = -1  # behind what the event loop may still hold
        self._paused = False
        self.pump()
        self._die(reason)
        if self._transport is not None:
            self._transport.close()
            if not self._lost.done():
                self._timer = asyncio.get_running_loop().call_later(CLOSE_GRACE_S, self._transport.abort)

    async def aclose(self) -> None:
        """Say go-away, flush, close, and wait until the link is gone; at most CLOSE_GRACE_S and a bit."""
        self.close("closed on this side")
        if self._transport is not None:
            await asyncio.shield(self._lost)

    def _die(self, reason: str) -> None:
        """Fail everything that waits. Idempotent: the first reason stays."""
        if self.error is not None:
            return
        who = self._connection.remote.short if self._connection.is_open else str(self.address)
        self.error = ConnectionClosed(f"connection to {who}: {reason}")
        if self._timer is not None:
            self._timer.cancel()
        self.life.ended(reason, phase=self._connection.phase.name.lower(), streams=len(self._session))
        self._session.close()
        self._lingering.clear()
        for waiter in (*self.readers.values(), *self.writers.values(), *self._openers):
            _wake(waiter)
        self.writers.clear()
        self._events.closed(self)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
