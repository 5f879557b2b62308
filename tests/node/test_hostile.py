"""Peers that do not play fair, against a whole host: they lose their connection, and nobody else notices."""

import asyncio
import random

import pytest
from helpers.attackers import PING, attack, data, opening, window
from helpers.hosts import at_rest, hosts, key, memory_host
from swarmnode.node.basics import IDENTIFY_TIMEOUT_S
from swarmnode.node.host import HostLimits
from swarmnode.node.limits import CONNECTION_MEMORY
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.node.wires import FIRST_FLIGHT
from swarmnode.protocol import ping
from swarmnode.protocol.limits import SYSTEM, OverLimit, Resource
from swarmnode.protocol.yamux import MAX_INBOUND
from swarmnode.protocol.yamux_frames import INITIAL_WINDOW, Flag

pytestmark = pytest.mark.virtual

ECHO = "/test/echo/1.0.0"


async def echo(stream):
    while data := await stream.read(65536):
        await stream.write(data)


async def never(stream):
    await asyncio.Event().wait()


def network():
    return MemoryNetwork(random.Random(0), latency_s=0.001)


async def works(honest, host):
    """An honest peer connects, and is answered."""
    stream = await honest.open_stream(host.peer_id, ECHO)
    await stream.write(b"hello")
    assert await stream.read_exactly(5) == b"hello"
    await stream.close()


async def assert_unharmed(host, honest):
    """The honest peer is served, and after it nothing is held any more."""
    await works(honest, host)
    await honest.disconnect(host.peer_id)
    await at_rest(host)
    await asyncio.sleep(1)
    assert len(host.limiter) == 0


# -- before they are anybody --


async def test_handshakes_byte_by_byte_end_at_the_deadline(clock):
    world = network()
    async with hosts("memory", 2, network=world) as (host, honest):
        host.handle(ECHO, echo)
        slow = await attack(world, host, 9, speaks=False)
        first = slow.connection.pull()
        start = clock.now()
        for number in range(20):
            if slow.is_cut:
                break
            slow.link.write(first[number : number + 1])
            await asyncio.sleep(1)
        assert slow.is_cut
        assert clock.now() - start <= host.limits.handshake_timeout_s + 1
        assert host.refused == {"handshake-timeout": 1}
        await assert_unharmed(host, honest)


async def test_a_slow_handshake_gives_way_to_an_honest_one():
    world = network()
    async with hosts("memory", 2, network=world) as (host, honest):
        host.handle(ECHO, echo)
        silent = [await attack(world, host, 9, speaks=False) for _ in range(256)]
        await asyncio.sleep(0.1)
        cut = sum(peer.is_cut for peer in silent)
        limit = host.limits.handshakes
        assert host.refused["transient-connections-in"] + host.refused["gave-way"] == cut
        assert len(silent) - cut <= limit
        await asyncio.sleep(host.limits.handshake_grace_s)
        assert host.limiter.used(SYSTEM, Resource.CONNECTIONS_IN) == limit
        await works(honest, host)
        assert host.refused["gave-way"] >= 1
        await asyncio.sleep(host.limits.handshake_timeout_s)
        assert all(peer.is_cut for peer in silent)
        await assert_unharmed(host, honest)


async def test_silent_strangers_give_way_before_those_who_have_begun():
    world = network()
    async with hosts("memory", 2, network=world, limits=HostLimits(handshakes=2)) as (host, honest):
        host.handle(ECHO, echo)
        begun, silent = [await attack(world, host, 9, speaks=False) for _ in range(2)]
        begun.link.write(begun.connection.pull()[:FIRST_FLIGHT])
        await asyncio.sleep(0.2)
        await works(honest, host)
        assert (begun.is_cut, silent.is_cut) == (False, True)
        assert host.refused == {"gave-way": 1}
        begun.link.abort()
        await assert_unharmed(host, honest)


async def test_half_a_frame_of_the_handshake_is_all_we_keep():
    world = network()
    async with hosts("memory", 1, network=world) as (host,):
        greedy = await attack(world, host, 9, speaks=False)
        greedy.link.write(bytes(greedy.connection.pull())[:-100] + bytes(1_000_000))
        await asyncio.sleep(1)
        assert greedy.is_cut
        assert len(host.limiter) == 0


# -- streams --


async def test_a_flood_of_streams_is_cut_to_size():
    world = network()
    async with hosts("memory", 2, network=world) as (host, honest):
        host.handle(ECHO, echo)
        flooder = await attack(world, host, 9)
        await asyncio.sleep(1)
        flooder.send(b"".join(window(2 * number + 1, 0, Flag.SYN) for number in range(1000)))
        await asyncio.sleep(1)
        assert host.limiter.used(SYSTEM, Resource.STREAMS_IN) == host.limits.negotiating_per_peer
        assert host.refused == {"peer-transient-streams-in": MAX_INBOUND - host.limits.negotiating_per_peer}
        await works(honest, host)
        await asyncio.sleep(host.limits.handshake_timeout_s)
        assert host.refused["negotiation-timeout"] == host.limits.negotiating_per_peer
        assert not flooder.is_cut
        flooder.link.abort()
        await assert_unharmed(host, honest)


