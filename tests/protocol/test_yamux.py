"""yamux sessions as pairs: golden bytes, windows, priorities, half-close, resets, every bound, any split,
any junk."""

import random

import pytest
from helpers.muxes import SessionPair
from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.protocol import yamux, yamux_stream
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.yamux import Budget, Opened, Pong, Session, WentAway
from swarmnode.protocol.yamux_frames import HEADER, INITIAL_WINDOW, Flag, FrameType, GoAway, Priority
from swarmnode.protocol.yamux_stream import Readable, Writable


def frame(kind, flags, stream_id, length, payload=b""):
    return HEADER.pack(0, kind, flags, stream_id, length) + payload


def test_known_bytes():
    pair = SessionPair()
    stream = pair.client.open()
    stream.send((b"hi", b"!"))
    stream.finish()
    extra = (yamux.STREAM_WINDOW - INITIAL_WINDOW).to_bytes(4, "big")
    assert pair.output(pair.client) == (
        b"\0\1\0\1\0\0\0\1" + extra  # WINDOW SYN announces the window
        + b"\0\0\0\4\0\0\0\1\0\0\0\3hi!"  # DATA FIN gathers the parts
    )  # fmt: skip
    server = pair.server
    server.receive(b"\0\1\0\1\0\0\0\1" + extra)
    assert pair.output(server) == b"\0\1\0\2\0\0\0\1" + extra  # WINDOW ACK
    server.receive(b"\0\2\0\1\0\0\0\0\0\0\0\7")
    assert pair.output(server) == b"\0\2\0\2\0\0\0\0\0\0\0\7"  # PING ACK
    server.go_away(GoAway.PROTOCOL_ERROR)
    assert pair.output(server) == b"\0\3\0\0\0\0\0\0\0\0\0\1"


def test_ids_follow_the_role():
    pair = SessionPair()
    assert [pair.client.open().id, pair.client.open().id] == [1, 3]
    assert [pair.server.open().id, pair.server.open().id] == [2, 4]


def test_both_directions_and_half_close():
    pair = SessionPair()
    mine, theirs = pair.open()
    mine.send((b"request",))
    mine.finish()
    pair.exchange()
    assert theirs.take(100) == b"request"
    assert theirs.at_eof
    theirs.send((b"answer",))
    theirs.finish()
    pair.exchange()
    assert mine.take(3) == b"ans"
    assert not mine.at_eof
    assert mine.take(100) == b"wer"
    assert mine.at_eof
    assert (len(pair.client), len(pair.server)) == (0, 0)


def test_parts_of_any_buffer_type_are_gathered():
    pair = SessionPair()
    mine, theirs = pair.open()
    numbers = memoryview(bytes(range(16))).cast("I", shape=[2, 2])
    mine.send((b"a", bytearray(b"b"), memoryview(b"xcx")[1:2], numbers, b""))
    pair.exchange()
    assert theirs.take(100) == b"abc" + bytes(range(16))


def test_a_message_that_is_alone_takes_the_short_way():
    pair = SessionPair()
    mine, theirs = pair.open()
    numbers = memoryview(bytes(range(16))).cast("I", shape=[2, 2])
    plain = pair.client.frame_now(mine, (b"head", bytearray(b"er"), numbers))
    assert plain == frame(FrameType.DATA, 0, mine.id, 22, b"header" + bytes(range(16)))
    assert pair.server.receive(plain) == [Readable(theirs)]
    assert theirs.take(100) == plain[12:]
    assert pair.client.tally.bytes_out == pair.server.tally.bytes_in == [0, 0, 22]
    credit = mine.send_credit
    mine.send_credit = 9
    assert pair.client.frame_now(mine, (bytes(10),)) is None
    assert pair.client.frame_now(mine, (bytes(4), bytes(5))) is not None
    assert mine.send_credit == 0
    mine.send_credit = credit


