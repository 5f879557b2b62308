"""Namespaces come and go, and the emulated links are what was asked for."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from lab import spaces
from lab.spaces import Lab
from lab.wan import Access

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("leakproof")]


def namespaces():
    return {path.name for path in spaces.NAMES.glob(f"{spaces.PREFIX}-{os.getpid()}-*")}


@contextlib.contextmanager
def pair(near, far, kind=socket.SOCK_DGRAM):
    """Two sockets, the second one bound to its namespace's address."""
    with near.socket(socket.AF_INET, kind) as one, far.socket(socket.AF_INET, kind) as two:
        for sock in (one, two):
            sock.settimeout(10)
        two.bind((far.address, 0))
        yield one, two


def round_trip(one, two, size=64):
    start = time.monotonic()
    one.sendto(bytes(size), two.getsockname())
    data, sender = two.recvfrom(2048)
    two.sendto(data, sender)
    one.recv(2048)
    return time.monotonic() - start


def test_namespaces_are_gone_afterwards(lab):
    before = namespaces()
    with Lab() as own:
        own.wan()
        assert len(namespaces() - before) == 2
    assert namespaces() == before


def test_namespaces_are_gone_after_a_failure(lab):
    before = namespaces()
    with contextlib.suppress(RuntimeError), Lab() as own:
        process = own.start(own.space("one"), ["sleep", "1000"])
        raise RuntimeError
    assert process.returncode is not None
    assert namespaces() == before


def test_what_a_killed_process_left_is_swept(lab):
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from lab.spaces import Lab\n"
        "print(Lab().__enter__().wan().a.name, flush=True); time.sleep(1000)"
    )
    root = os.path.dirname(os.path.dirname(spaces.__file__))
    child = subprocess.Popen([sys.executable, "-c", script, root], stdout=subprocess.PIPE, text=True)
    name = child.stdout.readline().strip()
    assert (spaces.NAMES / name).exists()
    child.kill()
    child.communicate()
    with Lab():
        assert not (spaces.NAMES / name).exists()


def test_commands_and_sockets_are_inside(lab):
    link = lab.wan()
    assert link.b.address in lab.run(link.b, ["ip", "-4", "address"]).stdout
    with pytest.raises(subprocess.CalledProcessError):
        lab.run(link.a, ["ip", "link", "show", "nothing"])
    here = os.readlink("/proc/thread-self/ns/net")
    with link.a.entered():
        assert os.readlink("/proc/thread-self/ns/net") != here
    assert os.readlink("/proc/thread-self/ns/net") == here


def test_delay(lab):
    link = lab.wan(delay_ms=20)
    with pair(link.a, link.b) as (one, two):
        # the bounds are wide: a loaded machine only adds
        assert 0.040 <= min(round_trip(one, two) for _ in range(5)) < 0.060


def test_rate(lab):
    link = lab.wan(rate_mbit=40, queue_ms=1000)
    with pair(link.a, link.b, socket.SOCK_STREAM) as (one, two):
        two.listen()
        one.connect(two.getsockname())
        with two.accept()[0] as peer:
            size = 2_000_000  # 0.4 s
            sender = threading.Thread(target=one.sendall, args=(bytes(size),))
            start = time.monotonic()
            sender.start()
            left = size
            while left:
                left -= len(peer.recv(1 << 16))
            took = time.monotonic() - start
            sender.join()
    assert 0.9 < took * 40e6 / 8 / size < 2
    assert link.counters()[1].bytes > size  # headers count


def test_a_full_queue_drops_and_so_does_chance(lab):
    slow = lab.wan(rate_mbit=1, queue_ms=10)
    unlucky = lab.wan(loss=0.5)
    for link in (slow, unlucky):
        with pair(link.a, link.b) as (one, two):
            for _ in range(100):
                one.sendto(bytes(1000), two.getsockname())
            one.sendto(b"", two.getsockname())
    counters = {name: link.counters()[0] for name, link in (("slow", slow), ("unlucky", unlucky))}
    assert counters["slow"].full_up > 50
    assert counters["slow"].lost == 0
    assert 25 <= counters["unlucky"].lost <= 75
    assert counters["unlucky"].full_up == 0


def test_jitter_keeps_the_order(lab):
    link = lab.wan(jitter_ms=5)
    with pair(link.a, link.b) as (one, two):
        for number in range(100):
            one.sendto(bytes([number]), two.getsockname())
        assert [two.recv(10)[0] for _ in range(100)] == list(range(100))


def test_three_ends_each_with_its_own_access(lab):
    net = lab.wan([Access(delay_ms=1), Access(delay_ms=10), Access(delay_ms=30)])
    near, middle, far = net.spaces
    with pair(near, middle) as (one, two):
        assert 0.022 <= min(round_trip(one, two) for _ in range(3)) < 0.040
    with pair(middle, far) as (one, two):
        assert 0.080 <= min(round_trip(one, two) for _ in range(3)) < 0.110


def test_an_end_that_is_down_is_silent(lab):
    link = lab.wan()
    with pair(link.a, link.b) as (one, two):
        round_trip(one, two)
        link.down(link.b)
        one.sendto(b"x", two.getsockname())
        two.settimeout(0.1)
        with pytest.raises(TimeoutError):
            two.recv(1)


def test_ipv6(lab):
    link = lab.wan(delay_ms=1)
    number = link.a.address.split(".")[2]
    with link.b.socket(socket.AF_INET6, socket.SOCK_DGRAM) as two:
        two.bind((f"fd77:{number}::2", 0))
        two.settimeout(10)
        with link.a.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
            one.sendto(b"six", two.getsockname())
            assert two.recv(10) == b"six"
