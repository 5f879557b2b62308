"""Recorded yamux sessions replay to the identical records, and a trace that was tampered with names the line."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.recorder import Headers, RecordingSession
from swarmnode.protocol.replay import replay
from swarmnode.protocol.trace import TraceEvent, encode, header
from swarmnode.protocol.yamux import MAX_CONTROL, Budget, Opened, Session
from swarmnode.protocol.yamux_frames import HEADER, Flag, FrameType, GoAway, Priority

SECRET = b"the prompt of somebody"


class Recorded:
    """A recording client and a recording server, joined by a link that cuts bytes at random."""

    def __init__(self, rng, *, node_bytes=None):
        self.rng = rng
        self.lines = {}
        self.now = 0.0
        budget = Budget(node_bytes) if node_bytes is not None else None
        self.client = self._session(True, budget)
        self.server = self._session(False, budget)
        self.accepted = []

    def _session(self, client, budget):
        lines = self.lines[client] = [header(title="test", client=client, wall=0.0, time=0.0)]
        session = RecordingSession(
            client=client,
            node_budget=budget,
            emit=lambda name, data: lines.append(encode(TraceEvent(self.now, name, data))),
        )
        session.rtt_s = 0.5
        return session

    def carry(self, source, target):
        out = memoryview(bytearray(self.rng.choice((100, 5000, 65519))))
        size = source.fill(out)
        source.drained.clear()
        self.now += 0.01
        target.now = self.now
        data = bytes(out[:size])
        while data:
            cut = self.rng.randint(1, len(data))
            for event in target.receive(data[:cut]):
                if isinstance(event, Opened):
                    self.accepted.append(event.stream)
            data = data[cut:]
        return size

    def framed(self, stream, message):
        """Past the queues, as a wire does with short messages; None: it must queue."""
        target = self.server if stream.session is self.client else self.client
        frame = stream.session.frame_now(stream, message)
        if frame is not None:
            self.accepted += [event.stream for event in target.receive(frame) if isinstance(event, Opened)]
        return frame

    def settle(self):
        while self.carry(self.client, self.server) + self.carry(self.server, self.client):
            pass


def busy(seed, *, node_bytes=None, steps=400):
    """A random life of a connection: everything an owner can call, both ends."""
    rng = random.Random(seed)
    pair = Recorded(rng, node_bytes=node_bytes)
    mine = []
    for _ in range(steps):
        action = rng.randrange(13)
        everyone = mine + pair.accepted
        stream = rng.choice(everyone) if everyone else None
        if action == 0 or stream is None:
            if pair.client.unacked < 200 and not pair.client.went_away:
                mine.append(pair.client.open())
        elif action == 1:
            stream.priority = rng.choice(tuple(Priority))
            stream.protocol = "/test/\x1b[2J"
        elif action in (2, 3) and not stream.fin_due and stream.reset_by is None:
            message = SECRET, bytes(rng.choice((0, 10, 70_000, 700_000)))
            if rng.random() < 0.5 or pair.framed(stream, message) is None:
                stream.send(message)
        elif action == 4:
            stream.want(rng.choice((0, 100_000)))
            if rng.random() < 0.3:
                stream.wanted = 0
        elif action in (5, 6):
            taken = stream.take(rng.choice((1, 1000, 1 << 20)))
            if rng.random() < 0.1:
                stream.unread(taken[-5:])
        elif action == 7 and rng.random() < 0.3:
            stream.finish()
        elif action == 8 and rng.random() < 0.3:
            stream.session.reset(stream, "enough")
        elif action == 9 and rng.random() < 0.2:
            stream.ignore_input()
        elif action == 10 and rng.random() < 0.2:
            stream.withdraw()
        elif action == 11:
            rng.choice((pair.client, pair.server)).ping(rng.randrange(100))
        else:
            pair.carry(*rng.choice(((pair.client, pair.server), (pair.server, pair.client))))
    pair.settle()
    pair.client.go_away()
    pair.settle()
    pair.client.close()
    pair.server.close()
    return pair


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("node_bytes", [None, 2 << 20])
def test_a_random_life_replays_to_the_same_records(seed, node_bytes):
    pair = busy(seed, node_bytes=node_bytes)
    for client in (True, False):
        found = replay(pair.lines[client])
        assert found.departure is None, str(found.departure)
        assert found.complete
        assert found.client is client
        assert found.records == len(pair.lines[client]) - 1
        assert found.frames_in > 20
        assert found.frames_out > 20
        assert found.streams > 5


@pytest.mark.parametrize("node_bytes", [None, 2 << 20])
def test_windows_grow_and_denials_of_the_node_are_in_the_trace(node_bytes):
    pair = Recorded(random.Random(0), node_bytes=node_bytes)
    stream = pair.client.open()
    stream.send((bytes(8 << 20),))
    while stream.queued:
        pair.carry(pair.client, pair.server)
        pair.accepted[0].take(1 << 20)
        pair.carry(pair.server, pair.client)
    assert bool(pair.server.tally.windows_grown) == (node_bytes is None)
    grants = [json.loads(line)["data"].get("granted", []) for line in pair.lines[False][1:]]
    assert any(False in answers for answers in grants) == (node_bytes is not None)
    assert replay(pair.lines[False]).departure is None


def test_recording_changes_nothing():
    """The recorder's frames are those of a plain session given the same calls."""
    plain, recording = Session(client=True), RecordingSession(client=True, emit=lambda *_: None)
    outputs = []
    for session in (plain, recording):
        stream = session.open()
        stream.priority = Priority.DECODE
        stream.send((SECRET,))
        stream.finish()
        session.ping(5)
        session.receive(HEADER.pack(0, FrameType.WINDOW, Flag.ACK, 1, 5))
        session.reset(session.open(), "no")
        session.go_away(GoAway.NORMAL)
        out = memoryview(bytearray(4096))
        outputs.append(bytes(out[: session.fill(out)]))
    assert outputs[0] == outputs[1]
    assert SECRET in outputs[0]


