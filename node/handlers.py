"""Inbound streams: agree on a protocol, find its handler, run it, end the stream as the handler ended."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from ..protocol import multistream
from ..protocol.errors import RemoteProtocolError
from ..protocol.ids import PeerId
from .tasks import Supervisor
from .transport import loopback
from .transport.base import ProtocolUnsupported, Stream
from .transport.stream import MuxedStream

logger = logging.getLogger(__name__)

MAX_STREAMS_PER_PEER: Final = 256
"""Default cap on streams that one peer may have open to one protocol."""
_CHUNK: Final = 1024

Handler = Callable[[Stream], Awaitable[None]]


@dataclass(slots=True)
class _Registered:
    handler: Handler
    max_per_peer: int


class Handlers:
    """The table of protocols a host answers, and the tasks that answer them."""

    def __init__(self, tasks: Supervisor, *, refused: Counter[str], negotiation_timeout_s: float) -> None:
        self._tasks = tasks
        self._refused = refused
        self._negotiation_timeout_s = negotiation_timeout_s
        self._table: dict[str, _Registered] = {}
        self._running: Counter[tuple[PeerId, str]] = Counter()

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols with a handler."""
        return tuple(self._table)

    def add(self, protocol: str, handler: Handler, max_per_peer: int) -> None:
        """Answer a protocol from now on."""
        self._table[protocol] = _Registered(handler, max_per_peer)

    def remove(self, protocol: str) -> None:
        """Answer it no more; running streams go on."""
        self._table.pop(protocol, None)

    def take(self, stream: MuxedStream) -> None:
        """A peer opened a stream."""
        if not self._tasks.has_room:  # closing, or out of tasks: no reason to break the connection
            self._refused["no room for a stream"] += 1
            stream.reset()
            return
        self._tasks.start(self._serve(stream), "inbound stream")

    def open_loopback(self, me: PeerId, protocol: str) -> Stream:
        """A stream to our own handler. Raises ProtocolUnsupported."""
        registered = self._table.get(protocol)
        if registered is None:
            raise ProtocolUnsupported(f"this node has no handler for {protocol}")
        ours, theirs = loopback.pair(me, protocol)
        self._tasks.start(self._run(theirs, registered), protocol)
        return ours

    async def _serve(self, stream: MuxedStream) -> None:
        """Negotiate, then hand over to the protocol's handler."""
        try:
            async with asyncio.timeout(self._negotiation_timeout_s):
                protocol = await self._agree(stream)
        except (TimeoutError, OSError, EOFError, RemoteProtocolError) as exc:
            logger.debug("no protocol agreed on %r: %s", stream, exc)
            stream.reset()
            return
        except BaseException:
            stream.reset()
            raise
        registered = self._table.get(protocol)
        slot = (stream.remote, protocol)
        if registered is None or self._running[slot] >= registered.max_per_peer:
            self._refused[f"too many streams of {protocol}"] += 1
            stream.reset()
            return
        stream.protocol = protocol
        self._running[slot] += 1
        try:
            await self._run(stream, registered)
        finally:
            self._running[slot] -= 1
            if not self._running[slot]:
                del self._running[slot]

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

    async def _run(self, stream: Stream, registered: _Registered) -> None:
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