async def test_streams_are_refused_when_their_windows_have_no_memory():
    world = network()
    room = CONNECTION_MEMORY + 3 * INITIAL_WINDOW
    async with hosts("memory", 1, network=world, limits=HostLimits(memory=room)) as (host,):
        host.handle("/never", never)
        greedy = await attack(world, host, 9)
        await asyncio.sleep(IDENTIFY_TIMEOUT_S + 1)  # our own stream's window has grown
        for number in range(5):
            greedy.send(opening(2 * number + 1, "/never"))
        await asyncio.sleep(1)
        assert host.refused == {"system-memory": 2}
        assert host.limiter.used(SYSTEM, Resource.MEMORY) <= room


async def test_a_protocol_named_byte_by_byte_must_be_named_in_time():
    world = network()
    async with hosts("memory", 1, network=world) as (host,):
        host.handle(ECHO, echo)
        dribbler = await attack(world, host, 9)
        await asyncio.sleep(1)
        frames = opening(1, ECHO)
        dribbler.send(frames[:13].replace(frames[8:12], (1).to_bytes(4, "big")))
        for byte in frames[13:26]:
            await asyncio.sleep(1)
            dribbler.send(data(1, bytes([byte])))
        assert host.refused == {"negotiation-timeout": 1}
        assert host.limiter.used(SYSTEM, Resource.STREAMS_IN) == 0
        dribbler.link.abort()


