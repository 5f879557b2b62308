"""A host's counters and its memory of ended connections, on real hosts: nothing lost, nothing counted twice."""

import asyncio
import errno
import random
import socket
from dataclasses import fields

import pytest
from helpers.hosts import hosts, key, memory_host
from swarmnode.node import journal
from swarmnode.node.journal import MAX_DIAL_FAILURES, MAX_ENDED, MAX_STRANGERS, cause_of
from swarmnode.node.metrics import samples
from swarmnode.node.transport.base import ConnectionClosed, Priority
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol.errors import PeerUnreachable, RemoteProtocolError, SwarmError
from swarmnode.protocol.identify import MAX_AGENT
from swarmnode.protocol.multiaddr import Multiaddr

pytestmark = pytest.mark.virtual
ECHO = "/test/echo/1.0.0"
NOBODY = Multiaddr.parse("/memory/999")


async def echo(stream):
    stream.set_priority(Priority.DECODE)
    while data := await stream.read(65536):
        await stream.write(data)


async def talk(one, other, size):
    """Send `size` bytes and read them back."""
    stream = await one.open_stream(other.peer_id, ECHO)
    stream.set_priority(Priority.DECODE)
    await stream.write(bytes(size))
    await stream.read_exactly(size)
    await stream.close()


async def settle():
    await asyncio.sleep(1)


async def test_both_ends_count_the_same():
    async with hosts("memory", 2) as (one, other):
        other.handle(ECHO, echo)
        await talk(one, other, 200_000)
        await settle()
        mine, theirs = one.metrics(), other.metrics()
        assert (mine.connections, mine.connections_out, mine.connections_in) == (1, 1, 0)
        assert (theirs.connections, theirs.connections_out, theirs.connections_in) == (1, 0, 1)
        assert mine.total.bytes_out == theirs.total.bytes_in > 200_000
        assert mine.total.bytes_in == theirs.total.bytes_out > 200_000
        decode = {group.name: group for group in mine.total.classes}["decode"]
        assert decode.bytes_in == 200_000 + 20 + 18  # the echo, and both multistream answers
        assert decode.bytes_out >= 200_000
        assert mine.total.streams_closed == theirs.total.streams_closed == 3  # the echo, identify both ways
        assert mine.total.streams_opened_here == theirs.total.streams_opened_there
        assert mine.total.control_frames_out == theirs.total.control_frames_in > 0
        assert mine.handshake_s >= 0
        assert (mine.dials, mine.dials_failed) == (1, ())


async def test_ended_connections_stay_in_the_sums():
    async with hosts("memory", 2) as (one, other):
        other.handle(ECHO, echo)
        await talk(one, other, 5000)
        await settle()
        before = one.metrics()
        await one.disconnect(other.peer_id)
        after = one.metrics()
        assert (after.connections, after.streams) == (0, 0)
        assert after.total.bytes_out >= before.total.bytes_out
        assert after.total.classes == before.total.classes
        assert after.total.go_aways_out == 1
        await talk(one, other, 5000)
        await settle()
        decodes = [m.total.classes[Priority.DECODE].bytes_in for m in (before, one.metrics())]
        assert decodes[1] == 2 * decodes[0]


async def test_a_connection_shows_its_streams_by_protocol():
    async with hosts("memory", 2) as (one, other):
        other.handle(ECHO, echo)
        streams = [await one.open_stream(other.peer_id, ECHO) for _ in range(3)]
        await settle()
        for host, outbound in ((one, True), (other, False)):
            (info,) = host.connections()
            assert info.outbound is outbound
            assert info.protocols == ((ECHO, 3),)
            assert info.streams == 3
            assert not info.relayed
            assert info.early_muxer
            assert info.age_s >= 1
            assert info.agent == "swarmnode"
            assert info.metrics.bytes_in == info.bytes_in
        for stream in streams:
            stream.reset()
        await settle()
        assert one.metrics().total.streams_reset_here == other.metrics().total.streams_reset_there == 3


async def test_a_connection_says_why_it_is_kept():
    async with hosts("memory", 2) as (one, other):
        await one.connect(other.peer_id)
        one.protect(other.peer_id, "session")
        one.protect(other.peer_id, "chain")
        end = one.protect_if(lambda peer: peer == other.peer_id)
        assert one.connections()[0].protected_by == ("chain", "session", "wanted")
        end()
        one.unprotect(other.peer_id, "chain")
        assert one.connections()[0].protected_by == ("session",)
        assert other.connections()[0].protected_by == ()


async def test_a_connection_we_cut_names_the_rule():
    async with hosts("memory", 2) as (one, other):
        await one.connect(other.peer_id)
        (wire,) = one._wires
        one._wires._trim(wire)
        await settle()
        assert one.ended_connections()[-1].rule == "trimmed"
        assert one.ended_connections()[-1].reason == "idle, and there are too many connections"


