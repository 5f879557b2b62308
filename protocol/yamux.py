"""yamux: many streams over one connection, sans-IO. Spec: docs/spec/yamux.md.

Bytes go in through receive(), which returns events; bytes come out of fill(), which is pulled only when the
link has room, so priorities are decided at the last moment and nothing is queued twice. Control frames go
first, then one frame per ready stream, by priority, round robin among equals.

Everything a peer can make us keep is bounded: streams, credit, replies it does not read. Frames of streams
that are gone are skipped, for they may have crossed our reset on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from .errors import LocalProtocolError, RemoteProtocolError
from .tally import Tally
from .yamux_frames import HEADER, HEADER_SIZE, INITIAL_WINDOW, Flag, FrameType, GoAway
from .yamux_memory import CONNECTION_REASON, MAX_CONNECTION_HELD, HeldMemory
from .yamux_stream import MAX_WINDOW, MuxStream, Part, Readable, Writable

PROTOCOL: Final = "/yamux/1.0.0"
MAX_INBOUND: Final = 512
"""Streams a peer may have open to us on one connection; one more is reset at once."""
MAX_UNACKED: Final = 256
"""Streams we may have open that the peer has not acknowledged (libp2p yamux specification)."""
MAX_CONTROL: Final = 1024
"""Replies queued for a peer that does not read; over that it is flooding us."""
MAX_DATA: Final = 65507
"""Payload of our DATA frames: with the header exactly one Noise message."""
WINDOW_BUDGET: Final = 64 * 1024 * 1024
"""Sum of the windows of one connection's streams beyond the 256 KiB that the protocol gives away."""
STREAM_WINDOW: Final = 1024 * 1024
"""Window announced with SYN and ACK while the budget lasts."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Event: the peer opened a stream."""

    stream: MuxStream


@dataclass(frozen=True, slots=True)
class Pong:
    """Event: the answer to our ping(opaque)."""

    opaque: int


@dataclass(frozen=True, slots=True)
class WentAway:
    """Event: the peer accepts no more streams and will close."""

    code: int


Event = Readable | Writable | Opened | Pong | WentAway


