"""One yamux stream: receive queue, send queue and the two windows. Driven by yamux.Session; spec:
docs/spec/yamux.md.

Life of each direction: open until FIN, both until RST. A stream leaves the session's table when both
directions have ended. Windows: `recv_credit` is what the peer may still send, `send_credit` what we may.
Credit is given back when half the window is free; bytes that a reader is already waiting for count as free,
so a message larger than the window flows without a pause and cannot deadlock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .errors import LocalProtocolError, RemoteProtocolError
from .yamux_frames import INITIAL_WINDOW, Flag, Priority
from .yamux_memory import MAX_CONNECTION_HELD

if TYPE_CHECKING:
    from .yamux import Session

SMALL: Final = 1024
"""Chunks below this are merged on arrival: one-byte frames must not cost 200 bytes of memory each."""
MERGED: Final = 16 * 1024
"""Merged chunks grow up to this."""
PINNED: Final = 8
"""A chunk is kept as a view into its plaintext when at most an eighth of that is something else."""
MAX_WINDOW: Final = 16 * 1024 * 1024
"""Largest receive window: 100 ms at 1 Gbit/s is 12.5 MB."""

Part = bytes | bytearray | memoryview


class MuxStream:
    """State of one stream. Made by Session.open() or by a peer's SYN; see the module's comment."""

    __slots__ = (
        "_chunks",
        "_epoch",
        "_head",
        "_outgoing",
        "ack_due",
        "acked",
        "announce_due",
        "buffered",
        "discarding",
        "fin_due",
        "fin_sent",
        "held",
        "id",
        "in_ready",
        "inbound",
        "priority",
        "protocol",
        "queued",
        "recv_credit",
        "remote_fin",
        "reset_by",
        "send_credit",
        "session",
        "syn_due",
        "wanted",
        "window",
    )

    def __init__(self, session: Session, stream_id: int, *, inbound: bool) -> None:
        self.session = session
        self.id = stream_id
        self.inbound = inbound
        self.priority = Priority.BULK
        self.protocol = ""
        """What is spoken on it, set by the owner once agreed; yamux itself does not care."""
        # receiving
        self._chunks: deque[Part] = deque()
        self._head = 0  # bytes of the first chunk already taken
        self.buffered = 0
        """Bytes received and not yet taken."""
        self.wanted = 0
        """Bytes a reader is waiting for."""
        self.held = 0
        """Bytes received beyond what a reader is waiting for, as counted against the bounds of yamux_memory."""
        self.recv_credit = INITIAL_WINDOW
        self.window = INITIAL_WINDOW
        self.remote_fin = False
        """The peer will send nothing more."""
        self.discarding = False
        """Nobody will read any more: arriving bytes are dropped and their credit is not given back."""
        self._epoch = session.now
        # sending
        self._outgoing: deque[memoryview] = deque()
        self.queued = 0
        """Bytes accepted by send() and not yet framed."""
        self.send_credit = INITIAL_WINDOW
        self.fin_due = False
        self.fin_sent = False
        # standing
        self.acked = inbound
        self.syn_due = not inbound
        self.ack_due = inbound
        self.announce_due = True
        """A WINDOW frame is waiting to go out."""
        self.in_ready = False
        self.reset_by: str | None = None
        """Why the stream was torn down, or None."""

    # -- receiving --

    @property
    def at_eof(self) -> bool:
        """Everything the peer sent has been taken and it ended its direction."""
        return self.remote_fin and not self.buffered

    def want(self, size: int) -> None:
        """A reader waits for `size` bytes (0: none does): grant credit for them."""
        self.wanted = size
        if size and self.held:
            self._hold()
        if size and 2 * self.recv_credit <= self.window:
            self._grant()

    def take(self, max_bytes: int) -> bytes:
        """Remove up to `max_bytes` received bytes, joined once, and give their credit back."""
        size = min(max_bytes, self.buffered)
        if size <= 0:
            if max_bytes < 0:
                raise LocalProtocolError(f"cannot read {max_bytes} bytes: ask for none or more")
            return b""
        self.buffered -= size
        first = self._chunks[0]
        end = self._head + size
        if end > len(first):
            data = self._join(size)
        else:  # as a rule: a message, or a header in front of one
            data = bytes(memoryview(first)[self._head : end])
            self._head = end
            if end == len(first):
                self._chunks.popleft()
                self._head = 0
        if self.held > self.buffered:
            self._hold()
        if 2 * self.recv_credit <= self.window:
            self._grant()
        return data

    def _join(self, left: int) -> bytes:
        """Remove `left` bytes that span chunks."""
        parts: list[Part] = []
        while left:
            chunk = self._chunks[0]
            available = len(chunk) - self._head
            if available <= left:
                parts.append(memoryview(chunk)[self._head :] if self._head else chunk)
                self._chunks.popleft()
                self._head = 0
                left -= available
            else:
                parts.append(memoryview(chunk)[self._head : self._head + left])
                self._head += left
                left = 0
        return b"".join(parts)

    def ignore_input(self) -> None:
        """Drop what was received and what will be."""
        self.discarding = True
        self._chunks.clear()
        self._head = self.buffered = self.wanted = 0
        self._hold()

    def unread(self, data: bytes) -> None:
        """Put bytes back in front; they were taken too eagerly (what follows a negotiation)."""
        if data:
            if self._head:
                self._chunks[0] = memoryview(self._chunks[0])[self._head :]
                self._head = 0
            self._chunks.appendleft(data)
            self.buffered += len(data)
            self._hold()

    def on_data(self, chunk: memoryview, whole: int) -> None:
        """Bytes of a DATA frame, part of a plaintext of `whole` bytes. The session has checked the credit."""
        if self.discarding:
            return
        size = len(chunk)
        self.buffered += size
        if size >= SMALL and size >= whole - whole // PINNED:
            self._chunks.append(chunk)
        else:
            # keeping a view would pin the whole plaintext for a part of it
            last = self._chunks[-1] if self._chunks else None
            if isinstance(last, bytearray) and len(last) + size <= MERGED:
                last += chunk
            else:
                self._chunks.append(bytearray(chunk))
        if self.wanted and 2 * self.recv_credit <= self.window:
            self._grant()
        if self.buffered > self.wanted:
            self._hold()

    def _hold(self) -> None:
        """Count what is buffered beyond what is wanted."""
        held = self.buffered - self.wanted if self.buffered > self.wanted else 0
        more = held - self.held
        if not more:
            return
        session, memory = self.session, self.session.memory
        self.held = held
        session.held += more
        memory.used += more
        if more > 0 and (session.held > MAX_CONNECTION_HELD or memory.used > memory.limit):
            session.relieve()
        elif not held:
            session.on_read(self)

    def _grant(self) -> None:
        """Announce more credit when half the window is free; callers know that half of it is used."""
        free = self.window - self.recv_credit - max(0, self.buffered - self.wanted)
        if 2 * free >= self.window and not (self.remote_fin or self.discarding) and self.reset_by is None:
            self.session.on_half_window(self)

    def free_window(self) -> int:
        """Credit that can be given back now; the session puts it into a WINDOW frame."""
        return max(0, self.window - self.recv_credit - max(0, self.buffered - self.wanted))

    def tune(self, now: float, rtt_s: float) -> bool:
        """Whether the window may be what limits: credit for half of it is due again within two round trips.

        A whole window in two round trips would be too much to ask: credit goes out in halves, so a sender
        that is held up by it moves one to two halves a round trip, and might stay there for ever.
        """
        fast = now - self._epoch < 2 * rtt_s
        self._epoch = now
        return fast

    # -- sending --

    def send(self, parts: tuple[Part, ...]) -> None:
        """Queue bytes. The buffers belong to the stream until `queued` is back to where it was."""
        for part in parts:
            view = memoryview(part)
            if isinstance(part, memoryview) and (part.format != "B" or part.ndim != 1):
                view = view.cast("B")
            if len(view):
                self._outgoing.append(view)
                self.queued += len(view)
        self.session.schedule(self)

    def finish(self) -> None:
        """Send FIN after what is queued."""
        if not self.fin_due and self.reset_by is None:
            self.fin_due = True
            self.session.schedule(self)

    def withdraw(self) -> None:
        """Forget what is queued and not framed."""
        self._outgoing.clear()
        self.queued = 0

    @property
    def ready(self) -> bool:
        """A DATA frame can be built now."""
        if self.queued:
            return self.send_credit > 0
        return self.fin_due and not self.fin_sent

    def fill(self, room: memoryview) -> tuple[int, int]:
        """Copy queued bytes into `room` as credit allows; return (bytes, flags) of the DATA frame."""
        limit = min(len(room), self.send_credit)
        size = 0
        outgoing = self._outgoing
        while outgoing and size < limit:
            part = outgoing[0]
            count = min(len(part), limit - size)
            room[size : size + count] = part[:count]
            size += count
            if count == len(part):
                outgoing.popleft()
            else:
                outgoing[0] = part[count:]
        self.queued -= size
        self.send_credit -= size
        flags = Flag.NONE
        if self.fin_due and not self.queued:
            self.fin_sent = True
            flags = Flag.FIN
        return size, flags

    def discard(self, reason: str) -> None:
        """The stream was reset, by whoever: drop both queues."""
        self.reset_by = reason
        self._chunks.clear()
        self._head = self.buffered = 0
        self._hold()
        self.withdraw()

    def on_window(self, delta: int) -> None:
        """The peer gave credit. Raises RemoteProtocolError when it passes any sensible sum."""
        self.send_credit += delta
        if self.send_credit > 0xFFFFFFFF:
            raise RemoteProtocolError(f"yamux stream {self.id}: send window over 4 GiB")


@dataclass(slots=True)
class Readable:
    """Event: bytes, EOF or a reset arrived on the stream."""

    stream: MuxStream


@dataclass(slots=True)
class Writable:
    """Event: the peer accepted the stream or gave credit."""

    stream: MuxStream
