"""yamux as a target: frames of a hostile peer while our own side opens, reads, writes, resets, stalls."""

import zlib
from random import Random

from swarmnode.protocol.noise import MAX_PLAINTEXT
from swarmnode.protocol.yamux import MAX_INBOUND, MAX_UNACKED, Budget, Opened, Session
from swarmnode.protocol.yamux_frames import HEADER, HEADER_SIZE, INITIAL_WINDOW, FrameType

from .seeds import number
from .targets import KIB, MIB, Target, pieces

LARGEST_WANT = 4096
EVENTS_PER_FRAME = 3
LARGEST_PIECE = 2048
"""Bytes received at once. Its events are held until they are handled, so what matters here is what stays."""
FLOODS = 600, 3000
"""Repetitions of a frame pattern in a flood: over every bound on counts."""
COUNTED = 64
"""Frames that one input counts for at most: a flood is one idea."""


def frames_of(data):
    """yamux frames in a sequence, roughly: its headers, read without asking whether they are sound."""
    at, count = 1, 0
    while at + HEADER_SIZE <= len(data):
        kind, length = data[at + 1], int.from_bytes(data[at + 8 : at + 12], "big")
        at += HEADER_SIZE + (length if kind == FrameType.DATA else 0)
        count += 1
    return min(max(count, 1), COUNTED)


def frame(kind, flags, stream, length, payload=b""):
    return HEADER.pack(0, kind, flags, stream, length) + payload


def frames(rng, *, odd):
    """Frames as a peer may send them: streams opened, used, ended, in any order; now and then a flood of one kind."""
    mine = list(range(1 if odd else 2, 40, 2))
    opened, out = [], []
    for _ in range(rng.choice((1, 2, 5, 12, 30))):
        stream = rng.choice(opened) if opened and rng.random() < 0.8 else rng.choice((*mine, 2, 1, 0))
        flags = rng.choice((0, 0, 0, 0, 2, 4, 8, 6, 12, 3))
        if mine and rng.random() < 0.3:
            stream, flags = mine.pop(0), rng.choice((1, 1, 1, 5, 9))
            opened.append(stream)
        out.append(_any_frame(rng, flags, stream))
    if rng.random() < 0.04:
        out.append(_flood(rng, odd))
    return b"".join(out)


def _any_frame(rng, flags, stream):
    match rng.choice((0, 0, 0, 1, 1, 2, 3)):
        case FrameType.DATA:
            payload = rng.randbytes(rng.choice((0, 1, 5, 100, 100, 2000)))
            return frame(0, flags, stream, len(payload), payload)
        case FrameType.WINDOW:
            return frame(1, flags, stream, rng.choice((0, 1, 1000, INITIAL_WINDOW, number(rng, 32))))
        case FrameType.PING:
            return frame(2, rng.choice((1, 2, 0)), 0, number(rng, 32))
        case _:
            return frame(3, 0, 0, rng.choice((0, 1, 2, 77))) if rng.random() < 0.1 else frame(2, 1, 0, 0)


def _flood(rng, odd):
    """One pattern many times, each time with the next stream id."""
    first = 101 if odd else 102
    patterns = (
        lambda n: frame(1, 1, n, 0),
        lambda n: frame(1, 9, n, 0),
        lambda n: frame(1, 1, n, 0) + frame(1, 8, n, 0),
        lambda n: frame(0, 1, n, 1, b"x") + frame(1, 8, n, 0),
        lambda n: frame(1, 5, n, 0),
        lambda n: frame(2, 1, 0, n),
        lambda n: frame(1, 1, first, 0) if n == first else frame(0, 0, first, 1, b"y"),
        lambda n: frame(1, 2, n + 1, 1),
    )
    pattern = rng.choice(patterns)
    return b"".join(pattern(first + 2 * index) for index in range(rng.choice(FLOODS)))


def seed(rng):
    """First byte: bit 0 says that we dialed, bit 1 that our side never sends anything (its link is stuck)."""
    head = rng.randrange(4)
    return bytes([head]) + frames(rng, odd=not head & 1)


class Driver:
    """A session, what our side does with it, and what must hold at any time."""

    def __init__(self, *, client, stuck, seed):
        self.budget = Budget(2 * MIB)
        self.session = Session(client=client, node_budget=self.budget)
        self.stuck = stuck
        self.rng = Random(seed)
        self.streams = []
        self.out = memoryview(bytearray(MAX_PLAINTEXT))

    def receive(self, data):
        for piece in pieces(data, LARGEST_PIECE):
            events = self.session.receive(piece)
            assert len(events) <= EVENTS_PER_FRAME * (len(piece) // HEADER_SIZE + 2), "too many events"
            self.take(events)
            self.act()
            self.check()

    def take(self, events):
        self.streams += [event.stream for event in events if isinstance(event, Opened)]
        self.streams = [stream for stream in self.streams if stream.reset_by is None]

    def act(self):
        rng, session = self.rng, self.session
        session.now += rng.choice((0, 0.01, 10))
        if rng.random() < 0.1 and not session.went_away and session.unacked < MAX_UNACKED:
            self.streams.append(session.open())
        for stream in rng.sample(self.streams, min(3, len(self.streams))):
            self.use(stream)
        if not self.stuck:
            while session.has_output and (size := session.fill(self.out)):
                assert size <= len(self.out)
        session.drained.clear()

    def use(self, stream):
        match self.rng.randrange(7):
            case 0 | 1:
                assert len(stream.take(self.rng.choice((1, 100, 1 << 20)))) <= 1 << 20
            case 2:
                stream.want(self.rng.choice((0, 1, LARGEST_WANT)))
            case 3 if stream.reset_by is None and not stream.fin_due and stream.queued < 10_000:
                parts = (self.rng.randbytes(self.rng.choice((1, 100, 3000))),)
                if self.rng.random() < 0.5 or self.session.frame_now(stream, parts) is None:
                    stream.send(parts)
            case 4:
                stream.finish()
            case 5:
                stream.ignore_input()
            case 6:
                self.session.reset(stream, "fuzz")
                self.streams.remove(stream)

    def check(self):
        session, alive = self.session, list(self.session.streams())
        assert len(session) == len(alive)
        assert session.inbound == sum(stream.inbound for stream in alive) <= MAX_INBOUND
        assert session.unacked == sum(not stream.acked for stream in alive) <= MAX_UNACKED
        assert self.budget.used == sum(stream.window - INITIAL_WINDOW for stream in alive) <= self.budget.limit
        for stream in alive:
            assert 0 <= stream.recv_credit <= stream.window + LARGEST_WANT
            assert 0 <= stream.buffered <= stream.window + LARGEST_WANT
            assert 0 <= stream.send_credit < 1 << 32
            assert stream.queued >= 0

    def close(self):
        """Everything a connection held is given back when it ends."""
        self.session.close()
        assert len(self.session) == 0
        assert (self.budget.used, self.session.inbound, self.session.unacked) == (0, 0, 0)


def run(data):
    head, body = data[:1] or b"\0", data[1:]
    driver = Driver(client=bool(head[0] & 1), stuck=bool(head[0] & 2), seed=zlib.crc32(data))
    try:
        driver.receive(body)
    finally:
        driver.close()


MUXES = (Target("yamux", seed, run, per_byte=60, base=1024 * KIB, frames=frames_of, weight=6),)
