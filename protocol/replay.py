"""Replays a traced connection through a fresh yamux session and says where the two part.

The trace holds every call that the recorded session was given, with lengths instead of payload. The same calls
are made here, zeros for payload, on a session that records itself; each record must equal the recorded one, in
frames, events and state. So a bug report's trace reproduces a fault without anybody's secret, and a change of
yamux that changes behaviour shows at the first line that differs.

A trace may come from a stranger: every number is checked before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from .errors import ConfigError, LocalProtocolError, RemoteProtocolError
from .recorder import RecordingSession
from .trace import TraceEvent, check_header, clean, decode
from .yamux import Budget, Opened
from .yamux_frames import HEADER, FrameType, GoAway, Priority
from .yamux_stream import MuxStream

MAX_CHUNK: Final = 1 << 20
"""Plaintext of one call: a Noise message is smaller."""
MAX_WRITE: Final = 1 << 32
"""Bytes of one write."""
MAX_STREAMS: Final = 1 << 20
"""Streams of one trace."""
MAX_TIME: Final = 1e15
"""Seconds; JSON has numbers that are none, and integers that fit no float."""
MAX_SHOWN: Final = 2000
"""Characters of what was expected and what came."""
_SKIPPED: Final = ("trace:", "connectivity:", "security:")
_ZEROS: Final = memoryview(bytes(1 << 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """Where the replay does something else than was recorded."""

    line: int
    """In the file, from 1."""
    name: str
    """The record's name."""
    expected: str
    """The recorded fields that differ, as JSON."""
    got: str
    """The same fields in the replay."""

    def __str__(self) -> str:
        return f"line {self.line}, {self.name}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay found."""

    client: bool
    """The recorder dialed, by negotiated role."""
    records: int
    """Calls made to the session."""
    frames_in: int
    frames_out: int
    streams: int
    complete: bool
    """The trace reaches to the connection's end; else it was cut by its size, or by a crash."""
    departure: Departure | None
    """None: the same to the last record."""


def replay(lines: Iterable[str]) -> Replayed:
    """Replay a trace, up to its first departure. Raises ConfigError, naming the line, for what is no trace."""
    numbered = enumerate(lines, 1)
    try:
        client = check_header(next(numbered, (1, ""))[1])
    except ConfigError as exc:
        raise ConfigError(f"line 1: {exc}") from None
    run = _Run(client)
    for number, line in numbered:
        try:
            event = decode(line)
            departure = run.step(number, event)
        except ConfigError as exc:
            raise ConfigError(f"line {number}: {exc}") from None
        if departure is not None:
            return run.result(departure)
    return run.result(None)


class _Answers(Budget):
    """The node's budget, answering as it did then."""

    def __init__(self) -> None:
        super().__init__(0)
        self.answers: list[bool] = []

    def draw(self, size: int) -> bool:
        return self.answers.pop(0) if self.answers else False

    def give_back(self, size: int) -> None:
        """What it holds is of no interest."""


