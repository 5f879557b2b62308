"""A yamux session that tells everything it is given and everything it does, so that it can be replayed.

Used instead of Session while a connection is traced; nothing of this is on the path of a connection that is not.
A session is a pure function of the calls made to it. So each call is one record: its arguments as lengths, the
frames it took or made as headers, the events it returned, and the state that it left. protocol/replay.py makes
the same calls to a fresh session, with zeros for payload, and compares the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from .connection import Connection, Phase
from .errors import RemoteProtocolError
from .noise import StaticKey
from .tally import Tally
from .trace import clean
from .yamux import (
    MAX_INBOUND,
    MAX_UNACKED,
    STREAM_WINDOW,
    WINDOW_BUDGET,
    Budget,
    Event,
    Opened,
    Pong,
    Session,
    WentAway,
)
from .yamux_frames import HEADER, HEADER_SIZE, FrameType, GoAway, Priority
from .yamux_stream import MAX_WINDOW, MuxStream, Part, Readable

Emit = Callable[[str, dict[str, Any]], None]
"""Takes a record: its name and its data, which belong to the taker."""
RULES: Final = {
    "max_inbound": MAX_INBOUND,
    "max_unacked": MAX_UNACKED,
    "max_window": MAX_WINDOW,
    "stream_window": STREAM_WINDOW,
    "window_budget": WINDOW_BUDGET,
}
"""Bounds that decide what a session does; a replay under others departs in its first line."""


class Headers:
    """Finds the frame headers in a byte stream that arrives in pieces; skips the payload.

    A header that no session accepts ends it: what follows, and the rest of that header, may be anybody's payload.
    """

    def __init__(self) -> None:
        self._left = 0
        self._lost = False
        self.tail = b""
        """The beginning of a header that is not complete yet."""

    def feed(self, data: bytes | memoryview) -> list[list[int]]:
        """[type, flags, stream, length] of each header completed here; [type, 0, 0, 0, version] of a bad one."""
        found: list[list[int]] = []
        if self._lost:
            return found
        offset = min(self._left, len(data))
        self._left -= offset
        while not self._left and offset < len(data):
            piece = bytes(data[offset : offset + HEADER_SIZE - len(self.tail)])
            self.tail += piece
            offset += len(piece)
            if len(self.tail) < HEADER_SIZE:
                break
            version, kind, flags, stream, length = HEADER.unpack(self.tail)
            self.tail = b""
            if version or kind > FrameType.GO_AWAY:
                self._lost = True
                return [*found, [kind, 0, 0, 0, version]]
            found.append([kind, flags, stream, length])
            if kind == FrameType.DATA:
                skipped = min(length, len(data) - offset)
                self._left = length - skipped
                offset += skipped
        return found


class _Witness(Budget):
    """Passes on to the node's budget and keeps what it answered: that depends on other connections."""

    def __init__(self, real: Budget) -> None:
        super().__init__(real.limit)
        self._real = real
        self.answers: list[bool] = []

    def draw(self, size: int) -> bool:
        self.answers.append(self._real.draw(size))
        return self.answers[-1]

    def give_back(self, size: int) -> None:
        self._real.give_back(size)


class _Silence:
    """While it is entered, a call is being recorded: what that calls itself is not."""

    def __init__(self) -> None:
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *exc: object) -> None:
        self.depth -= 1


class RecordingStream(MuxStream):
    """A stream whose owner's calls are recorded."""

    __slots__ = ("_priority", "_protocol", "_wanted")

    session: RecordingSession

    @property
    def priority(self) -> Priority:
        """See MuxStream."""
        return self._priority

    @priority.setter
    def priority(self, value: Priority) -> None:
        self._priority = value
        self.session.told("stream_priority", self, priority=int(value))

    @property
    def protocol(self) -> str:
        """See MuxStream."""
        return self._protocol

    @protocol.setter
    def protocol(self, value: str) -> None:
        self._protocol = value
        self.session.told("stream_protocol", self, protocol=clean(value))

    @property
    def wanted(self) -> int:
        """See MuxStream."""
        return self._wanted

    @wanted.setter
    def wanted(self, value: int) -> None:
        self._wanted = value
        self.session.told("stream_wanted_set", self, length=value)

    def send(self, parts: tuple[Part, ...]) -> None:
        """See MuxStream."""
        before = self.queued
        with self.session.silence:
            super().send(parts)
        self.session.told("stream_written", self, length=self.queued - before)

    def finish(self) -> None:
        """See MuxStream."""
        with self.session.silence:
            super().finish()
        self.session.told("stream_finished", self)

    def withdraw(self) -> None:
        """See MuxStream."""
        with self.session.silence:
            super().withdraw()
        self.session.told("stream_withdrawn", self)

    def want(self, size: int) -> None:
        """See MuxStream."""
        with self.session.silence:
            super().want(size)
        self.session.told("stream_wanted", self, length=size)

    def take(self, max_bytes: int) -> bytes:
        """See MuxStream."""
        with self.session.silence:
            data = super().take(max_bytes)
        self.session.told("stream_taken", self, most=max_bytes, length=len(data))
        return data

    def unread(self, data: bytes) -> None:
        """See MuxStream."""
        with self.session.silence:
            super().unread(data)
        self.session.told("stream_unread", self, length=len(data))

    def ignore_input(self) -> None:
        """See MuxStream."""
        with self.session.silence:
            super().ignore_input()
        self.session.told("stream_ignored", self)

    def state(self) -> list[int]:
        """What must be the same in a replay: [buffered, receive credit, send credit, queued, window, flags]."""
        marks = (self.acked, self.remote_fin, self.fin_due, self.fin_sent, self.reset_by is not None, self.discarding)
        flags = sum(bool(mark) << bit for bit, mark in enumerate(marks))
        return [self.buffered, self.recv_credit, self.send_credit, self.queued, self.window, flags]