async def test_streams_that_are_never_read_hold_up_nobody():
    world = network()
    async with hosts("memory", 2, network=world) as (host, honest):
        host.handle(ECHO, echo)
        deaf = await attack(world, host, 9)
        await asyncio.sleep(1)
        for number in range(64):
            deaf.send(opening(2 * number + 1, ECHO))
        await asyncio.sleep(1)
        for number in range(64):  # never a WINDOW frame: echo blocks when ours is spent
            deaf.send(data(2 * number + 1, bytes(INITIAL_WINDOW // 2)))
            deaf.send(data(2 * number + 1, bytes(INITIAL_WINDOW // 2)))
        await asyncio.sleep(1)
        await works(honest, host)
        await asyncio.sleep(1)
        assert host.limiter.used(SYSTEM, Resource.STREAMS_IN) == 64
        deaf.link.abort()
        await assert_unharmed(host, honest)


async def test_handlers_that_run_on_after_a_reset_still_count():
    """As in HTTP/2's rapid reset: what counts is our work, not the peer's streams."""
    world = network()
    async with hosts("memory", 1, network=world) as (host,):
        host.handle("/never", never, max_streams_per_peer=10)
        resetter = await attack(world, host, 9)
        await asyncio.sleep(1)
        for number in range(50):
            resetter.send(opening(2 * number + 1, "/never"))
            await asyncio.sleep(0.01)
            resetter.send(window(2 * number + 1, 0, Flag.RST))
        assert host.limiter.used(SYSTEM, Resource.STREAMS_IN) == 10
        assert host.refused == {"protocol-peer-streams-in": 40}


FLOODS = {
    "pings": lambda _: PING,
    "resets": lambda n: window(2 * n + 1, 0, Flag.SYN) + window(2 * n + 1, 0, Flag.RST),
    "negotiated resets": lambda n: opening(2 * n + 1, ECHO) + window(2 * n + 1, 0, Flag.RST),
    "streams over the limit": lambda n: window(2 * n + 1, 0, Flag.SYN),
    "frames of one byte": lambda n: data(1, b"x", Flag.SYN if not n else 0),
    "frames for nobody": lambda n: data(2 * n + 1, b"x"),
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_floods_cost_the_connection(kind):
    world = network()
    async with hosts("memory", 2, network=world) as (host, honest):
        host.handle(ECHO, echo)
        await works(honest, host)
        flooder = await attack(world, host, 9)
        await asyncio.sleep(1)
        for start in range(0, 40_000, 1000):
            flooder.send(b"".join(FLOODS[kind](number) for number in range(start, start + 1000)))
            await asyncio.sleep(0.002)
            if flooder.is_cut:
                break
        assert flooder.is_cut
        assert host.refused["chores"] == 1
        await assert_unharmed(host, honest)


LIES = {
    "4 GiB for nobody": (data(1, b"", length=0xFFFFFFFF), False),
    "4 GiB on a stream": (opening(1, ECHO) + data(1, b"", length=0xFFFFFFFF), True),
    "windows over 4 GiB": (opening(1, ECHO) + window(1, 0xFFFFFFFF) + window(1, 0xFFFFFFFF), True),
    "a protocol name of 4 KiB": (data(1, b"\xff\x20" + bytes(4096), Flag.SYN), False),
}


@pytest.mark.parametrize("kind", LIES)
async def test_huge_lengths_are_believed_by_nobody(kind):
    frames, fatal = LIES[kind]
    world = network()
    async with hosts("memory", 2, network=world) as (host, honest):
        host.handle(ECHO, echo)
        liar = await attack(world, host, 9)
        await asyncio.sleep(1)
        liar.send(frames)
        await asyncio.sleep(1)
        assert liar.is_cut == fatal
        liar.link.abort()
        await assert_unharmed(host, honest)


# -- too many friends --


async def test_a_trusted_peer_gets_in_when_it_is_full_and_a_stranger_does_not():
    world = network()
    friend = key(3).peer_id
    limits = HostLimits(connections=1, high_water=1, low_water=1)
    async with hosts("memory", 4, network=world, limits=limits, allow=[str(friend)]) as (host, first, third, fourth):
        host.handle(ECHO, echo)
        await works(first, host)
        await fourth.connect(host.peer_id)  # its handshake ends before it hears what we say to it
        await asyncio.sleep(1)
        assert not fourth.is_connected(host.peer_id)
        assert third.peer_id == friend
        await works(third, host)
        assert set(host.peers()) == {first.peer_id, friend}
        assert host.refused["system-connections"] >= 1
        await first.disconnect(host.peer_id)
        await third.disconnect(host.peer_id)
        await assert_unharmed(host, fourth)


async def test_connections_of_one_peer_are_bounded_and_the_idle_one_makes_room():
    world = network()
    async with hosts("memory", 1, network=world, limits=HostLimits(connections_per_peer=3)) as (host,):
        host.handle("/never", never)
        same = []
        for _ in range(3):
            same.append(await attack(world, host, 9))
            await asyncio.sleep(20)
        same[0].send(opening(1, "/never"))
        await asyncio.sleep(1)
        same.append(await attack(world, host, 9))
        await asyncio.sleep(2)
        assert [peer.is_cut for peer in same] == [False, True, False, False]
        assert len(host.connections()) == 3
        assert host.refused == {"trimmed": 1}
        for peer in (same[2], same[3]):
            peer.send(opening(1, "/never"))
        await asyncio.sleep(1)
        late = await attack(world, host, 9)
        await asyncio.sleep(2)
        assert late.is_cut
        assert host.refused == {"trimmed": 1, "peer-connections": 1}
        assert len(host.connections()) == 3


async def test_idle_connections_are_closed_gently_down_to_the_low_mark():
    world = network()
    limits = HostLimits(high_water=5, low_water=3, grace_s=10)
    async with hosts("memory", 8, network=world) as (_, *others), memory_host(world, 9, limits=limits) as host:
        host.handle(ECHO, echo)
        host.handle("/never", never)
        for other in others:
            other.add_addrs(host.peer_id, host.listen_addrs)
        host.protect(others[0].peer_id, "a")
        host.protect(others[0].peer_id, "b")
        host.unprotect(others[0].peer_id, "a")
        stop = host.protect_if(lambda peer: peer == others[1].peer_id)
        busy = await others[2].open_stream(host.peer_id, "/never")
        for other in (*others[:2], *others[3:5]):
            await other.connect(host.peer_id)
        await asyncio.sleep(60)
        assert len(host.connections()) == 5
        await others[5].connect(host.peer_id)
        await asyncio.sleep(1)
        kept = {others[index].peer_id for index in (0, 1, 2)} | {others[5].peer_id}
        assert set(host.peers()) == kept  # one over the low mark: the newest is in its grace
        assert host.refused == {"trimmed": 2}
        assert not others[3].is_connected(host.peer_id)
        stop()
        host.unprotect(others[0].peer_id, "b")
        host.unprotect(others[0].peer_id, "never given")
        assert host._wires._tags == {}
        busy.reset()


async def test_no_more_streams_are_opened_than_we_allow_ourselves():
    world = network()
    async with hosts("memory", 2, network=world, limits=HostLimits(streams_out_per_peer=3)) as (one, two):
        two.handle("/never", never)
        await one.connect(two.peer_id)
        await asyncio.sleep(1)
        streams = [await one.open_stream(two.peer_id, "/never") for _ in range(3)]
        with pytest.raises(OverLimit, match="limit of 3 streams-out for peer"):
            await one.open_stream(two.peer_id, ping.PROTOCOL)
        for stream in streams:
            stream.reset()
        assert await one.ping(two.peer_id) > 0
