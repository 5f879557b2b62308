"""Unread bytes: what counts, both bounds to the byte, who is reset, and that nothing is lost from the sums."""

import random

import pytest
from swarmnode.protocol import yamux_memory
from swarmnode.protocol.yamux import Readable, Session
from swarmnode.protocol.yamux_frames import HEADER, INITIAL_WINDOW, Flag, FrameType
from swarmnode.protocol.yamux_memory import CONNECTION_REASON, NODE_REASON, HeldMemory


def syn(stream_id):
    return HEADER.pack(0, FrameType.WINDOW, Flag.SYN, stream_id, 0)


def data(stream_id, size, flags=0):
    return HEADER.pack(0, FrameType.DATA, flags, stream_id, size) + bytes(size)


class Flooded:
    """A listening session whose peer opens streams and sends what it likes."""

    def __init__(self, memory=None):
        self.session = Session(client=False)
        if memory is not None:
            self.session.share(memory)
        self.shed = []
        self.session.on_shed = lambda stream, reason: self.shed.append((stream.id, reason))
        self.streams = {}

    def open(self, *numbers):
        for number in numbers:
            (event,) = self.session.receive(syn(number))
            self.streams[number] = event.stream

    def send(self, number, size, flags=0):
        return self.session.receive(data(number, size, flags))

    def check(self):
        """The sums are what the streams say."""
        assert self.session.held == sum(stream.held for stream in self.streams.values())


def test_only_bytes_that_no_reader_waits_for_count():
    peer = Flooded()
    peer.open(1)
    stream = peer.streams[1]
    stream.want(10)
    peer.send(1, 10)
    assert peer.session.held == 0
    peer.send(1, 7)
    assert (stream.held, peer.session.held, peer.session.memory.used) == (7, 7, 7)
    stream.want(0)
    stream.take(12)
    assert peer.session.held == 5
    stream.want(100)
    assert peer.session.held == 0
    stream.want(0)
    peer.send(1, 1)
    assert peer.session.held == 6
    stream.unread(b"four")
    assert peer.session.held == 10
    stream.ignore_input()
    peer.send(1, 50)
    assert (peer.session.held, peer.session.memory.used) == (0, 0)


def test_a_connections_bound_is_exact_and_the_fullest_stream_pays(monkeypatch):
    for module in ("yamux", "yamux_stream"):
        monkeypatch.setattr(f"swarmnode.protocol.{module}.MAX_CONNECTION_HELD", 1000)
    peer = Flooded()
    peer.open(1, 3, 5)
    peer.send(1, 300)
    peer.send(3, 600)
    peer.send(5, 100)
    assert peer.shed == []
    assert Readable(peer.streams[5]) in peer.send(5, 1)
    assert peer.shed == [(3, CONNECTION_REASON)]
    assert "nobody read" in peer.streams[3].reset_by
    assert (peer.session.held, peer.session.tally.shed) == (401, 1)
    peer.check()
    out = memoryview(bytearray(1000))
    assert HEADER.pack(0, FrameType.WINDOW, Flag.RST, 3, 0) in bytes(out[: peer.session.fill(out)])


def test_the_nodes_bound_is_exact_and_the_fullest_connection_pays():
    memory = HeldMemory(1000)
    modest, greedy, honest = (Flooded(memory) for _ in range(3))
    for peer in (modest, greedy, honest):
        peer.open(1, 3)
    modest.send(1, 400)
    greedy.send(1, 250)
    greedy.send(3, 300)
    honest.send(1, 50)
    assert memory.used == 1000
    honest.send(1, 1)
    assert (modest.shed, greedy.shed, honest.shed) == ([], [(3, NODE_REASON)], [])
    assert memory.used == 701
    greedy.session.close()
    assert memory.used == 451
    greedy.streams[1].take(100)  # what was received can be read, and is no longer the node's
    assert memory.used == 451


def test_256_hostile_connections_hold_no_more_than_the_bound():
    memory = HeldMemory(4 * INITIAL_WINDOW)
    peers = [Flooded(memory) for _ in range(256)]
    for number in (1, 3):
        for peer in peers:
            peer.open(number)
            peer.send(number, 20_000)
            assert memory.used <= memory.limit
    assert memory.used == sum(peer.session.held for peer in peers) > memory.limit - 20_000
    for peer in peers:
        peer.check()


def test_what_a_finished_stream_left_unread_still_counts_and_can_be_shed():
    memory = HeldMemory(1000)
    peer = Flooded(memory)
    peer.open(1)
    peer.streams[1].finish()
    peer.session.fill(memoryview(bytearray(1000)))
    peer.send(1, 900, Flag.FIN)
    assert (len(peer.session), memory.used) == (0, 900)
    peer.open(1)  # the number may be used again
    peer.send(1, 101)
    assert peer.shed == [(1, NODE_REASON)]
    assert memory.used == 101
    peer.streams[1].take(101)
    assert memory.used == 0


def test_windows_do_not_grow_while_memory_is_scarce():
    memory = HeldMemory(1000)
    peer = Flooded(memory)
    peer.open(1)
    peer.send(1, 501)
    peer.open(3)
    peer.session.fill(memoryview(bytearray(1000)))
    assert peer.streams[3].window == INITIAL_WINDOW


def test_a_peer_that_reads_nothing_is_shed_without_being_told(monkeypatch):
    monkeypatch.setattr("swarmnode.protocol.yamux.MAX_CONTROL", 0)
    peer = Flooded(HeldMemory(10))
    peer.open(1)
    peer.send(1, 11)
    assert (len(peer.session), peer.session.held) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_no_history_loses_a_byte_from_the_sums(seed):
    rng = random.Random(seed)
    memory = HeldMemory(rng.choice((3_000, 100_000)))
    peers = [Flooded(memory) for _ in range(3)]
    for _ in range(300):
        peer = rng.choice(peers)
        number = rng.choice((1, 3, 5, 7))
        stream = peer.streams.get(number)
        if stream is None or stream.reset_by is not None:
            peer.open(number)
            continue
        act = rng.choice(("send", "send", "take", "want", "unread", "reset", "ignore"))
        if act == "send" and stream.recv_credit > 2_000:
            peer.send(number, rng.randrange(2_000))
        elif act == "take":
            stream.take(rng.randrange(3_000))
        elif act == "want":
            stream.want(rng.choice((0, 0, 500, 5_000)))
        elif act == "unread":
            stream.unread(bytes(rng.randrange(100)))
        elif act == "reset" and rng.random() < 0.1:
            peer.session.reset(stream, "test")
        elif act == "ignore" and rng.random() < 0.05:
            stream.ignore_input()
        peer.check()
        assert memory.used == sum(peer.session.held for peer in peers) <= memory.limit
    for peer in peers:
        peer.session.close()
    assert memory.used == 0


def test_the_bounds_leave_room_for_what_windows_promise():
    assert yamux_memory.MAX_CONNECTION_HELD < yamux_memory.MAX_NODE_HELD < 128 * 1024 * 1024