class RecordingSession(Session):
    """A session whose owner's calls are recorded."""

    stream_class = RecordingStream

    def __init__(self, *, client: bool, node_budget: Budget | None = None, emit: Emit) -> None:
        self._witness = _Witness(node_budget or Budget(WINDOW_BUDGET))
        self._emit = emit
        self.silence = _Silence()
        self._headers = Headers()
        self._settings: dict[str, float] = {}
        super().__init__(client=client, node_budget=self._witness)
        self._record("session_started", {"client": client, "rules": RULES})

    def open(self) -> MuxStream:
        """See Session."""
        with self.silence:
            stream = super().open()
        self._record("stream_opened", {"stream": stream.id}, (stream,))
        return stream

    def reset(self, stream: MuxStream, reason: str) -> None:
        """See Session."""
        with_error = self._guarded(lambda: super(RecordingSession, self).reset(stream, reason))
        self._record("stream_reset", {"stream": stream.id, "reason": clean(reason)}, (stream,), with_error)

    def ping(self, opaque: int) -> None:
        """See Session."""
        with_error = self._guarded(lambda: super(RecordingSession, self).ping(opaque))
        self._record("ping_sent", {"opaque": opaque}, (), with_error)

    def go_away(self, code: GoAway = GoAway.NORMAL) -> None:
        """See Session."""
        with self.silence:
            super().go_away(code)
        self._record("go_away_sent", {"code": int(code)})

    def close(self) -> None:
        """See Session."""
        with self.silence:
            super().close()
        tally = {name: getattr(self.tally, name) for name in Tally.__slots__}
        self._record("session_closed", {"tally": tally})

    def fill(self, out: memoryview) -> int:
        """See Session."""
        with self.silence:
            size = super().fill(out)
        frames = Headers().feed(out[:size])
        self._record("frames_sent", {"room": len(out), "size": size, "frames": frames}, self._touched(frames))
        return size

    def frame_now(self, stream: MuxStream, parts: tuple[Part, ...]) -> bytes | None:
        """See Session."""
        with self.silence:
            frame = super().frame_now(stream, parts)
        length = sum(memoryview(part).nbytes for part in parts)
        sent = Headers().feed(frame or b"")
        self._record("stream_framed", {"stream": stream.id, "length": length, "frames": sent}, (stream,))
        return frame

    def receive(self, data: bytes) -> list[Event]:
        """See Session."""
        frames = self._headers.feed(data)
        events: list[Event] = []
        with_error = self._guarded(lambda: events.extend(super(RecordingSession, self).receive(data)))
        told = [_told(event) for event in events]
        body = {"size": len(data), "frames": frames, "events": told, "tail": self._headers.tail.hex()}
        streams = {event.stream.id: event.stream for event in events if not isinstance(event, Pong | WentAway)}
        self._record("frames_received", body, streams.values(), with_error)
        return events

    def told(self, name: str, stream: MuxStream, **data: Any) -> None:
        """A stream's owner called it."""
        if not self.silence.depth:
            self._record(name, {"stream": stream.id} | data, (stream,))

    def _guarded(self, call: Callable[[], None]) -> RemoteProtocolError | None:
        with self.silence:
            try:
                call()
            except RemoteProtocolError as exc:
                return exc
        return None

    def _touched(self, frames: Iterable[list[int]]) -> list[MuxStream]:
        numbers = dict.fromkeys(frame[2] for frame in frames)
        return [self._streams[number] for number in numbers if number in self._streams]

    def _record(
        self,
        name: str,
        data: dict[str, Any],
        streams: Iterable[MuxStream] = (),
        error: RemoteProtocolError | None = None,
    ) -> None:
        now = {"now": self.now, "rtt": self.rtt_s, "frame_limit": self.frame_limit}
        data |= {key: value for key, value in now.items() if self._settings.get(key) != value}
        self._settings.update(now)
        if self._witness.answers:
            data["granted"], self._witness.answers = self._witness.answers, []
        data["state"] = [len(self), self.inbound, self.unacked, int(self.went_away), self._budgets[0].used]
        states = {str(s.id): s.state() for s in streams if isinstance(s, RecordingStream)}
        if states:
            data["streams"] = states
        if error is not None:
            data["error"] = clean(str(error))
        self._emit(f"yamux:{name}", data)
        if error is not None:
            raise error


def _told(event: Event) -> list[str | int]:
    if isinstance(event, Opened):
        return ["opened", event.stream.id]
    if isinstance(event, Pong):
        return ["pong", event.opaque]
    if isinstance(event, WentAway):
        return ["went_away", event.code]
    return ["readable" if isinstance(event, Readable) else "writable", event.stream.id]


class RecordingConnection(Connection):
    """A connection whose phases and whose session are recorded."""

    def __init__(self, static: StaticKey, *, emit: Emit, initiator: bool, **options: Any) -> None:
        self._emit = emit
        super().__init__(static, initiator=initiator, **options)
        self.session = RecordingSession(client=initiator, node_budget=options.get("node_budget"), emit=emit)

    @property
    def phase(self) -> Phase:
        """See Connection."""
        return self._phase

    @phase.setter
    def phase(self, value: Phase) -> None:
        self._phase = value
        self._emit("connectivity:phase_changed", {"phase": value.name.lower()})
