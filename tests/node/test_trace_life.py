"""A connection's life: what is kept of it while it lives and after it ended, at real hosts on a virtual clock."""

import asyncio
import random

import pytest
from helpers.hosts import hosts, memory_host
from swarmnode.node.transport.life import MAX_EVENTS, Life
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.node.transport.wire import KEEPALIVE_S


class Stopped:
    """A clock that stands until it is moved."""

    time = 5.0

    def now(self):
        return self.time


class Heard(list):
    """A tap that keeps what it is told."""

    def event(self, event):
        self.append(event.name)

    def emit(self, name, data):
        self.append(name)

    def authenticated(self, peer):
        self.append(peer)

    def close(self):
        self.append("closed")


def test_events_are_a_bounded_ring_and_reach_the_tap():
    heard = Heard()
    life = Life(Stopped(), heard)
    for number in range(MAX_EVENTS + 5):
        life.note("test:event", number=number)
    assert [event.data["number"] for event in life.events] == list(range(5, MAX_EVENTS + 5))
    assert len(heard) == MAX_EVENTS + 5
    heard.clear()
    life.secured("peer", early_muxer=True)
    life.paused()
    life.resumed()
    assert heard == [
        *("peer", "security:peer_authenticated", "connectivity:link_paused", "connectivity:link_resumed"),
    ]


def test_texts_of_peers_are_tamed():
    life = Life(Stopped())
    life.note("test:event", text="\x1b[2J" + "x" * 1000)
    life.ended("\x1b]0;owned\x07", phase="noise", streams=0)
    assert life.reason == "?]0;owned?"
    for event in life.events:
        for value in event.data.values():
            assert not isinstance(value, str) or (value.isprintable() and len(value) <= 200)


def test_waits_add_up_and_an_end_finishes_the_last():
    clock = Stopped()
    life = Life(clock)
    for _ in range(2):
        life.paused()
        clock.time += 2
        life.resumed()
    life.resumed()
    assert (life.pauses, life.paused_s) == (2, 4)
    life.paused()
    clock.time += 3
    life.ended("gone", phase="open", streams=1)
    assert (life.pauses, life.paused_s) == (3, 7)


def test_round_trips_keep_the_least_and_the_last():
    life = Life(Stopped())
    for rtt in (0.3, 0.1, 0.2):
        life.measured(rtt)
    assert (life.pongs, life.rtt_min_s, life.rtt_last_s) == (3, 0.1, 0.2)


@pytest.mark.virtual
async def test_a_wire_tells_its_life():
    network = MemoryNetwork(random.Random(0), latency_s=0.05)
    async with hosts("memory", 2, network=network) as (one, other):
        await one.connect(other.peer_id)
        (wire,) = one._wires
        await asyncio.sleep(2.5 * KEEPALIVE_S)
        life = wire.life
        # link 1 RTT, then 1 for the handshake; the dialer's life begins with the link
        assert life.handshake_s == pytest.approx(0.1)
        assert life.early_muxer
        assert (life.pings, life.pongs) == (3, 3)
        assert (life.rtt_min_s, life.rtt_last_s) == (pytest.approx(0.1), pytest.approx(0.1))
        await one.disconnect(other.peer_id)
        assert life.reason == "closed on this side"
        assert life.phase == "open"
        assert life.ended_at == pytest.approx(one.clock.now(), abs=1)
        assert [event.name for event in life.events] == [
            "security:peer_authenticated",
            "connectivity:connection_closed",
        ]
        assert life.events[0].data["peer"] == str(other.peer_id)


@pytest.mark.virtual
async def test_the_other_side_hears_the_good_bye():
    network = MemoryNetwork(random.Random(0))
    async with memory_host(network, 1) as one, memory_host(network, 2) as other:
        await one.connect(other.peer_id, other.listen_addrs)
        (wire,) = other._wires
        await one.disconnect(other.peer_id)
        await asyncio.sleep(1)
        names = [event.name for event in wire.life.events]
        assert names[-2:] == ["connectivity:go_away_received", "connectivity:connection_closed"]
        assert wire.life.reason == "the peer closed the connection"


@pytest.mark.virtual
async def test_a_failed_handshake_says_how_far_it_came():
    network = MemoryNetwork(random.Random(0))
    async with memory_host(network, 1) as host:
        lives = []
        accept = host._wires.accept
        host._wires.accept = lambda address: lives.append(accept(address)) or lives[-1]
        address = await host.listen(host.listen_addrs[0].parse("/memory/0"))
        got = []

        class Mute(asyncio.BufferedProtocol):
            def connection_made(self, transport):
                got.append(transport)

            def get_buffer(self, sizehint):
                return memoryview(bytearray(100))

            def buffer_updated(self, nbytes):
                pass

        await network.transport().dial(address, lambda _: Mute())
        await asyncio.sleep(11)
        (wire,) = lives
        assert (wire.life.phase, wire.life.reason) == ("security", "no handshake within 10 s")
        assert wire.life.handshake_s is None
        got[0].abort()