class _Run:
    """One replay under way."""

    def __init__(self, client: bool) -> None:
        self.client = client
        self._budget = _Answers()
        self._produced: list[tuple[str, dict[str, Any]]] = []
        self._session: RecordingSession | None = None
        self._streams: dict[int, MuxStream] = {}
        self._incoming = _Incoming()
        self.records = self.frames_in = self.frames_out = 0
        self.complete = False

    def result(self, departure: Departure | None) -> Replayed:
        return Replayed(
            client=self.client,
            records=self.records,
            frames_in=self.frames_in,
            frames_out=self.frames_out,
            streams=len(self._streams),
            complete=self.complete,
            departure=departure,
        )

    def step(self, line: int, event: TraceEvent) -> Departure | None:
        """Make one recorded call, and compare. Raises ConfigError."""
        if event.name.startswith(_SKIPPED):
            return None
        self._produced.clear()
        granted = event.data.get("granted", [])
        if not isinstance(granted, list):
            raise ConfigError("granted: a list is expected")
        self._budget.answers = [answer is True for answer in granted]
        try:
            self._call(event.name, event.data)
        except RemoteProtocolError:
            pass  # it is in the record
        except LocalProtocolError as exc:
            return Departure(line=line, name=event.name, expected="the call to succeed", got=clean(str(exc)))
        self.records += 1
        self._count()
        return self._compare(line, event)

    def _count(self) -> None:
        for name, data in self._produced:
            frames = len(data.get("frames", ()))
            self.frames_in += frames if name == "yamux:frames_received" else 0
            self.frames_out += frames if name != "yamux:frames_received" else 0

    def _compare(self, line: int, event: TraceEvent) -> Departure | None:
        name, data = self._produced[0] if self._produced else ("nothing", {})
        if name != event.name:
            return Departure(line=line, name=event.name, expected=event.name, got=name)
        same = json.loads(json.dumps(data))
        differing = sorted(key for key in {*same, *event.data} if same.get(key) != event.data.get(key))
        if not differing:
            return None
        expected, got = ({key: body[key] for key in differing if key in body} for body in (event.data, same))
        return Departure(line=line, name=event.name, expected=_shown(expected), got=_shown(got))

    # -- the calls --

    def _call(self, name: str, data: Any) -> None:
        if name == "yamux:session_started":
            if self._session is not None:
                raise ConfigError("the session starts twice")
            self._session = RecordingSession(client=self.client, node_budget=self._budget, emit=self._emit)
            return
        session = self._session
        if session is None:
            raise ConfigError(f"{name} before yamux:session_started")
        self._settings(session, data)
        if name == "yamux:frames_received":
            self._receive(session, data)
        elif name == "yamux:frames_sent":
            session.fill(memoryview(bytearray(_integer(data, "room", MAX_CHUNK))))
            session.drained.clear()
        elif name == "yamux:stream_opened":
            self._keep(session.open())
        elif name == "yamux:ping_sent":
            session.ping(_integer(data, "opaque", 0xFFFFFFFF))
        elif name == "yamux:go_away_sent":
            session.go_away(GoAway(_integer(data, "code", max(GoAway))))
        elif name == "yamux:session_closed":
            self.complete = True
            session.close()
        else:
            self._stream_call(session, name.removeprefix("yamux:"), self._stream(data), data)

    def _stream_call(self, session: RecordingSession, name: str, stream: MuxStream, data: Any) -> None:
        if name == "stream_reset":
            session.reset(stream, str(data.get("reason")))
        elif name == "stream_written":
            length = _integer(data, "length", MAX_WRITE)
            stream.send(tuple(_zeros(length)))
        elif name == "stream_framed":
            session.frame_now(stream, tuple(_zeros(_integer(data, "length", MAX_WRITE))))
        elif name == "stream_finished":
            stream.finish()
        elif name == "stream_withdrawn":
            stream.withdraw()
        elif name == "stream_wanted":
            stream.want(_integer(data, "length", MAX_WRITE))
        elif name == "stream_wanted_set":
            stream.wanted = _integer(data, "length", MAX_WRITE)
        elif name == "stream_taken":
            stream.take(_integer(data, "most", 1 << 62))
        elif name == "stream_unread":
            stream.unread(bytes(_integer(data, "length", MAX_CHUNK)))
        elif name == "stream_ignored":
            stream.ignore_input()
        elif name == "stream_priority":
            stream.priority = Priority(_integer(data, "priority", max(Priority)))
        elif name == "stream_protocol":
            stream.protocol = str(data.get("protocol"))
        else:
            raise ConfigError(f"{clean(name)}: not a record of this schema")

    def _settings(self, session: RecordingSession, data: Any) -> None:
        for key, attribute in (("now", "now"), ("rtt", "rtt_s")):
            if key in data:
                value = data[key]
                if not isinstance(value, int | float) or not abs(value) <= MAX_TIME:
                    raise ConfigError(f"{key}: a number of seconds is expected")
                setattr(session, attribute, float(value))
        if "frame_limit" in data:
            session.frame_limit = _integer(data, "frame_limit", MAX_CHUNK)

    def _receive(self, session: RecordingSession, data: Any) -> None:
        plain = self._incoming.bytes_of(data)
        for event in session.receive(plain):
            if isinstance(event, Opened):
                self._keep(event.stream)

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        self._produced.append((name, data))

    def _keep(self, stream: MuxStream) -> None:
        if len(self._streams) >= MAX_STREAMS:
            raise ConfigError(f"over {MAX_STREAMS} streams")
        self._streams[stream.id] = stream

    def _stream(self, data: Any) -> MuxStream:
        number = _integer(data, "stream", 0xFFFFFFFF)
        if number not in self._streams:
            raise ConfigError(f"stream {number} was never opened")
        return self._streams[number]