def test_the_short_way_overtakes_nothing():
    pair = SessionPair()
    mine, _ = pair.open()
    assert pair.client.frame_now(mine, ()) is None
    assert pair.client.frame_now(mine, (bytes(yamux.MAX_DATA + 1),)) is None
    assert pair.client.frame_now(mine, (bytes(yamux.MAX_DATA),)) is not None
    new = pair.client.open()
    assert pair.client.frame_now(new, (b"before its SYN",)) is None
    pair.exchange()
    new.send((b"first",))
    assert pair.client.frame_now(mine, (b"second",)) is None
    pair.exchange()
    new.send_credit = 0
    new.send((b"waits for credit",))
    assert not pair.client.has_output
    assert pair.client.frame_now(new, (b"later",)) is None
    assert pair.client.frame_now(mine, (b"another stream",)) is not None


def test_credit_stops_the_sender_until_the_reader_reads():
    pair = SessionPair()
    mine, theirs = pair.open()
    mine.send((bytes(3 * yamux.STREAM_WINDOW),))
    pair.exchange()
    assert theirs.buffered == yamux.STREAM_WINDOW
    assert mine.queued == 2 * yamux.STREAM_WINDOW
    theirs.take(yamux.STREAM_WINDOW // 2 - 1)
    pair.exchange()
    assert mine.queued == 2 * yamux.STREAM_WINDOW  # updates only at half a window
    theirs.take(1)
    pair.exchange()
    assert mine.queued == 2 * yamux.STREAM_WINDOW - yamux.STREAM_WINDOW // 2


def test_a_reader_that_wants_more_than_the_window_gets_it_without_a_pause():
    pair = SessionPair()
    mine, theirs = pair.open()
    size = 5 * yamux.STREAM_WINDOW
    theirs.want(size)
    mine.send((bytes(size + yamux.STREAM_WINDOW),))
    pair.exchange()
    assert theirs.buffered >= size
    assert theirs.buffered <= size + yamux.STREAM_WINDOW
    assert len(theirs.take(size)) == size


def test_windows_grow_when_they_are_what_limits():
    pair = SessionPair()
    mine, theirs = pair.open()
    pair.server.rtt_s = 0.1
    for step in range(40):
        pair.server.now = step * 0.01
        mine.send((bytes(max(0, theirs.window - mine.queued)),))
        pair.exchange()
        theirs.take(theirs.buffered)
        pair.exchange()
    assert theirs.window == yamux_stream.MAX_WINDOW


def test_windows_do_not_grow_on_a_slow_reader():
    pair = SessionPair()
    mine, theirs = pair.open()
    pair.server.rtt_s = 0.1
    for step in range(10):
        pair.server.now = 1.0 + step
        mine.send((bytes(theirs.window),))
        pair.exchange()
        theirs.take(theirs.buffered)
        pair.exchange()
    assert theirs.window == yamux.STREAM_WINDOW


def test_window_budget_is_shared_and_returned():
    pair = SessionPair()
    node = Budget(yamux.STREAM_WINDOW)  # room for one enlarged window
    pair.server = Session(client=False, node_budget=node)
    pair.events[pair.server] = []
    pair.client.open()
    pair.client.open()
    pair.exchange()
    first, second = pair.opened(pair.server)
    assert (first.window, second.window) == (yamux.STREAM_WINDOW, INITIAL_WINDOW)
    pair.server.reset(first, "test")
    assert node.used == 0
    pair.server.close()
    assert node.used == 0


def test_priorities_and_round_robin():
    pair = SessionPair()
    streams = [pair.client.open() for _ in range(3)]
    pair.exchange()
    pair.client.frame_limit = 1000
    for stream in streams[:2]:
        stream.send((bytes(1500),))
    streams[2].priority = Priority.DECODE
    streams[2].send((b"urgent",))
    order = []
    while data := pair.output(pair.client):
        offset = 0
        while offset < len(data):
            _, _, _, stream_id, length = HEADER.unpack_from(data, offset)
            order.append((stream_id, length))
            offset += 12 + length
    assert order[0] == (5, 6)
    assert order[1:] == [(1, 1000), (3, 1000), (1, 500), (3, 500)]


def test_drained_streams_are_reported():
    pair = SessionPair()
    stream, _ = pair.open()
    stream.send((bytes(100),))
    out = memoryview(bytearray(1000))
    pair.client.fill(out)
    assert pair.client.drained == [stream]


def test_resets_reach_the_other_side_and_drop_what_was_queued():
    pair = SessionPair()
    mine, theirs = pair.open()
    mine.send((b"lost",))
    pair.exchange()
    mine.send((b"too late",))
    pair.client.reset(mine, "changed my mind")
    pair.exchange()
    assert theirs.reset_by == "the peer reset the stream"
    assert (theirs.buffered, mine.queued, len(pair.client), len(pair.server)) == (0, 0, 0, 0)


def test_a_stream_reset_before_its_syn_never_existed():
    pair = SessionPair()
    pair.client.reset(pair.client.open(), "never mind")
    assert pair.output(pair.client) == b""
    assert pair.client.unacked == 0


def test_frames_of_streams_that_are_gone_are_skipped():
    session = Session(client=False)
    late = frame(FrameType.DATA, 0, 7, 5, b"late!") + frame(FrameType.WINDOW, Flag.FIN, 7, 9)
    assert session.receive(late + frame(FrameType.PING, Flag.ACK, 0, 3)) == [Pong(3)]


def test_closed_streams_discard_without_giving_credit_back():
    pair = SessionPair()
    mine, theirs = pair.open()
    theirs.ignore_input()
    mine.send((bytes(2 * yamux.STREAM_WINDOW),))
    pair.exchange()
    assert (theirs.buffered, mine.queued) == (0, yamux.STREAM_WINDOW)


def test_unread_puts_bytes_back_in_front():
    pair = SessionPair()
    mine, theirs = pair.open()
    mine.send((b"abcdef",))
    pair.exchange()
    assert theirs.take(4) == b"abcd"
    theirs.unread(b"cd")
    assert theirs.take(100) == b"cdef"


def test_tiny_frames_are_merged():
    pair = SessionPair()
    mine, theirs = pair.open()
    wire = frame(FrameType.DATA, 0, mine.id, 1, b"x") * 10_000
    pair.server.receive(wire)
    assert theirs.buffered == 10_000
    assert len(theirs._chunks) == 1


@pytest.mark.parametrize(
    ("wire", "cause"),
    [
        (b"\1" + bytes(11), "version 1"),
        (frame(9, 0, 1, 0), "type 9"),
        (frame(FrameType.DATA, Flag.SYN, 2, 0), "ours to give"),
        (frame(FrameType.DATA, Flag.SYN, 0, 0), "ours to give"),
        (frame(FrameType.WINDOW, Flag.SYN, 1, 0) * 2, "twice"),
        (frame(FrameType.DATA, Flag.SYN, 1, INITIAL_WINDOW + 1), "only 262144 allowed"),
        (frame(FrameType.DATA, Flag.SYN | Flag.FIN, 1, 0) + frame(FrameType.DATA, 0, 1, 1), "only 0 allowed"),
        (frame(FrameType.WINDOW, Flag.SYN, 1, 0xFFFFFFFF) * 1 + frame(FrameType.WINDOW, 0, 1, 9), "4 GiB"),
        (frame(FrameType.PING, Flag.SYN, 0, 1) * (yamux.MAX_CONTROL + 1), "does not read"),
    ],
)
def test_rules_a_peer_may_not_break(wire, cause):
    with pytest.raises(RemoteProtocolError, match=cause):
        Session(client=False).receive(wire)


def test_limits_are_exact():
    server = Session(client=False)
    syns = b"".join(frame(FrameType.WINDOW, Flag.SYN, 2 * i + 1, 0) for i in range(yamux.MAX_INBOUND + 1))
    assert len([e for e in server.receive(syns) if isinstance(e, Opened)]) == yamux.MAX_INBOUND
    out = memoryview(bytearray(65519))
    size = server.fill(out)
    assert bytes(out[:12]) == frame(FrameType.WINDOW, Flag.RST, 2 * yamux.MAX_INBOUND + 1, 0)
    assert size > 12
    assert server.receive(frame(FrameType.DATA, 0, 1, INITIAL_WINDOW)) == []
    client = Session(client=True)
    for _ in range(yamux.MAX_UNACKED):
        client.open()
    with pytest.raises(LocalProtocolError, match="256 streams"):
        client.open()
    client.receive(frame(FrameType.WINDOW, Flag.ACK, 1, 0))
    assert client.open().id == 2 * yamux.MAX_UNACKED + 1
    flood = Session(client=False)
    flood.receive(frame(FrameType.PING, Flag.SYN, 0, 1) * yamux.MAX_CONTROL)


def test_go_away_stops_new_streams_and_not_old_ones():
    pair = SessionPair()
    mine, theirs = pair.open()
    pair.server.go_away()
    pair.exchange()
    assert pair.events[pair.client][-1] == WentAway(0)
    with pytest.raises(LocalProtocolError):
        pair.client.open()
    mine.send((b"still here",))
    pair.exchange()
    assert theirs.take(99) == b"still here"


operations = st.lists(
    st.tuples(st.sampled_from(["send", "take", "finish", "open"]), st.integers(0, 5), st.integers(1, 300_000)),
    max_size=40,
)


@settings(deadline=None)
@given(operations, st.integers(0, 2**32))
def test_any_traffic_any_split_arrives_in_order(steps, seed):
    """Model test: what was sent on a stream is what is taken from it, whatever the interleaving."""
    rng = random.Random(seed)
    client, server = Session(client=True), Session(client=False)
    out = memoryview(bytearray(65519))
    mine, theirs, sent, got = [client.open()], {}, [bytearray()], {}

    def carry():
        for source, target in ((client, server), (server, client)):
            while size := source.fill(out):
                data = bytes(out[:size])
                while data:
                    cut = rng.randint(1, len(data))
                    for event in target.receive(data[:cut]):
                        if isinstance(event, Opened):
                            theirs[event.stream.id] = event.stream
                            got[event.stream.id] = bytearray()
                    data = data[cut:]

    for what, index, size in steps:
        stream = mine[index % len(mine)]
        if what == "open" and len(mine) < 6:
            mine.append(client.open())
            sent.append(bytearray())
        elif what == "send" and not stream.fin_due:
            data = rng.randbytes(size)
            sent[mine.index(stream)] += data
            stream.send((data,))
        elif what == "take" and stream.id in theirs:
            got[stream.id] += theirs[stream.id].take(size)
        elif what == "finish":
            stream.finish()
        carry()
    for stream, expected in zip(mine, sent, strict=True):
        end = theirs.get(stream.id)
        while end is not None and len(got[stream.id]) < len(expected):
            got[stream.id] += end.take(100_000)
            carry()
        assert bytes(got.get(stream.id, b"")) == bytes(expected)
        if stream.fin_due:
            assert end.at_eof


@given(st.binary(max_size=200))
def test_junk_is_the_peers_fault(junk):
    session = Session(client=False)
    try:
        session.receive(junk)
    except RemoteProtocolError:
        pass


frames = st.builds(
    frame,
    st.integers(0, 3),
    st.integers(0, 15),
    st.integers(0, 6),
    st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)),
    st.binary(max_size=40),
)


@given(st.lists(frames, max_size=30), st.lists(st.integers(1, 50), max_size=10))
def test_grammatical_junk_is_the_peers_fault(pieces, sizes):
    session = Session(client=False)
    session.open()
    out = memoryview(bytearray(65519))
    wire = b"".join(pieces)
    sizes = iter(sizes)
    try:
        while wire:
            size = next(sizes, len(wire))
            for event in session.receive(wire[:size]):
                assert isinstance(event, Readable | Writable | Opened | Pong | WentAway)
            session.fill(out)
            wire = wire[size:]
    except RemoteProtocolError:
        pass