class Budget:
    """A sum of bytes shared by whoever draws on it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def draw(self, size: int) -> bool:
        """Take `size` bytes if they are there."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        """Return what was drawn."""
        self.used -= size


class Session:
    """One yamux connection. `client` is the side that dialed, by negotiated role; its stream ids are odd."""

    __slots__ = (
        "_budgets",
        "_control",
        "_end_flags",
        "_ended",
        "_left",
        "_next_id",
        "_partial",
        "_ready",
        "_streams",
        "_target",
        "_windows",
        "drained",
        "frame_limit",
        "held",
        "inbound",
        "memory",
        "now",
        "on_shed",
        "rtt_s",
        "tally",
        "unacked",
        "went_away",
    )

    stream_class: ClassVar[type[MuxStream]] = MuxStream
    """What streams are made of; a recorder makes them of its own kind."""

    def __init__(self, *, client: bool, node_budget: Budget | None = None) -> None:
        self._next_id = 1 if client else 2
        self._streams: dict[int, MuxStream] = {}
        self.inbound = 0
        """Open streams the peer started."""
        self.tally = Tally()
        self.unacked = 0
        """Open streams of ours that the peer has not acknowledged."""
        self._budgets = (Budget(WINDOW_BUDGET), node_budget or Budget(WINDOW_BUDGET))
        self.memory = HeldMemory()
        """Where the node's unread bytes are summed up; see share()."""
        self.memory.join(self)
        self.held = 0
        """Unread bytes of all streams that no reader waits for."""
        self._ended: dict[MuxStream, None] = {}  # out of the table, and not read to the end
        self.on_shed: Callable[[MuxStream, str], None] | None = None
        """Told of a stream that was reset for the memory it held, and by which bound."""
        self.rtt_s = 0.0
        """Round trip time, set by the owner; 0 = unknown, windows do not grow."""
        self.now = 0.0
        """Time of the current call, set by the owner."""
        self.frame_limit = MAX_DATA
        """Payload of one DATA frame at most; the owner lowers it on slow links."""
        self.went_away = False
        """The peer or we said go-away: no new streams."""
        self.drained: list[MuxStream] = []
        """Streams whose send queue became empty in fill(); the owner wakes their writers and clears the
        list."""
        # sending; ready streams by Priority
        self._control: deque[bytes] = deque()
        self._windows: dict[int, MuxStream] = {}  # a WINDOW frame is due, by id in order of time
        self._ready: tuple[deque[MuxStream], deque[MuxStream], deque[MuxStream]] = (deque(), deque(), deque())
        # receiving
        self._partial = b""
        self._left = 0  # bytes still to come of the current DATA frame
        self._target: MuxStream | None = None
        self._end_flags = 0

    # -- for the owner --

    def __len__(self) -> int:
        return len(self._streams)

    def streams(self) -> Iterator[MuxStream]:
        """Every stream in the table."""
        return iter(tuple(self._streams.values()))

    def open(self) -> MuxStream:
        """A new stream; its SYN goes out with the next fill(). Raises LocalProtocolError over MAX_UNACKED."""
        if self.went_away:
            raise LocalProtocolError("the session is going away: no new streams")
        if self.unacked >= MAX_UNACKED:
            raise LocalProtocolError(f"{MAX_UNACKED} streams are not acknowledged yet")
        stream = self.stream_class(self, self._next_id, inbound=False)
        self.tally.opened_here += 1
        self._next_id += 2
        self.unacked += 1
        self._add(stream)
        return stream

    def reset(self, stream: MuxStream, reason: str) -> None:
        """Tear a stream down and tell the peer."""
        if self._streams.get(stream.id) is stream:
            self.tally.reset_here += 1
            self._forget(stream, reason)
            if not stream.syn_due:  # else the peer has never heard of it
                self._queue(HEADER.pack(0, FrameType.WINDOW, Flag.RST, stream.id, 0))

    def share(self, memory: HeldMemory) -> None:
        """Count unread bytes in the node's sum from now on."""
        self.memory.leave(self)
        self.memory = memory
        memory.used += self.held
        memory.join(self)

    def shed(self, reason: str) -> None:
        """Reset the stream that holds most unread bytes."""
        stream = max((*self._streams.values(), *self._ended), key=lambda stream: stream.held)
        self.tally.shed += 1
        cause = f"too much was sent that nobody read ({reason})"
        if stream in self._ended or len(self._control) >= MAX_CONTROL:  # a peer that reads nothing cannot be told
            self._forget(stream, cause)
        else:
            self.reset(stream, cause)
        if self.on_shed is not None:
            self.on_shed(stream, reason)

    def ping(self, opaque: int) -> None:
        """Ask for a Pong(opaque)."""
        self._queue(HEADER.pack(0, FrameType.PING, Flag.SYN, 0, opaque))

    def go_away(self, code: GoAway = GoAway.NORMAL) -> None:
        """Announce the end; no streams can be opened afterwards."""
        if not self.went_away:
            self.went_away = True
            self.tally.go_aways_out += 1
            self._control.append(HEADER.pack(0, FrameType.GO_AWAY, 0, 0, code))

    @property
    def has_output(self) -> bool:
        """fill() may produce something."""
        control, decode, bulk = self._ready
        return bool(control or decode or bulk or self._control or self._windows)

    def fill(self, out: memoryview) -> int:
        """Write the next frames into `out`, return how many bytes; 0 when there is nothing to send."""
        used = self._fill_control(out) if self._control or self._windows else 0
        for queue in self._ready:
            while queue and len(out) - used > HEADER_SIZE:
                used += self._fill_data(queue, out[used:])
                if used >= self.frame_limit:
                    return used
        return used

    def frame_now(self, stream: MuxStream, parts: tuple[Part, ...]) -> bytes | None:
        """The message as one DATA frame, if nothing is to go before it and it fits; else None: use send() and fill().

        The short way of most messages, past the queues: those cost a small message more than its encryption.
        """
        control, decode, bulk = self._ready
        if stream.queued or control or decode or bulk or self._control or self._windows:
            return None
        size = 0
        for part in parts:
            size += part.nbytes if isinstance(part, memoryview) else len(part)
        if not 0 < size <= self.frame_limit or size > stream.send_credit:
            return None
        stream.send_credit -= size
        tally, priority = self.tally, stream.priority
        tally.frames_out[priority] += 1
        tally.bytes_out[priority] += size
        return b"".join((HEADER.pack(0, FrameType.DATA, Flag.NONE, stream.id, size), *parts))

    # -- for streams --

    def schedule(self, stream: MuxStream) -> None:
        """The stream may have become ready to send."""
        if stream.ready and not stream.in_ready and stream.reset_by is None:
            stream.in_ready = True
            self._ready[stream.priority].append(stream)

    def relieve(self) -> None:
        """Too many unread bytes are held, here or on the node: come back under both bounds."""
        while self.held > MAX_CONNECTION_HELD:
            self.shed(CONNECTION_REASON)
        self.memory.relieve()

    def on_read(self, stream: MuxStream) -> None:
        """The stream holds no unread bytes any more."""
        self._ended.pop(stream, None)

    def on_half_window(self, stream: MuxStream) -> None:
        """The stream has half a window to give back."""
        if not stream.announce_due:
            stream.announce_due = True
            self._windows[stream.id] = stream

    # -- sending --

    def _fill_control(self, out: memoryview) -> int:
        used = 0
        last = len(out) - HEADER_SIZE
        while self._control and used <= last:
            out[used : used + HEADER_SIZE] = self._control.popleft()
            used += HEADER_SIZE
        while self._windows and used <= last:
            stream = self._windows.pop(next(iter(self._windows)))
            if self._streams.get(stream.id) is stream:
                self._announce(stream, out, used)
                used += HEADER_SIZE
        self.tally.control_out += used // HEADER_SIZE
        return used

    def _announce(self, stream: MuxStream, out: memoryview, offset: int) -> None:
        """A WINDOW frame: SYN or ACK the first time, and whatever credit is free."""
        flags = Flag.SYN if stream.syn_due else Flag.ACK if stream.ack_due else Flag.NONE
        stream.syn_due = stream.ack_due = False
        if flags:
            self._widen(stream, STREAM_WINDOW)
        elif stream.tune(self.now, self.rtt_s):
            self._widen(stream, min(2 * stream.window, MAX_WINDOW))
        delta = stream.free_window()
        stream.recv_credit += delta
        stream.announce_due = False
        HEADER.pack_into(out, offset, 0, FrameType.WINDOW, flags, stream.id, delta)

    def _widen(self, stream: MuxStream, window: int) -> None:
        """Enlarge a receive window as far as both budgets allow; the drawn bytes return in _forget()."""
        extra = window - stream.window
        mine, node = self._budgets
        if extra > 0 and not self.memory.is_scarce and mine.draw(extra):
            if node.draw(extra):
                stream.window = window
                self.tally.windows_grown += window > STREAM_WINDOW
            else:
                mine.give_back(extra)

    def _fill_data(self, queue: deque[MuxStream], out: memoryview) -> int:
        stream = queue.popleft()
        stream.in_ready = False
        if stream.reset_by is not None or not stream.ready:
            return 0
        had = stream.queued
        size, flags = stream.fill(out[HEADER_SIZE : HEADER_SIZE + self.frame_limit])
        HEADER.pack_into(out, 0, 0, FrameType.DATA, flags, stream.id, size)
        self.tally.frames_out[stream.priority] += 1
        self.tally.bytes_out[stream.priority] += size
        if had and not stream.queued:
            self.drained.append(stream)
        if flags & Flag.FIN:
            self._half_closed(stream)
        elif stream.queued:
            self.schedule(stream)
        return HEADER_SIZE + size

    def _queue(self, frame: bytes) -> None:
        if len(self._control) >= MAX_CONTROL:
            raise RemoteProtocolError(f"the peer does not read the {MAX_CONTROL} replies it provoked")
        self._control.append(frame)

    # -- receiving --

    def receive(self, data: bytes) -> list[Event]:
        """Take plaintext bytes, however split, and return what happened. Raises RemoteProtocolError."""
        events: list[Event] = []
        if self._partial:
            data = self._partial + data
            self._partial = b""
        view = memoryview(data)
        offset, end = 0, len(data)
        while True:
            if self._left:
                size = min(self._left, end - offset)
                self._payload(view[offset : offset + size], end, events)
                offset += size
                if self._left:
                    return events
            if end - offset < HEADER_SIZE:
                if offset < end:
                    self._partial = data[offset:]
                return events
            version, kind, flags, stream_id, length = HEADER.unpack_from(data, offset)
            offset += HEADER_SIZE
            if version:
                raise RemoteProtocolError(f"yamux version {version} is not supported")
            if not (kind or flags) and (stream := self._takes(stream_id, length, end - offset)) is not None:
                stream.on_data(view[offset : offset + length], end)
                events.append(Readable(stream))
                offset += length
            elif kind <= FrameType.WINDOW:
                self._stream_frame(kind, flags, stream_id, length, events)
            else:
                self._session_frame(kind, flags, length, events)

    def _takes(self, stream_id: int, size: int, available: int) -> MuxStream | None:
        """Whose DATA frame this is, if it has no flags, is here in one piece and allowed, as most are; else None."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.remote_fin or not 0 < size <= stream.recv_credit or size > available:
            return None
        stream.recv_credit -= size
        tally, priority = self.tally, stream.priority
        tally.frames_in[priority] += 1
        tally.bytes_in[priority] += size
        return stream

    def _session_frame(self, kind: int, flags: int, value: int, events: list[Event]) -> None:
        self.tally.control_in += 1
        if kind == FrameType.PING:
            self._ping_frame(flags, value, events)
        elif kind == FrameType.GO_AWAY:
            self.went_away = True
            self.tally.go_aways_in += 1
            events.append(WentAway(value))
        else:
            raise RemoteProtocolError(f"yamux frame type {kind} is not known")

    def _ping_frame(self, flags: int, opaque: int, events: list[Event]) -> None:
        if flags & Flag.SYN:
            self._queue(HEADER.pack(0, FrameType.PING, Flag.ACK, 0, opaque))
        elif flags & Flag.ACK:
            events.append(Pong(opaque))

    def _stream_frame(self, kind: int, flags: int, stream_id: int, length: int, events: list[Event]) -> None:
        if flags & Flag.SYN:
            self._accept(stream_id, events)
        stream = self._streams.get(stream_id)
        if stream is None:
            if kind == FrameType.DATA:
                self._left, self._target, self._end_flags = length, None, 0
                self.tally.stale_bytes_in += length
                self.tally.stale_frames_in += 1
            else:
                self.tally.control_in += 1
            return
        if flags & Flag.ACK and not stream.acked:
            stream.acked = True
            self.unacked -= 1
            events.append(Writable(stream))
        if kind == FrameType.DATA and length:
            if length > stream.recv_credit or stream.remote_fin:
                allowed = 0 if stream.remote_fin else stream.recv_credit
                raise RemoteProtocolError(f"yamux stream {stream_id}: {length} bytes sent, only {allowed} allowed")
            stream.recv_credit -= length
            self.tally.frames_in[stream.priority] += 1
            self.tally.bytes_in[stream.priority] += length
            self._left, self._target, self._end_flags = length, stream, flags & (Flag.FIN | Flag.RST)
            return
        if kind == FrameType.WINDOW and length:
            stream.on_window(length)
            self.schedule(stream)
            events.append(Writable(stream))
        if kind == FrameType.DATA:
            self.tally.frames_in[stream.priority] += 1
        else:
            self.tally.control_in += 1
        self._end(stream, flags, events)

    def _payload(self, chunk: memoryview, whole: int, events: list[Event]) -> None:
        """Part of the current DATA frame; its FIN or RST counts when the last byte is here."""
        self._left -= len(chunk)
        stream = self._target
        if stream is None:
            return
        if stream.reset_by is None and len(chunk):
            stream.on_data(chunk, whole)
            events.append(Readable(stream))
        if not self._left:
            self._target = None
            self._end(stream, self._end_flags, events)

    def _end(self, stream: MuxStream, flags: int, events: list[Event]) -> None:
        if stream.reset_by is not None:
            return
        if flags & Flag.RST:
            self.tally.reset_there += 1
            self._forget(stream, "the peer reset the stream")
            events.append(Readable(stream))
        elif flags & Flag.FIN and not stream.remote_fin:
            stream.remote_fin = True
            events.append(Readable(stream))
            self._half_closed(stream)

    def _accept(self, stream_id: int, events: list[Event]) -> None:
        if stream_id == 0 or stream_id % 2 == self._next_id % 2:
            raise RemoteProtocolError(f"the peer opened yamux stream {stream_id}, an id that is ours to give")
        if stream_id in self._streams:
            raise RemoteProtocolError(f"the peer opened yamux stream {stream_id} twice")
        if self.went_away or self.inbound >= MAX_INBOUND:
            self.tally.turned_away += 1
            self._queue(HEADER.pack(0, FrameType.WINDOW, Flag.RST, stream_id, 0))
            return
        stream = self.stream_class(self, stream_id, inbound=True)
        self.tally.opened_there += 1
        self.inbound += 1
        self._add(stream)
        events.append(Opened(stream))

    # -- the table --

    def _add(self, stream: MuxStream) -> None:
        self._streams[stream.id] = stream
        self._windows[stream.id] = stream

    def _half_closed(self, stream: MuxStream) -> None:
        if stream.remote_fin and stream.fin_sent:
            self.tally.closed += 1
            self._remove(stream)

    def _forget(self, stream: MuxStream, reason: str) -> None:
        stream.discard(reason)
        self._remove(stream)

    def _remove(self, stream: MuxStream) -> None:
        """Take a finished stream out of the table; what it received can still be read."""
        if self._streams.pop(stream.id, None) is None:
            return
        self._windows.pop(stream.id, None)  # nothing of it may stay in a queue: a stuck link sees thousands go
        if stream.held:
            self._ended[stream] = None
        if stream.in_ready:
            next(queue for queue in self._ready if stream in queue).remove(stream)
            stream.in_ready = False
        if stream.inbound:
            self.inbound -= 1
        elif not stream.acked:
            stream.acked = True
            self.unacked -= 1
        for budget in self._budgets:
            budget.give_back(stream.window - INITIAL_WINDOW)

    def close(self) -> None:
        """The connection is gone: return every budget; streams keep what they have received."""
        for stream in self.streams():
            self._remove(stream)
        self.share(HeldMemory())
