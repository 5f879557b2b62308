"""Two yamux sessions over a path with a round trip and a rate: the window must not be what limits."""

from collections import deque

import pytest
from helpers.muxes import SessionPair
from swarmnode.protocol import yamux, yamux_stream

RTT_S = 0.1
TICK_S = 0.005
READ = 64 * 1024


class Path:
    """Carries what the sessions say; the client's side has a rate, both have half the round trip."""

    def __init__(self, rate):
        self.pair = SessionPair()
        self.mine, self.theirs = self.pair.open()
        self.rate = rate
        self.room = 0.0
        self.now = 0.0
        self.there, self.back = deque(), deque()
        for session in (self.pair.client, self.pair.server):
            session.rtt_s = RTT_S

    def run(self, seconds):
        """Send without end, read what comes; bytes read."""
        read, until = 0, self.now + seconds
        while self.now < until:
            self.now += TICK_S
            self.mine.send((bytes(max(0, READ - self.mine.queued)),))
            read += self._tick()
        return read

    def _tick(self):
        client, server = self.pair.client, self.pair.server
        client.now = server.now = self.now
        self.room = min(self.room, 0) + self.rate * TICK_S
        while self.room > 0 and (data := self.pair.output(client)):
            self.room -= len(data)
            self.there.append((self.now + RTT_S / 2, data))
            self.mine.send((bytes(max(0, READ - self.mine.queued)),))
        while self.there and self.there[0][0] <= self.now:
            server.receive(self.there.popleft()[1])
        size = len(self.theirs.take(1 << 30))
        while data := self.pair.output(server):
            self.back.append((self.now + RTT_S / 2, data))
        while self.back and self.back[0][0] <= self.now:
            client.receive(self.back.popleft()[1])
        return size


@pytest.mark.parametrize("rate", [2e6, 6e6, 10e6, 15e6, 28e6, 60e6])
def test_the_window_grows_until_the_path_is_full(rate):
    path = Path(rate)
    path.run(20 * RTT_S)
    assert path.run(10 * RTT_S) >= 0.9 * rate * 10 * RTT_S


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_a_path_that_speeds_up_slowly_is_filled_too(share):
    # a window that is nearly spent each round trip must grow, or it would hold the sender there for ever
    path = Path(share * yamux.STREAM_WINDOW / RTT_S)
    path.run(20 * RTT_S)
    path.rate = 60e6
    path.run(20 * RTT_S)
    assert path.run(10 * RTT_S) >= 0.9 * path.rate * 10 * RTT_S


def test_a_slow_path_keeps_its_small_window():
    path = Path(0.1 * yamux.STREAM_WINDOW / RTT_S)
    path.run(100 * RTT_S)
    assert path.theirs.window == yamux.STREAM_WINDOW
    path.rate = 1e9
    path.run(30 * RTT_S)
    assert path.theirs.window == yamux_stream.MAX_WINDOW
