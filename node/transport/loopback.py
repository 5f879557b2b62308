"""An in-process pair of streams: what a node gets when it opens a stream to its own peer id.

Same contract as a stream over a wire, including backpressure, half-close and reset, but no encryption,
framing or event-loop round trip. Bytes are copied once on write, because the writer may reuse its buffer
afterwards.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from ...protocol.errors import LocalProtocolError
from ...protocol.ids import PeerId
from ...protocol.yamux_frames import Priority
from .base import StreamReset

WINDOW: Final = 1024 * 1024
"""Bytes one direction holds before its writer waits, beyond what a reader is waiting for."""


class _Pipe:
    """One direction."""

    __slots__ = ("_chunks", "_reader", "_wanted", "_writer", "broken", "buffered", "discarding", "ending", "eof")

    def __init__(self) -> None:
        self._chunks: deque[memoryview] = deque()
        self.buffered = 0
        self.ending = False
        """The writer's side is closed; what it is still writing comes before the end."""
        self.eof = False
        """Nothing more will come."""
        self.broken = False
        self.discarding = False
        self._wanted = 0
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    async def wait_for(self, size: int) -> None:
        """Until `size` bytes are here, or the end is."""
        if size < 0:
            raise LocalProtocolError(f"cannot read {size} bytes: ask for none or more")
        while self.buffered < size and not self.eof:
            self._check()
            if self.discarding:
                raise LocalProtocolError("read after close")
            if self._reader is not None:
                raise LocalProtocolError("the stream is already being read by another task")
            self._wanted = size
            self._wake(self._writer)
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
                self._wanted = 0
        self._check()

    def take(self, size: int) -> bytes:
        parts = []
        left = min(size, self.buffered)
        self.buffered -= left
        while left:
            chunk = self._chunks[0]
            if len(chunk) <= left:
                parts.append(self._chunks.popleft())
                left -= len(chunk)
            else:
                parts.append(chunk[:left])
                self._chunks[0] = chunk[left:]
                left = 0
        self._wake(self._writer)
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        """Hand the bytes over piece by piece as there is room. Cancelled half way, the pipe breaks."""
        self._check()
        if self.ending:
            raise LocalProtocolError("write after close")
        if self._writer is not None:
            raise LocalProtocolError("the stream is already being written by another task")
        try:
            await self._write(memoryview(data))
        finally:
            self._written()

    async def _write(self, view: memoryview) -> None:
        size = len(view)
        while view:
            room = max(WINDOW, self._wanted) - self.buffered
            if self.discarding:
                return
            if room > 0:
                self._push(view[:room])
                view = view[room:]
                continue
            self._writer = asyncio.get_running_loop().create_future()
            try:
                await self._writer
            except asyncio.CancelledError:
                if len(view) < size:
                    self.reset()
                raise
            finally:
                self._writer = None
            self._check()

    def _push(self, piece: memoryview) -> None:
        self._chunks.append(piece)
        self.buffered += len(piece)
        if self.buffered >= self._wanted:
            self._wake(self._reader)

    def finish(self) -> None:
        """The end, after what is being written."""
        self.ending = True
        if self._writer is None:
            self._finished()

    def _written(self) -> None:
        if self.ending:
            self._finished()

    def _finished(self) -> None:
        self.eof = True
        self._wake(self._reader)

    def discard(self) -> None:
        self.discarding = True
        self._chunks.clear()
        self.buffered = 0
        self._wake(self._reader)
        self._wake(self._writer)

    def reset(self) -> None:
        self.broken = True
        self.discard()

    def _check(self) -> None:
        if self.broken:
            raise StreamReset("the in-process stream was reset")

    @staticmethod
    def _wake(waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class LoopbackStream:
    """One end of an in-process pair; implements base.Stream."""

    def __init__(self, remote: PeerId, protocol: str, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.remote = remote
        self.protocol = protocol
        self._in = incoming
        self._out = outgoing

    async def read(self, max_bytes: int) -> bytes:
        """At least one and at most `max_bytes` bytes; b"" at EOF."""
        await self._in.wait_for(min(1, max_bytes))
        return self._in.take(max_bytes)

    async def read_exactly(self, n: int) -> bytes:
        """Exactly `n` bytes; asyncio.IncompleteReadError at EOF."""
        await self._in.wait_for(n)
        if self._in.buffered < n:
            raise asyncio.IncompleteReadError(self._in.take(n), n)
        return self._in.take(n)

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send the parts in order as one piece; returns when all are taken over."""
        try:
            await self._out.write(b"".join(parts))
        except asyncio.CancelledError:
            if self._out.broken:
                self._in.reset()
            raise

    async def close_write(self) -> None:
        """End our direction after what was written."""
        self._out.finish()

    async def close(self) -> None:
        """End both directions gently."""
        self._out.finish()
        self._in.discard()

    def reset(self) -> None:
        """Tear the stream down at once, at both ends; one that has ended both ways is left alone."""
        if self._in.eof and self._out.eof:
            return
        self._in.reset()
        self._out.reset()

    def set_priority(self, priority: Priority) -> None:
        """Nothing to decide: no link is shared."""


def pair(peer: PeerId, protocol: str) -> tuple[LoopbackStream, LoopbackStream]:
    """Two connected ends, both talking to `peer`, that is: to ourselves."""
    there, back = _Pipe(), _Pipe()
    return LoopbackStream(peer, protocol, back, there), LoopbackStream(peer, protocol, there, back)
