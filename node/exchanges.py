"""Questions and answers of the DHT over a host's streams: one request, one reply, and the stream kept for the next.

A message is length-prefixed, on a stream of the DHT's protocol. A stream stays open a few seconds after the answer,
because a lookup comes back to the same peers; one that proves dead meanwhile is replaced once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..protocol import protobuf
from ..protocol.errors import RemoteProtocolError
from ..protocol.ids import PeerId
from ..protocol.kad import MAX_MESSAGE_BYTES, UNANSWERED, Message
from ..protocol.multiaddr import Multiaddr
from ..routing.table import Contact
from .clock import Clock
from .host import Host
from .transport.base import Priority, Stream

logger = logging.getLogger(__name__)

MAX_IDLE_STREAMS: Final = 64
IDLE_STREAM_S: Final = 15.0
"""Our own unused streams are closed after this."""
_CHUNK: Final = 64 * 1024


class Line:
    """A stream between two DHTs and what was read from it. Control traffic: it goes before bulk."""

    def __init__(self, stream: Stream) -> None:
        stream.set_priority(Priority.CONTROL)
        self.stream = stream
        self.idle_since = 0.0
        self._split = protobuf.Delimited(MAX_MESSAGE_BYTES)

    async def receive(self) -> Message | None:
        """The next message, None at EOF. Raises RemoteProtocolError, OSError or SwarmError."""
        while True:
            for raw in self._split.feed(b""):
                return Message.decode(raw)
            chunk = await self.stream.read(_CHUNK)
            if not chunk:
                return None
            for raw in self._split.feed(chunk):
                return Message.decode(raw)

    async def send(self, message: Message) -> None:
        """Write one message."""
        await self.stream.write(protobuf.delimited(message.encode()))


class Exchange(NamedTuple):
    """What came of one request."""

    reply: Message | None
    """None where none comes."""
    seen: Multiaddr | None
    """Where the peer is."""
    took_s: float
    """From the request's first byte to the reply."""


class Exchanges:
    """The asking side, and its idle streams. After close() no stream is kept."""

    def __init__(self, host: Host, clock: Clock, protocol: str) -> None:
        self._host = host
        self._clock = clock
        self._protocol = protocol
        self._idle: dict[PeerId, Line] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._idle)

    async def ask(self, contact: Contact, request: Message) -> Exchange:
        """One request and what came of it. Raises RemoteProtocolError for an answer to something else, OSError or
        SwarmError when there is none. Cancelling it resets the stream.
        """
        kept = self._idle.pop(contact.peer, None)
        if kept is not None:
            try:
                return await self._ask_on(kept, request)
            except OSError as exc:
                logger.debug("kept DHT stream to %s was dead: %s", contact.peer.short, exc)
        stream = await self._host.open_stream(contact.peer, self._protocol, addrs=contact.addrs)
        return await self._ask_on(Line(stream), request)

    async def open(self, peer: PeerId) -> None:
        """See that a connected peer speaks the protocol; the stream is kept. Raises OSError or SwarmError."""
        await self._keep(Line(await self._host.open_stream(peer, self._protocol)))

    def take_overdue(self, now: float) -> Iterator[Stream]:
        """Streams idle for too long, for the caller to close."""
        for peer, line in list(self._idle.items()):
            if now - line.idle_since > IDLE_STREAM_S:
                del self._idle[peer]
                yield line.stream

    def forget(self, peer: PeerId) -> None:
        """The peer is disconnected."""
        self._idle.pop(peer, None)

    def close(self) -> None:
        """Reset the idle streams."""
        self._closed = True
        for line in self._idle.values():
            line.stream.reset()
        self._idle.clear()

    async def _ask_on(self, line: Line, request: Message) -> Exchange:
        answered, began = False, self._clock.now()
        reply = None
        try:
            await line.send(request)
            if request.type not in UNANSWERED:
                reply = await line.receive()
                if reply is None:
                    raise ConnectionResetError("stream ended instead of an answer")
                if reply.type is not request.type:
                    raise RemoteProtocolError(f"{reply.type.name} answered to {request.type.name}")
            answered = True
        finally:
            if not answered:
                line.stream.reset()
        took_s = self._clock.now() - began
        seen = self._host.address_of(line.stream)
        await self._keep(line)
        return Exchange(reply, seen, took_s)

    async def _keep(self, line: Line) -> None:
        peer = line.stream.remote
        if self._closed or peer in self._idle or len(self._idle) >= MAX_IDLE_STREAMS:
            await line.stream.close()
            return
        line.idle_since = self._clock.now()
        self._idle[peer] = line
