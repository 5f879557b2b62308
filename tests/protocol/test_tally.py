"""Counters of a yamux session: each frame once at both ends, streams by how they ended."""

import pytest
from helpers.muxes import SessionPair
from swarmnode.protocol.tally import CLASSES, Tally
from swarmnode.protocol.yamux import MAX_INBOUND, STREAM_WINDOW
from swarmnode.protocol.yamux_frames import HEADER, Flag, FrameType, Priority


def test_traffic_is_counted_by_the_class_each_end_gives_the_stream():
    pair = SessionPair()
    mine, theirs = pair.open()
    mine.priority, theirs.priority = Priority.DECODE, Priority.CONTROL
    mine.send((bytes(100_000),))
    mine.finish()
    pair.exchange()
    sent, received = pair.client.tally, pair.server.tally
    assert CLASSES == ("control", "decode", "bulk")
    assert sent.bytes_out == [0, 100_000, 0]
    assert received.bytes_in == [100_000, 0, 0]
    assert sent.frames_out[Priority.DECODE] == received.frames_in[Priority.CONTROL] >= 2
    assert sent.control_out == received.control_in
    assert received.control_out == sent.control_in > 0


def test_an_empty_fin_is_a_data_frame_at_both_ends():
    pair = SessionPair()
    mine, theirs = pair.open()
    mine.finish()
    theirs.finish()
    pair.exchange()
    for tally in (pair.client.tally, pair.server.tally):
        assert tally.frames_in == tally.frames_out == [0, 0, 1]
        assert tally.closed == 1


def test_resets_say_who():
    pair = SessionPair()
    (mine, _), (_, theirs) = pair.open(), pair.open()
    pair.client.reset(mine, "enough")
    pair.client.reset(mine, "twice is once")
    pair.exchange()
    pair.server.reset(theirs, "enough")
    pair.exchange()
    for tally in (pair.client.tally, pair.server.tally):
        assert (tally.reset_here, tally.reset_there, tally.closed) == (1, 1, 0)
    assert pair.client.tally.opened_here == pair.server.tally.opened_there == 2


def test_frames_of_gone_streams_and_streams_turned_away():
    pair = SessionPair()
    frame = HEADER.pack(0, FrameType.DATA, 0, 99, 10) + bytes(10)
    pair.server.receive(frame + HEADER.pack(0, FrameType.WINDOW, 0, 99, 10))
    assert pair.server.tally.stale_bytes_in == 10
    assert pair.server.tally.control_in == 1
    for number in range(MAX_INBOUND + 3):
        pair.server.receive(HEADER.pack(0, FrameType.WINDOW, Flag.SYN, 2 * number + 1, 0))
    assert pair.server.tally.turned_away == 3
    assert pair.server.tally.opened_there == MAX_INBOUND


def test_growth_counts_what_was_granted_and_nothing_else():
    pair = SessionPair()
    mine, theirs = pair.open()
    assert theirs.window == STREAM_WINDOW
    assert pair.server.tally.windows_grown == 0
    pair.server.rtt_s = 1.0
    for _ in range(3):
        mine.send((bytes(STREAM_WINDOW),))
        pair.exchange()
        theirs.take(STREAM_WINDOW)
        pair.exchange()
    assert theirs.window > STREAM_WINDOW
    assert pair.server.tally.windows_grown >= 1
    grown = pair.server.tally.windows_grown
    for budget in pair.server._budgets:
        budget.limit = 0
    for _ in range(9):
        mine.send((bytes(STREAM_WINDOW),))
        pair.exchange()
        theirs.take(STREAM_WINDOW)
        pair.exchange()
    assert pair.server.tally.windows_grown == grown


def test_go_aways():
    pair = SessionPair()
    pair.client.go_away()
    pair.client.go_away()
    pair.exchange()
    assert pair.client.tally.go_aways_out == pair.server.tally.go_aways_in == 1


@pytest.mark.parametrize("name", Tally.__slots__)
def test_adding_loses_no_field(name):
    one, two = Tally(), Tally()
    value = [1, 2, 3] if isinstance(getattr(one, name), list) else 4
    setattr(one, name, value)
    two.add(one)
    two.add(one)
    assert getattr(two, name) == ([2, 4, 6] if isinstance(value, list) else 8)
    assert getattr(one, name) == ([1, 2, 3] if isinstance(value, list) else 4)