class _Incoming:
    """Makes the peer's bytes from headers and lengths, in the same pieces."""

    def __init__(self) -> None:
        self._owed = 0  # payload still to come
        self._begun = 0  # bytes of the next header already given
        self._lost = False

    def bytes_of(self, data: Any) -> bytes:
        """The plaintext of one frames_received record. Raises ConfigError when its numbers contradict each other."""
        size = _integer(data, "size", MAX_CHUNK)
        plain = bytearray(min(size, self._owed))
        self._owed -= len(plain)
        for header, payload in _frames(data):
            if payload is None:  # nothing was recorded behind it
                self._lost = True
                plain += header[self._begun :]
                break
            plain += header[self._begun :]
            self._begun = 0
            given = min(payload, max(0, size - len(plain)))
            plain += _ZEROS[:given]
            self._owed = payload - given
        if self._lost:
            return bytes(plain.ljust(size, b"\0"))
        tail = _tail(data)
        plain += tail[self._begun :] if len(tail) >= self._begun else b""
        self._begun = len(tail)
        if len(plain) != size:
            raise ConfigError(f"size is {size}, but its frames make {len(plain)} bytes")
        return bytes(plain)


def _frames(data: Any) -> Iterator[tuple[bytes, int | None]]:
    """Header and payload length of each frame; no length of one that no session accepts."""
    frames = data.get("frames")
    if not isinstance(frames, list) or len(frames) > MAX_CHUNK // HEADER.size:
        raise ConfigError("frames: a list is expected")
    for frame in frames:
        if not isinstance(frame, list) or len(frame) not in (4, 5) or not all(type(item) is int for item in frame):
            raise ConfigError("a frame is [type, flags, stream, length]")
        kind, flags, stream, length, *version = frame
        bounded = 0 <= kind < 256 and 0 <= flags < 1 << 16 and 0 <= stream < 1 << 32 and 0 <= length < 1 << 32
        if not bounded or not all(0 <= item < 256 for item in version):
            raise ConfigError("a frame's numbers do not fit its header")
        header = HEADER.pack(version[0] if version else 0, kind, flags, stream, length)
        if version:
            yield header, None
        else:
            yield header, length if kind == FrameType.DATA else 0


def _tail(data: Any) -> bytes:
    tail = data.get("tail")
    try:
        raw = bytes.fromhex(tail if isinstance(tail, str) else "?")
    except ValueError:
        raise ConfigError("tail: hexadecimal digits are expected") from None
    if len(raw) >= HEADER.size:
        raise ConfigError("tail: less than a header is expected")
    return raw


def _zeros(length: int) -> Iterator[memoryview]:
    while length:
        yield _ZEROS[:length]
        length -= min(length, len(_ZEROS))


def _integer(data: Any, key: str, high: int) -> int:
    value = data.get(key)
    if type(value) is not int or not 0 <= value <= high:
        raise ConfigError(f"{key}: an integer in 0..{high} is expected")
    return value


def _shown(fields: dict[str, Any]) -> str:
    return clean(json.dumps(fields, sort_keys=True, separators=(",", ":")), MAX_SHOWN)
