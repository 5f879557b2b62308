"""Messages of our own protocols over a byte stream: one frame at a time, bounded, both ways.

Reading never allocates before the frame's prefix was checked against the stream's limit; writing hands header and
payload to the stream in one gather write, so that a decode step is one frame on the wire.
"""

from __future__ import annotations

import asyncio
from typing import Final

from ..protocol.frames import PREFIX, pack, unpack_header, unpack_prefix
from ..protocol.wire import Catalogue, Message
from .transport.base import Priority, Stream

NO_PAYLOAD: Final = 0
URGENT_BYTES: Final = 64 * 1024
"""A message with more payload than this is no decode step: it goes as bulk whatever its stream, or every session's
tokens would wait for another one's prompt on the same connection."""


class FrameStream:
    """A Stream that carries messages. One task may receive; sends are serialized and may come from any task."""

    def __init__(self, stream: Stream, catalogue: Catalogue, max_payload: int = NO_PAYLOAD) -> None:
        self.stream = stream
        self.catalogue = catalogue
        self.max_payload = max_payload
        """Largest payload accepted; raised once a session has negotiated one."""
        self._priority = Priority.BULK
        self._sending = asyncio.Lock()

    async def receive(self) -> tuple[Message, bytes] | None:
        """The next message and its payload; None when the peer ended the stream between frames.

        Raises RemoteProtocolError for anything malformed, OSError when the stream or connection broke.
        Not cancel-safe in the middle of a frame: after a cancelled receive, reset the stream.
        """
        try:
            prefix = await self.stream.read_exactly(PREFIX.size)
        except asyncio.IncompleteReadError as exc:
            if exc.partial:
                raise ConnectionResetError("stream ended inside a frame") from exc
            return None
        header_size, payload_size = unpack_prefix(prefix, self.max_payload)
        try:
            header = await self.stream.read_exactly(header_size)
            payload = await self.stream.read_exactly(payload_size) if payload_size else b""
        except asyncio.IncompleteReadError as exc:
            raise ConnectionResetError("stream ended inside a frame") from exc
        return self.catalogue.parse(unpack_header(header)), payload

    async def send(self, message: Message, payload: bytes = b"") -> None:
        """Send one frame; returns when the stream has taken it. Raises OSError when the stream broke."""
        header = pack(message.to_header(), len(payload))
        async with self._sending:
            if len(payload) > URGENT_BYTES:
                self.stream.set_priority(Priority.BULK)
                try:
                    await self.stream.write(header, payload)
                finally:
                    self.stream.set_priority(self._priority)
            elif payload:
                await self.stream.write(header, payload)
            else:
                await self.stream.write(header)

    def set_priority(self, priority: Priority) -> None:
        """Which stream goes first on a busy connection; only large messages go later."""
        self._priority = priority
        self.stream.set_priority(priority)

    def reset(self) -> None:
        """Tear the stream down."""
        self.stream.reset()

    async def close(self) -> None:
        """End the stream gently; a stream already broken is fine."""
        try:
            await self.stream.close()
        except OSError:
            self.stream.reset()
