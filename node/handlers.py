"""Inbound streams: agree on a protocol, find its handler, run it, end the stream as the handler ended."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from ..protocol import multistream
from ..protocol.errors import RemoteProtocolError
from ..protocol.ids import PeerId
from ..protocol.limits import SYSTEM, TRANSIENT, Kind, Limiter, OverLimit, Reservation, Resource, Scope
from ..protocol.yamux_frames import INITIAL_WINDOW
from .limits import Rules
from .tasks import Supervisor
from .transport import loopback
from .transport.base import ProtocolUnsupported, Stream
from .transport.stream import MuxedStream

logger = logging.getLogger(__name__)

MAX_STREAMS_PER_PEER: Final = 256
"""Default cap on streams that one peer may have open to one protocol."""
NO_ROOM: Final = "tasks-full"
"""Counted when a stream comes while the host closes, or has all the tasks it may."""
_CHUNK: Final = 1024
_ONE: Final = {Resource.STREAMS_IN: 1, Resource.MEMORY: INITIAL_WINDOW}
"""What a stream holds at least: itself, and the bytes that its peer may send without asking."""

Handler = Callable[[Stream], Awaitable[None]]


class Handlers:
    """The table of protocols a host answers, and the tasks that answer them."""

    def __init__(
        self,
        tasks: Supervisor,
        *,
        limiter: Limiter,
        rules: Rules,
        refused: Counter[str],
        negotiation_timeout_s: float,
    ) -> None:
        self._tasks = tasks
        self._limiter = limiter
        self._rules = rules
        self._refused = refused
        self._negotiation_timeout_s = negotiation_timeout_s
        self._table: dict[str, Handler] = {}

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols with a handler."""
        return tuple(self._table)

    def add(self, protocol: str, handler: Handler, max_per_peer: int) -> None:
        """Answer a protocol from now on."""
        self._table[protocol] = handler
        self._rules.per_protocol_peer[protocol] = max_per_peer

    def remove(self, protocol: str) -> None:
        """Answer it no more; running streams go on."""
        self._table.pop(protocol, None)

    def take(self, stream: MuxedStream) -> None:
        """A peer opened a stream."""
        if not self._tasks.has_room:  # closing, or out of tasks: no reason to break the connection
            self._refuse(stream, NO_ROOM)
            return
        peer = stream.remote
        scopes = (SYSTEM, Scope(Kind.PEER, peer), TRANSIENT, Scope(Kind.PEER_TRANSIENT, peer))
        try:
            room = self._limiter.reserve(scopes, _ONE)
        except OverLimit as exc:
            self._refuse(stream, exc.reason)
            return
        task = self._tasks.start(self._serve(stream, room), "inbound stream")
        task.add_done_callback(lambda _: room.release())

    def open_loopback(self, me: PeerId, protocol: str) -> Stream:
        """A stream to our own handler. Raises ProtocolUnsupported."""
        handler = self._table.get(protocol)
        if handler is None:
            raise ProtocolUnsupported(f"this node has no handler for {protocol}")
        ours, theirs = loopback.pair(me, protocol)
        self._tasks.start(self._run(theirs, handler), protocol)
        return ours

    def _refuse(self, stream: MuxedStream, reason: str) -> None:
        self._refused[reason] += 1
        stream.reset()

    async def _serve(self, stream: MuxedStream, room: Reservation) -> None:
        """Negotiate, then hand over to the protocol's handler. The room is the stream's until this ends."""
        try:
            async with asyncio.timeout(self._negotiation_timeout_s):
                protocol = await self._agree(stream)
        except TimeoutError:
            self._refuse(stream, "negotiation-timeout")
            return
        except (OSError, EOFError, RemoteProtocolError) as exc:
            logger.debug("no protocol agreed on %r: %s", stream, exc)
            stream.reset()
            return
        except BaseException:
            stream.reset()
            raise
        peer = stream.remote
        handler = self._table.get(protocol)
        if handler is None:  # taken back since we agreed
            stream.reset()
            return
        try:
            room.move(
                (
                    SYSTEM,
                    Scope(Kind.PEER, peer),
                    Scope(Kind.PROTOCOL, protocol),
                    Scope(Kind.PROTOCOL_PEER, (protocol, peer)),
                )
            )
        except OverLimit as exc:
            self._refuse(stream, exc.reason)
            return
        stream.protocol = protocol
        await self._run(stream, handler)

    async def _agree(self, stream: MuxedStream) -> str:
        """The responder's half of multistream-select. Raises RemoteProtocolError, OSError or EOFError."""
        responder = multistream.Responder(self._table.__contains__)
        while not responder.done:
            data = await stream.read(_CHUNK)
            if not data:
                raise EOFError("the peer ended the stream during the negotiation")
            reply = responder.feed(data)
            if reply:
                await stream.write(reply)
        stream.unread(responder.leftover)
        return responder.protocol or ""

    async def _run(self, stream: Stream, handler: Handler) -> None:
        finished = False
        try:
            await handler(stream)
            await stream.close()
            finished = True
        except (OSError, EOFError) as exc:
            logger.debug("%r ended: %s", stream, exc)
        except RemoteProtocolError as exc:
            logger.info("%s broke %s: %s", stream.remote.short, stream.protocol, exc)
        finally:
            if not finished:
                stream.reset()