def test_no_payload_is_in_a_trace():
    pair = busy(3)
    for lines in pair.lines.values():
        text = "\n".join(lines)
        assert SECRET.decode() not in text
        assert SECRET.hex() not in text
        assert text.replace("\n", "").isprintable()


def tampered(lines, name, change):
    """The trace with the first record of a name changed, and its line number."""
    lines = list(lines)
    for index, line in enumerate(lines):
        body = json.loads(line)
        if body.get("name") == name and change(body["data"]) is not False:
            lines[index] = json.dumps(body)
            return lines, index + 1
    raise AssertionError(f"no {name}")


def _more_credit(data):
    frames = [frame for frame in data["frames"] if frame[0] == FrameType.WINDOW]
    if not frames:
        return False
    frames[0][3] += 1
    return None


@pytest.mark.parametrize(
    ("name", "change", "expected", "got"),
    [
        ("yamux:frames_sent", _more_credit, '"frames"', '"frames"'),
        ("yamux:frames_received", lambda d: d["events"].append(["pong", 1]), '["pong",1]', '"events"'),
        ("yamux:stream_taken", lambda d: d.update(length=d["length"] + 1), '"length"', '"length"'),
        ("yamux:stream_opened", lambda d: d["state"].__setitem__(0, 99), "[99,", '"state":[1,'),
        ("yamux:session_started", lambda d: d["rules"].update(max_inbound=1), '"max_inbound":1,', '"max_inbound":512'),
    ],
)
def test_a_changed_trace_shows_where_it_departs(name, change, expected, got):
    lines, number = tampered(busy(2).lines[True], name, change)
    found = replay(lines)
    assert not found.complete
    departure = found.departure
    assert departure.line == number
    assert departure.name == name
    assert expected in departure.expected
    assert got in departure.got
    assert str(departure).startswith(f"line {number}, {name}: expected ")


def test_a_missing_call_shows_where_it_is_missed():
    lines = list(busy(2).lines[True])
    gone = next(i for i, line in enumerate(lines) if '"yamux:stream_written"' in line and '"length":0' not in line)
    del lines[gone]
    departure = replay(lines).departure
    assert departure is not None
    assert departure.line > gone


def test_a_peers_fault_replays_to_the_same_error():
    pair = Recorded(random.Random(0))
    pair.client.receive(HEADER.pack(0, FrameType.PING, Flag.SYN, 0, 7))
    bad = HEADER.pack(3, FrameType.DATA, 0, 1, 10)
    with pytest.raises(RemoteProtocolError, match="version 3"):
        pair.client.receive(bad[:5]) or pair.client.receive(bad[5:] + SECRET)
    pair.client.go_away(GoAway.PROTOCOL_ERROR)
    pair.client.close()
    lines = pair.lines[True]
    assert json.loads(lines[-3])["data"]["error"] == "yamux version 3 is not supported"
    found = replay(lines)
    assert found.departure is None, str(found.departure)
    assert found.complete


@pytest.mark.parametrize(
    "junk",
    [
        HEADER.pack(0, 9, 0, 1, 10) + SECRET * 9,
        HEADER.pack(0, FrameType.DATA, Flag.SYN, 1, 10) * 2,
        HEADER.pack(0, FrameType.WINDOW, Flag.SYN, 2, 0) + HEADER.pack(0, FrameType.WINDOW, 0, 2, 0xFFFFFFFF) * 2,
        HEADER.pack(0, FrameType.PING, Flag.SYN, 0, 1) * (MAX_CONTROL + 1),
    ],
)
def test_faults_of_many_kinds_replay(junk):
    pair = Recorded(random.Random(0))
    with pytest.raises(RemoteProtocolError):
        pair.client.receive(junk)
    assert replay(pair.lines[True]).departure is None
    assert SECRET.hex() not in "".join(pair.lines[True])


