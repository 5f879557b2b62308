"""A yamux stream as the rest of the node sees it: awaitable reads and writes with backpressure.

The fast paths never touch the event loop: a read whose bytes are here and a write whose bytes fit the
window and the link are plain calls. Only when they must wait do they register a future with the wire, which
completes it when the whole amount is there, so a large message wakes its reader once and not once per
frame.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from ...protocol.errors import LocalProtocolError, RemoteProtocolError
from ...protocol.ids import PeerId
from ...protocol.multiaddr import Multiaddr
from ...protocol.multistream import Dialer
from ...protocol.yamux_frames import Priority
from ...protocol.yamux_stream import MuxStream
from .base import StreamReset

if TYPE_CHECKING:
    from .wire import Wire

_NEGOTIATION_CHUNK: Final = 4096


class MuxedStream:
    """Implements base.Stream on top of a wire; see there for the contract."""

    __slots__ = ("_dialer", "_mux", "_prefix", "_wire")

    def __init__(self, wire: Wire, mux: MuxStream, protocol: str = "") -> None:
        self._wire = wire
        self._mux = mux
        mux.protocol = protocol
        self._dialer: Dialer | None = None  # a negotiation whose answer has not been read yet
        self._prefix = b""  # its proposal, sent with the first bytes

    def __repr__(self) -> str:
        return f"<stream {self._mux.id} {self.protocol} with {self._wire.remote.short}>"

    @property
    def remote(self) -> PeerId:
        """Who is at the other end, proven by the handshake."""
        return self._wire.remote

    @property
    def protocol(self) -> str:
        """The protocol spoken; empty until one is agreed."""
        return self._mux.protocol

    @protocol.setter
    def protocol(self, name: str) -> None:
        self._mux.protocol = name

    @property
    def wire(self) -> Wire:
        """The connection below."""
        return self._wire

    @property
    def connection_address(self) -> Multiaddr:
        """The remote's address on the connection below."""
        return self._wire.address

    async def read(self, max_bytes: int) -> bytes:
        """At least one and at most `max_bytes` bytes; b"" at EOF."""
        mux = self._mux
        if self._dialer is not None:
            await self._agree()
        while not mux.buffered and max_bytes > 0:
            self._raise_if_reset()
            if mux.remote_fin:
                return b""
            await self._readable(1)
        return self._take(max_bytes)

    async def read_exactly(self, n: int) -> bytes:
        """Exactly `n` bytes; asyncio.IncompleteReadError at EOF."""
        mux, wire = self._mux, self._wire
        if self._dialer is not None:
            await self._agree()
        while mux.buffered < n:
            if mux.reset_by is not None:
                self._raise_if_reset()
            if mux.remote_fin:
                raise asyncio.IncompleteReadError(self._take(mux.buffered), n)
            # _readable(n), written out: the wait of every message
            if wire.error is not None or mux.discarding or mux.id in wire.readers:
                self._raise_if_unreadable()
            waiter = wire.readers[mux.id] = wire.loop.create_future()
            mux.want(n)
            if mux.announce_due:
                wire.pump_soon()
            try:
                await waiter
            finally:
                mux.want(0)
                del wire.readers[mux.id]
        data = mux.take(n)
        if mux.announce_due:
            wire.pump_soon()
        return data

    def _take(self, size: int) -> bytes:
        mux = self._mux
        data = mux.take(size)
        if mux.announce_due:
            self._wire.pump_soon()
        return data

    async def _readable(self, size: int) -> None:
        """Wait until `size` bytes are buffered, or EOF, or reset."""
        mux, wire = self._mux, self._wire
        if wire.error is not None or mux.discarding or mux.id in wire.readers:
            self._raise_if_unreadable()
        waiter = wire.readers[mux.id] = wire.loop.create_future()
        mux.want(size)
        if mux.announce_due:
            wire.pump_soon()
        try:
            await waiter
        finally:
            mux.want(0)
            del wire.readers[mux.id]

    def propose(self, protocol: str) -> None:
        """Speak `protocol` from now on without waiting for the peer's consent: it is known to speak it.

        The proposal travels with what is written before the event loop's next turn, else alone; the answer is
        taken off before the first bytes read. A peer that refuses after all makes reads raise StreamReset.
        """
        self.protocol = protocol
        self._dialer = Dialer([protocol])
        self._prefix = self._dialer.opening
        asyncio.get_running_loop().call_soon(self._flush_proposal)

    async def agreed(self) -> bool:
        """Wait for the answer to propose(); False when the peer does not speak the protocol."""
        dialer = self._dialer
        if dialer is None:
            return True
        self._flush_proposal()
        while not dialer.done:
            if not self._mux.buffered:
                self._raise_if_reset()
                if self._mux.remote_fin:
                    raise StreamReset(f"{self!r}: the peer ended the stream during the negotiation")
                await self._readable(1)
            if self._dialer is None:
                break  # another task finished it
            dialer.feed(self._take(_NEGOTIATION_CHUNK))
        if self._dialer is not None:
            self._mux.unread(dialer.leftover)
            self._dialer = None
        return dialer.protocol is not None

    async def _agree(self) -> None:
        try:
            if await self.agreed():
                return
        except RemoteProtocolError as exc:
            self.reset()
            raise StreamReset(f"{self!r}: {exc}") from exc
        self.reset()
        raise StreamReset(f"{self.remote.short} does not speak {self.protocol} any more")

    def _flush_proposal(self) -> None:
        if self._prefix and not self._wire.closed and self._mux.reset_by is None:
            self._mux.send((self._prefix,))
            self._prefix = b""
            self._wire.pump()

    def unread(self, data: bytes) -> None:
        """Put bytes back in front: they followed the protocol negotiation."""
        self._mux.unread(data)

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send the parts in order as one piece; returns when all are framed."""
        mux, wire = self._mux, self._wire
        if wire.error is not None or mux.reset_by is not None or mux.fin_due or wire.writers:
            self._raise_if_unwritable()
        prefix = self._prefix
        if prefix:
            parts = (prefix, *parts)
            self._prefix = b""
        if wire.send_now(mux, parts):
            return
        before = mux.queued  # a proposal that the link has had no room for
        mux.send(parts)
        total = mux.queued
        wire.pump()
        if mux.queued:
            await self._drained(0 if before else total, prefix)

    def write_now(self, data: bytes | bytearray | memoryview) -> bool:
        """Send in one frame, at once; False when that cannot be: then it has to be written."""
        mux, wire = self._mux, self._wire
        if wire.error is not None or mux.reset_by is not None or mux.fin_due or self._prefix or mux.id in wire.writers:
            return False
        return wire.send_now(mux, (data,))

    async def _drained(self, total: int, prefix: bytes) -> None:
        """Wait until all is framed. Cancelled while `total` bytes still wait, nothing was: they are withdrawn."""
        mux, wire = self._mux, self._wire
        wire.raise_if_closed()
        waiter = wire.writers[mux.id] = asyncio.get_running_loop().create_future()
        try:
            await waiter
        except asyncio.CancelledError:
            if mux.queued == total:
                mux.withdraw()
                self._prefix = prefix
            elif mux.queued:
                self.reset()
            raise
        finally:
            wire.writers.pop(mux.id, None)
        wire.raise_if_closed()
        self._raise_if_reset()

    async def close_write(self) -> None:
        """End our direction after what was written."""
        if not self._wire.closed and self._mux.reset_by is None:
            self._flush_proposal()
            self._mux.finish()
            self._wire.pump()

    async def close(self) -> None:
        """End both directions gently."""
        if not self._wire.closed and self._mux.reset_by is None:
            self._flush_proposal()
            self._mux.ignore_input()
            self._dialer = None  # its answer is ignored, too
            self._mux.finish()
            self._wire.wake_reader(self._mux)
            self._wire.linger(self._mux)
            self._wire.pump()

    def reset(self) -> None:
        """Tear the stream down at once."""
        self._wire.reset(self._mux, "reset on this side")

    def set_priority(self, priority: Priority) -> None:
        """Which of our streams on the connection goes first when the link is full."""
        self._mux.priority = priority

    def _raise_if_reset(self) -> None:
        if self._mux.reset_by is not None:
            raise StreamReset(f"stream to {self.remote.short} ({self.protocol}): {self._mux.reset_by}")

    def _raise_if_unreadable(self) -> None:
        self._wire.raise_if_closed()
        if self._mux.discarding:
            raise LocalProtocolError(f"{self!r} was closed on this side")
        if self._mux.id in self._wire.readers:
            raise LocalProtocolError(f"{self!r} is already being read by another task")

    def _raise_if_unwritable(self) -> None:
        self._wire.raise_if_closed()
        self._raise_if_reset()
        if self._mux.fin_due:
            raise LocalProtocolError(f"{self!r}: write after close")
        if self._mux.id in self._wire.writers:
            raise LocalProtocolError(f"{self!r} is already being written by another task")
