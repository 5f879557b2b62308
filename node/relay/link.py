"""A stream as the byte link of another connection: what a wire takes for a socket.

The inner connection's frames are the outer stream's payload. Its back-pressure is the outer stream's: a frame that
cannot go at once pauses the wire, so that hardly anything queues here and the wire's priorities still decide.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ...protocol.errors import LocalProtocolError
from ..tasks import Supervisor
from ..transport.stream import MuxedStream

_CHUNK: Final = 256 * 1024


class StreamLink(asyncio.Transport):
    """One end of a link over a stream. start(), then run() until it is over."""

    def __init__(self, stream: MuxedStream, tasks: Supervisor) -> None:
        super().__init__()
        self._stream = stream
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._queue: deque[bytes] = deque()
        self._draining = False
        self._closing = False
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._error: Exception | None = None

    async def run(self, protocol: asyncio.BufferedProtocol, goodbye: Callable[[], None]) -> None:
        """Give the protocol its link and carry until either side ends it.

        Cancelled, it calls `goodbye` first, by which the protocol may close the link with a last word.
        """
        self._protocol = protocol
        protocol.connection_made(self)
        reader = self._loop.create_task(self._read(), name="read a circuit")
        try:
            await asyncio.wait((reader, self._over), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            goodbye()
            self._stream.reset() if self._queue else await self._stream.close()
            raise
        finally:
            self._closing = True
            self._queue.clear()
            reader.cancel()
            protocol.connection_lost(self._error)  # before anything that may be cancelled
            await asyncio.wait((reader,))
        if not reader.cancelled() and (bug := reader.exception()) is not None:
            raise bug

    async def _read(self) -> None:
        try:
            while data := await self._stream.read(_CHUNK):
                self._arrived(memoryview(data))
                if self._closing:
                    return
        except OSError as exc:
            self._error = exc
            return
        except LocalProtocolError:
            if self._closing:  # close() ended our reading
                return
            raise
        if not self._closing:
            self._protocol.eof_received()
            await self._stream.close()

    def _arrived(self, view: memoryview) -> None:
        while view and not self._closing:
            buffer = memoryview(self._protocol.get_buffer(len(view)))
            size = min(len(buffer), len(view))
            buffer[:size] = view[:size]
            self._protocol.buffer_updated(size)
            view = view[size:]

    # -- asyncio.Transport --

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """There is no socket of its own."""
        return default

    def is_closing(self) -> bool:
        """close() or abort() was called, or the link is over."""
        return self._closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """One frame at most is held."""

    def get_write_buffer_size(self) -> int:
        """Bytes that wait for the stream."""
        return sum(map(len, self._queue))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send now if the stream takes it, else pause the protocol until it did."""
        if self._closing or not data:
            return
        if not self._draining and self._stream.write_now(data):
            return
        self._queue.append(bytes(data))
        if not self._draining:
            self._draining = True
            self._protocol.pause_writing()
            self._start_draining()

    def _start_draining(self) -> None:
        if self._tasks.has_room:
            self._tasks.start(self._drain(), "write a circuit")
        else:  # the host is closing
            self.abort()

    async def _drain(self) -> None:
        try:
            while self._queue:
                await self._stream.write(self._queue[0])
                self._queue.popleft()
        except OSError as exc:
            self._error = self._error or exc
            self._finish()
            return
        self._draining = False
        if self._closing:
            await self._stream.close()
            self._finish()
        elif not self._over.done():
            self._protocol.resume_writing()

    def close(self) -> None:
        """End both directions after what was written."""
        if not self._closing:
            self._closing = True
            if not self._draining:
                self._start_draining()

    def abort(self) -> None:
        """End at once; the other side sees a reset."""
        self._closing = True
        self._queue.clear()
        self._stream.reset()
        self._finish()

    def _finish(self) -> None:
        if not self._over.done():
            self._over.set_result(None)