def test_a_cut_trace_replays_as_far_as_it_goes():
    lines = busy(4).lines[False]
    found = replay(lines[: len(lines) // 2])
    assert found.departure is None
    assert not found.complete


def test_events_of_other_layers_are_passed_over():
    lines = list(busy(4).lines[False])
    for name in ("connectivity:phase_changed", "security:peer_authenticated", "trace:truncated"):
        lines.insert(3, encode(TraceEvent(0.0, name, {})))
    assert replay(lines).departure is None


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_headers_are_found_however_the_bytes_are_cut(chunks):
    whole = Headers().feed(b"".join(chunks))
    scanner = Headers()
    assert [frame for chunk in chunks for frame in scanner.feed(chunk)] == whole


START = encode(TraceEvent(0.0, "yamux:session_started", {}))


def _line(name, **data):
    return encode(TraceEvent(0.0, f"yamux:{name}", data))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (START, "starts twice"),
        (_line("stream_wanted", stream=1, length=1), "stream 1 was never opened"),
        (_line("stream_wanted", stream="1"), "stream: an integer"),
        (_line("frames_sent", room=1 << 40), "room: an integer in"),
        (_line("frames_received", size=1 << 40), "size: an integer in"),
        (_line("frames_received", size=1, frames=7), "frames: a list"),
        (_line("frames_received", size=1, frames=[[1, 2]]), "a frame is"),
        (_line("frames_received", size=1, frames=[[0, 0, 0, 1 << 32]]), "do not fit"),
        (_line("frames_received", size=1, frames=[[0, 0, 0, True]]), "a frame is"),
        (_line("frames_received", size=1, frames=[], tail="xx"), "tail: hexadecimal"),
        (_line("frames_received", size=1, frames=[], tail="00" * 12), "less than a header"),
        (_line("frames_received", size=1, frames=[], tail=""), "its frames make 0 bytes"),
        (_line("ping_sent", opaque=-1), "opaque"),
        (_line("go_away_sent", code=9), "code"),
        (_line("frames_sent", room=True), "room"),
        (_line("nonsense", stream=1), "stream 1 was never opened"),
        (_line("ping_sent", opaque=1, now="x"), "now: a number"),
        (_line("ping_sent", opaque=1, now=10**400), "now: a number"),
        (_line("ping_sent", opaque=1, rtt=float("nan")), "rtt: a number"),
        (_line("ping_sent", opaque=1, granted=5), "granted: a list"),
        ("nonsense", "not JSON"),
    ],
)
def test_a_trace_that_makes_no_sense_is_refused_with_its_line(line, words):
    first = header(title="t", client=True, wall=0.0, time=0.0)
    start = json.dumps({"time": 0, "name": "yamux:session_started", "data": _started()})
    with pytest.raises(ConfigError, match=f"line 3: .*{words}"):
        replay([first, start, line])


def _started():
    records = []
    RecordingSession(client=True, emit=lambda name, data: records.append(data))
    return records[0]


def test_a_record_before_the_start_and_an_empty_file_are_refused():
    with pytest.raises(ConfigError, match=r"line 2: .*before yamux:session_started"):
        replay([header(title="t", client=True, wall=0.0, time=0.0), _line("ping_sent", opaque=1)])
    with pytest.raises(ConfigError, match="line 1: not JSON"):
        replay([])


JUNK = st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3))
NAMES = (
    *("frames_received", "frames_sent", "stream_opened", "ping_sent", "go_away_sent", "session_closed"),
    *("stream_reset", "stream_written", "stream_wanted", "stream_taken", "stream_unread", "stream_priority", "other"),
)
KEYS = (
    *("size", "frames", "tail", "room", "opaque", "code", "stream", "length", "most", "priority", "protocol"),
    *("now", "rtt", "granted"),
)


def test_fields_of_another_kind_are_a_departure():
    first = header(title="t", client=True, wall=0.0, time=0.0)
    start = json.dumps({"time": 0, "name": "yamux:session_started", "data": _started()})
    departure = replay([first, start, _line("frames_sent", room=100, frames=7, state="x")]).departure
    assert departure.line == 3
    assert '"frames":7' in departure.expected


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(KEYS), JUNK | st.integers(0, 3), max_size=6)),
        max_size=5,
    )
)
def test_junk_traces_end_in_a_departure_or_a_named_line(records):
    first = header(title="t", client=True, wall=0.0, time=0.0)
    start = json.dumps({"time": 0, "name": "yamux:session_started", "data": _started()})
    told = ""
    try:
        replay([first, start, *(_line(name, **data) for name, data in records)])
    except ConfigError as exc:
        told = str(exc)
    assert not told or told.startswith("line ")
