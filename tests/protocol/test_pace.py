"""Leaking buckets: a burst is exact, then the rate; what is of use costs nothing."""

import pytest
from helpers.muxes import SessionPair
from swarmnode.protocol import pace, yamux
from swarmnode.protocol.pace import CHORES_BURST, CHORES_RATE, MAX_BUCKETS, Buckets, Chores, Pace
from swarmnode.protocol.tally import Tally
from swarmnode.protocol.yamux_frames import HEADER, Flag, FrameType


def test_idle_frames_are_exact_at_the_burst_and_then_at_the_rate():
    tally, checked = Tally(), Pace(0.0)
    tally.control_in = CHORES_BURST
    checked.check(tally, 0.0)
    tally.control_in += 1
    with pytest.raises(Chores):
        checked.check(tally, 0.0)
    for second in range(1, 20):
        tally.control_in += int(CHORES_RATE)
        checked.check(tally, float(second + 1))


@pytest.mark.parametrize("field", ["control_in", "stale_frames_in", "opened_there", "turned_away"])
def test_every_kind_of_nothing_counts(field):
    tally = Tally()
    setattr(tally, field, CHORES_BURST + 1)
    with pytest.raises(Chores, match="carry nothing"):
        Pace(0.0).check(tally, 0.0)


def test_good_use_is_free_however_much():
    tally, checked = Tally(), Pace(0.0)
    for _ in range(1000):
        tally.opened_there += 100
        tally.closed += 100
        tally.control_in += 300
        tally.frames_in[1] += 500
        tally.bytes_in[1] += 500 * 64
        checked.check(tally, 0.0)


def test_credit_is_not_saved_up():
    tally, checked = Tally(), Pace(0.0)
    tally.bytes_in[2] = 10**9
    checked.check(tally, 0.0)
    tally.control_in = CHORES_BURST + 1
    with pytest.raises(Chores):
        checked.check(tally, 0.0)


def test_every_stream_a_peer_may_have_fits_the_burst():
    assert yamux.MAX_INBOUND * (pace.STREAM_COST + 4) <= CHORES_BURST


FLOODS = {
    "pings": lambda _: HEADER.pack(0, FrameType.PING, Flag.ACK, 0, 7),
    "bytes one by one": lambda _: HEADER.pack(0, FrameType.DATA, 0, 1, 1) + b"x",
    "empty data": lambda _: HEADER.pack(0, FrameType.DATA, 0, 1, 0),
    "windows of nothing": lambda _: HEADER.pack(0, FrameType.WINDOW, 0, 1, 0),
    "data of streams that are not": lambda _: HEADER.pack(0, FrameType.DATA, 0, 99, 1) + b"x",
    "rapid resets": lambda n: (
        HEADER.pack(0, FrameType.WINDOW, Flag.SYN, 2 * n + 3, 0)
        + HEADER.pack(0, FrameType.WINDOW, Flag.RST, 2 * n + 3, 0)
    ),
    "syn and rst in one": lambda n: HEADER.pack(0, FrameType.WINDOW, Flag.SYN | Flag.RST, 2 * n + 3, 0),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_of_frames_is_too_much_soon(kind):
    pair = SessionPair()
    pair.open()
    checked = Pace(0.0)

    def flood(frames):
        for number in range(frames):
            pair.server.receive(FLOODS[kind](number))
            for stream in pair.server.streams():
                stream.take(1)  # a reader that keeps up
            checked.check(pair.server.tally, 0.0)

    with pytest.raises(Chores):
        flood(int(1.1 * CHORES_BURST))


def test_buckets_are_exact_refill_and_forget():
    buckets = Buckets(rate=2.0, burst=3)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert buckets.take("b", 0.0)
    assert not buckets.take("a", 0.49)
    assert buckets.take("a", 0.5)
    assert not buckets.take("a", 0.5)
    for number in range(2 * MAX_BUCKETS):
        buckets.take(number, 1.0)
    assert len(buckets) == MAX_BUCKETS