async def test_who_ended_it_and_why_is_remembered():
    network = MemoryNetwork(random.Random(0))
    async with hosts("memory", 2, network=network) as (one, other):
        await one.connect(other.peer_id)
        await one.disconnect(other.peer_id)
        await settle()
        (mine,), (theirs,) = one.ended_connections(), other.ended_connections()
        assert (mine.peer, mine.reason, mine.phase) == (other.peer_id, "closed on this side", "open")
        assert (theirs.peer, theirs.reason) == (one.peer_id, "the peer closed the connection")
        assert theirs.events[-1].name == "connectivity:connection_closed"
        await one.connect(other.peer_id)
        network.crash(other._transports[0])
        await settle()
        assert one.ended_connections()[-1].reason != "closed on this side"


async def test_memory_of_the_ended_is_bounded_and_strangers_do_not_push_out_peers():
    network = MemoryNetwork(random.Random(0))
    async with memory_host(network, 1) as host:
        async with memory_host(network, 2) as friend:
            await friend.connect(host.peer_id, host.listen_addrs)
        await settle()
        address = host.listen_addrs[0].without_peer()
        for _ in range(MAX_STRANGERS + 5):
            transport = network.transport()

            class Rude(asyncio.BufferedProtocol):
                def connection_made(self, link):
                    link.write(b"GET / HTTP/1.0\r\n\r\n")

                def get_buffer(self, sizehint):
                    return memoryview(bytearray(100))

                def buffer_updated(self, nbytes):
                    pass

            await transport.dial(address, lambda _: Rude())
            await settle()
            network.crash(transport)
        await settle()
        ended = host.ended_connections()
        assert [e.peer for e in ended if e.peer is not None] == [key(2).peer_id]
        strangers = [e for e in ended if e.peer is None]
        assert len(strangers) == MAX_STRANGERS
        assert {e.phase for e in strangers} == {"security"}
        assert host.metrics().handshakes_failed == MAX_STRANGERS + 5
        assert MAX_ENDED >= MAX_STRANGERS


async def test_dials_are_counted_by_cause_and_the_last_failures_kept():
    network = MemoryNetwork(random.Random(0))
    async with memory_host(network, 1) as one, memory_host(network, 2) as other:
        for _ in range(MAX_DIAL_FAILURES + 2):
            with pytest.raises(PeerUnreachable):
                await one.connect(key(9).peer_id, [NOBODY])
        with pytest.raises(PeerUnreachable):  # another identity answers there
            await one.connect(key(9).peer_id, [a.without_peer() for a in other.listen_addrs])
        metrics = one.metrics()
        assert metrics.dials == MAX_DIAL_FAILURES + 3
        assert dict(metrics.dials_failed) == {"refused": MAX_DIAL_FAILURES + 2, "handshake": 1}
        failures = one.dial_failures()
        assert len(failures) == MAX_DIAL_FAILURES
        assert {f.cause for f in failures} == {"refused", "handshake"}
        assert NOBODY in {f.address for f in failures}


@pytest.mark.parametrize(
    ("exc", "cause"),
    [
        (asyncio.CancelledError(), "given-up"),
        (TimeoutError(), "timeout"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "no"), "refused"),
        (OSError(errno.EHOSTUNREACH, "no"), "unreachable"),
        (socket.gaierror(-2, "no such name"), "name"),
        (OSError(errno.EMFILE, "no"), "system"),
        (ConnectionClosed("x"), "handshake"),
        (RemoteProtocolError("x"), "protocol"),
        (SwarmError("x"), "other"),
    ],
)
def test_every_cause_has_a_word(exc, cause):
    assert cause_of(exc) == cause


def test_a_hostile_reason_is_tamed():
    book = journal.Journal(clock=type("Clock", (), {"now": lambda self: 0.0})())
    book.dial_failed(NOBODY, OSError("\x1b[2J" + "x" * 999))
    (failure,) = book.dial_failures
    assert failure.reason.isprintable()
    assert len(failure.reason) <= 200


async def test_a_hostile_agent_reaches_nobodys_terminal():
    agent = "\x1b]0;owned\x07\r\nroot#\u202e" + "x" * 500
    async with hosts("memory", 2, agent=agent) as (one, other):
        await one.connect(other.peer_id)
        await settle()
        (info,) = one.connections()
        assert info.agent.isprintable()
        assert info.agent.startswith("?]0;owned???root#")
        assert len(info.agent) <= MAX_AGENT


async def test_samples_name_every_counter_once():
    async with hosts("memory", 2) as (one, other):
        await one.connect(other.peer_id)
        await settle()
        one.refused["test-reason"] += 1
        metrics = one.metrics()
        found = list(samples(metrics))
        assert len({(s.name, s.labels) for s in found}) == len(found)
        assert all(s.name.startswith("swarmnode_transport_") for s in found)
        values = {(s.name.removeprefix("swarmnode_transport_"), s.labels): s.value for s in found}
        assert values["connections", ()] == 1
        assert values["refused_total", (("reason", "test-reason"),)] == 1
        assert values["bytes_total", (("direction", "out"),)] == metrics.total.bytes_out
        for field in fields(metrics.total):
            if field.name != "classes":
                assert getattr(metrics.total, field.name) in values.values()
