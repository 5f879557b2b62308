"""Helping BBR out of its start: when a socket is held back, how much, and when it is let go."""

import errno
import socket
import struct
import sys

import pytest
from swarmnode.node.transport import bbr
from swarmnode.node.transport.bbr import Startup

STARTUP, CRUISE = 739, 256
MEGABYTE = 1e6
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about BBR")


class Path:
    """A socket whose BBR sees at most `line` bytes a second, doubling up to there, and leaves STARTUP only if held."""

    def __init__(self, line, *, control=b"bbr", stubborn=False):
        self.line = line
        self.control = control
        self.stubborn = stubborn
        self.bandwidth = line / 16
        self.gain = STARTUP
        self.limits = []

    def getsockopt(self, level, option, size):
        if option == socket.TCP_CONGESTION:
            return self.control.ljust(size, b"\0")
        assert option == bbr.TCP_CC_INFO
        low, high = int(self.bandwidth) & 0xFFFFFFFF, int(self.bandwidth) >> 32
        return struct.pack("=IIIII", low, high, 100_000, self.gain, self.gain)[:size]

    def setsockopt(self, level, option, value):
        assert option == bbr.SO_MAX_PACING_RATE
        self.limits.append(struct.unpack("=Q", value)[0])

    def half_a_second(self, startup, rate=None):
        self.bandwidth = min(self.line, 2 * self.bandwidth)
        if self.limits and self.limits[-1] != bbr.UNLIMITED and not self.stubborn:
            self.gain = CRUISE
        startup.look(self.bandwidth if rate is None else rate)


@pytest.mark.parametrize("line", [1 * MEGABYTE, 12 * MEGABYTE, 6000 * MEGABYTE])
def test_held_below_the_line_until_bbr_has_noticed(line):
    path = Path(line)
    startup = Startup(path)
    for _ in range(20):
        path.half_a_second(startup)
    assert path.limits == [int(bbr.HOLD * line), bbr.UNLIMITED]
    assert not startup.is_held


def test_a_path_that_still_speeds_up_is_left_alone():
    path = Path(12 * MEGABYTE)
    startup = Startup(path)
    while path.bandwidth < path.line:
        path.half_a_second(startup)
        assert not path.limits


def test_one_that_does_not_notice_is_let_go_and_tried_again_later():
    path = Path(12 * MEGABYTE, stubborn=True)
    startup = Startup(path)
    for _ in range(6 + 2 * (bbr.MAX_HELD + 2)):
        path.half_a_second(startup)
    assert path.limits[:3] == [int(bbr.HOLD * path.line), bbr.UNLIMITED, int(bbr.HOLD * path.line)]


def test_a_trickle_says_nothing_about_the_path():
    path = Path(12 * MEGABYTE)
    startup = Startup(path)
    for _ in range(20):
        path.half_a_second(startup, rate=0.4 * path.bandwidth)
    assert path.limits == []


@pytest.mark.parametrize("control", [b"cubic", b"bbr2", b""])
def test_other_congestion_controls_are_left_alone(control):
    path = Path(12 * MEGABYTE, control=control)
    startup = Startup(path)
    for _ in range(20):
        path.half_a_second(startup)
    assert path.limits == []


def test_systems_that_know_nothing_of_it(monkeypatch):
    class Deaf(Path):
        def getsockopt(self, level, option, size):
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")

    class Numb(Path):
        def setsockopt(self, level, option, value):
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")

    class Short(Path):
        def getsockopt(self, level, option, size):
            return b""

    for kind in (Deaf, Numb, Short):
        path = kind(12 * MEGABYTE)
        startup = Startup(path)
        for _ in range(20):
            path.half_a_second(startup)
        assert path.limits == []
    monkeypatch.setattr(sys, "platform", "darwin")
    assert bbr.startup_bandwidth(Path(1.0)) is None


def test_this_kernel_answers():
    with socket.socket() as sock:
        assert bbr.startup_bandwidth(sock) is None  # not connected, nothing seen
        bbr.Startup(sock)._pace(1_000_000)
        assert struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, bbr.SO_MAX_PACING_RATE, 8))[0] == 1_000_000
