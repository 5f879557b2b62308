"""The host on an in-memory network under a virtual clock: dialing, sharing, limits, deadlines, death."""

import asyncio
import random
import re

import pytest
from helpers.hosts import MEMORY, hosts, key, memory_host
from swarmnode.node.host import HostLimits
from swarmnode.node.transport.base import ConnectionClosed, Priority, ProtocolUnsupported, StreamReset
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.node.transport.wire import KEEPALIVE_S
from swarmnode.protocol import identify, ping, yamux
from swarmnode.protocol.errors import ConfigError, DeadlineExceeded, PeerUnreachable
from swarmnode.protocol.multiaddr import Multiaddr

pytestmark = pytest.mark.virtual

ECHO = "/test/echo/1.0.0"
LATENCY = 0.05


async def echo(stream):
    while data := await stream.read(65536):
        await stream.write(data)


async def sleep_forever(stream):
    await asyncio.Event().wait()


def network(**options):
    return MemoryNetwork(random.Random(0), **{"latency_s": LATENCY, **options})


async def settle():
    """Long enough for identify and pushes to be over."""
    await asyncio.sleep(5)


async def test_identify_tells_both_sides_everything():
    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle(ECHO, echo)
        heard = []
        one.on_identify(heard.append)
        assert await one.connect(two.peer_id) == two.peer_id
        await settle()
        assert heard == [two.peer_id]
        assert {ECHO, ping.PROTOCOL, identify.PROTOCOL} <= one.book.get(two.peer_id).protocols
        assert two.book.get(one.peer_id).agent == "swarmnode"
        assert two.addrs(one.peer_id)[0] == one.listen_addrs[0].without_peer()
        assert two.observed_addrs == (two.listen_addrs[0].without_peer(),)
        (info,) = one.connections()
        assert (info.peer, info.outbound, info.agent) == (two.peer_id, True, "swarmnode")
        assert info.rtt_s == pytest.approx(2 * LATENCY)
        assert one.rtt(two.peer_id) == info.rtt_s


async def test_new_handlers_are_pushed():
    async with hosts("memory", 2, network=network()) as (one, two):
        await one.connect(two.peer_id)
        await settle()
        two.handle(ECHO, echo)
        await settle()
        assert ECHO in one.book.get(two.peer_id).protocols
        two.unhandle(ECHO)
        await settle()
        assert ECHO not in one.book.get(two.peer_id).protocols


async def test_costs_in_round_trips(clock):
    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle(ECHO, echo)
        start = clock.now()
        await one.connect(two.peer_id)
        assert clock.now() - start == pytest.approx(4 * LATENCY)  # TCP's and Noise's
        await settle()
        start = clock.now()
        stream = await one.open_stream(two.peer_id, ECHO)
        assert clock.now() == start  # the protocol is known: nothing to wait for
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"
        assert clock.now() - start == pytest.approx(2 * LATENCY)
        start = clock.now()
        assert await one.ping(two.peer_id) == pytest.approx(2 * LATENCY)
        assert clock.now() - start == pytest.approx(2 * LATENCY)
        await stream.close()


async def test_concurrent_dials_share_one_connection():
    world = network()
    async with hosts("memory", 2, network=world) as (one, two):
        two.handle(ECHO, echo)
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(one.open_stream(two.peer_id, ECHO))
        assert world.dials == 1
        assert len(one.connections()) == 1
        await one.connect(None, two.listen_addrs)
        assert world.dials == 1


async def test_both_dialing_at_once_works():
    async with hosts("memory", 2, network=network()) as (one, two):
        for host in (one, two):
            host.handle(ECHO, echo)
        async with asyncio.TaskGroup() as group:
            group.create_task(one.connect(two.peer_id))
            group.create_task(two.connect(one.peer_id))
        for near, far in ((one, two), (two, one)):
            stream = await near.open_stream(far.peer_id, ECHO)
            await stream.write(b"x")
            assert await stream.read_exactly(1) == b"x"
            await stream.close()


async def test_a_dial_survives_its_first_caller():
    async with hosts("memory", 2, network=network()) as (one, two):
        async with asyncio.TaskGroup() as group:
            first = group.create_task(one.connect(two.peer_id))
            second = group.create_task(one.connect(two.peer_id))
            await asyncio.sleep(LATENCY)
            first.cancel()
        assert second.result() == two.peer_id


async def test_the_working_address_of_several_is_found(clock):
    async with hosts("memory", 2, network=network()) as (one, two):
        dead = [Multiaddr.parse(f"/memory/{number}") for number in (901, 902)]
        foreign = Multiaddr.parse("/ip4/1.2.3.4/udp/9/quic-v1")
        await one.connect(two.peer_id, [foreign, *dead, *two.listen_addrs])
        assert one.is_connected(two.peer_id)


async def test_unreachable_names_every_address_and_cause():
    async with hosts("memory", 1, network=network()) as (one,):
        dead = Multiaddr.parse("/memory/901")
        foreign = Multiaddr.parse("/ip4/1.2.3.4/udp/9/quic-v1")
        other = Multiaddr.parse(f"/memory/5/p2p/{key(7).peer_id}")
        with pytest.raises(PeerUnreachable) as caught:
            await one.connect(key(9).peer_id, [dead, foreign, other])
        for part in (str(key(9).peer_id), "/memory/901: connection refused", "no transport", "another peer"):
            assert part in str(caught.value)
        with pytest.raises(PeerUnreachable, match="no address is known"):
            await one.connect(key(9).peer_id)
        with pytest.raises(PeerUnreachable, match="this node itself"):
            await one.connect(one.peer_id)


async def test_the_wrong_peer_behind_an_address():
    async with hosts("memory", 2, network=network()) as (one, two):
        with pytest.raises(PeerUnreachable, match=f"the peer is {two.peer_id}, not the expected"):
            await one.connect(key(9).peer_id, [a.without_peer() for a in two.listen_addrs])
        assert one.connections() == []


async def test_an_address_that_leads_back_home():
    async with hosts("memory", 1, network=network()) as (one,):
        with pytest.raises(PeerUnreachable, match="back to this node itself"):
            await one.connect(None, [a.without_peer() for a in one.listen_addrs])


async def test_a_listener_that_never_answers(clock):
    world = network()
    silent = world.transport()
    await silent.listen(Multiaddr.parse("/memory/77"), lambda address: _Mute())
    async with hosts("memory", 1, network=world) as (one,):
        start = clock.now()
        with pytest.raises(PeerUnreachable, match=r"/memory/77 within 3 s; check"):
            await one.connect(key(9).peer_id, [Multiaddr.parse("/memory/77")], timeout_s=3)
        assert clock.now() - start == pytest.approx(3)


class _Mute(asyncio.BufferedProtocol):
    def get_buffer(self, sizehint):
        return bytearray(4096)

    def buffer_updated(self, nbytes):
        pass


async def test_strangers_who_do_not_prove_themselves_are_cut(clock):
    world = network()
    async with hosts("memory", 1, network=world, limits=HostLimits(handshakes=2)) as (one,):
        mute = world.transport()
        lost = []
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(mute.dial(one.listen_addrs[0], lambda address: _Lossy(lost)))
        await asyncio.sleep(1)
        assert one.refused == {"transient-connections-in": 1}
        assert len(lost) == 1
        await asyncio.sleep(one.limits.handshake_timeout_s)
        assert len(lost) == 3


class _Lossy(_Mute):
    def __init__(self, lost):
        self._lost = lost

    def connection_lost(self, exc):
        self._lost.append(exc)


async def test_connection_limit_is_exact():
    async with hosts("memory", 4, network=network(), limits=HostLimits(connections=2)) as (one, *others):
        for other in others[:2]:
            await other.connect(one.peer_id)
        with pytest.raises(PeerUnreachable):
            await others[2].connect(one.peer_id)
        assert one.refused == {"system-connections": 1}


async def test_death_fails_every_read_at_once_and_is_told(clock):
    world = network()
    async with hosts("memory", 2, network=world) as (one, two):
        two.handle(ECHO, sleep_forever)
        gone = []
        unsubscribe = one.on_disconnect(gone.append)
        streams = [await one.open_stream(two.peer_id, ECHO) for _ in range(5)]
        reads = [asyncio.get_running_loop().create_task(stream.read(1)) for stream in streams]
        await settle()
        start = clock.now()
        world.crash(two._transports[0])
        for read in reads:
            with pytest.raises(ConnectionClosed, match=one.book and two.peer_id.short):
                await read
        assert clock.now() - start == pytest.approx(LATENCY)
        assert gone == [two.peer_id]
        with pytest.raises(ConnectionClosed):
            await streams[0].write(b"x")
        assert not one.is_connected(two.peer_id)
        unsubscribe()
        unsubscribe()
        with pytest.raises(PeerUnreachable):
            await one.open_stream(two.peer_id, ECHO)


async def test_a_silent_death_is_noticed_by_the_keepalive(clock):
    world = network()
    async with hosts("memory", 2, network=world) as (one, two):
        await one.connect(two.peer_id)
        await settle()
        world.weather = lambda *_: []  # everything is lost, nobody is told
        gone = asyncio.Event()
        one.on_disconnect(lambda peer: gone.set())
        start = clock.now()
        await gone.wait()
        assert clock.now() - start < 4 * KEEPALIVE_S


async def test_idle_connections_live_on():
    async with hosts("memory", 2, network=network()) as (one, two):
        await one.connect(two.peer_id)
        await asyncio.sleep(24 * 3600)
        assert one.is_connected(two.peer_id)
        assert one.rtt(two.peer_id) == pytest.approx(2 * LATENCY)


async def test_streams_to_ourselves_stay_inside():
    async with hosts("memory", 1, network=network()) as (one,):
        one.handle(ECHO, echo)
        stream = await one.open_stream(one.peer_id, ECHO)
        await stream.write(b"me")
        assert await stream.read_exactly(2) == b"me"
        assert stream.remote == one.peer_id
        await stream.close()
        assert one.connections() == []
        with pytest.raises(ProtocolUnsupported):
            await one.open_stream(one.peer_id, "/unknown")


async def test_unknown_protocols_are_refused():
    async with hosts("memory", 2, network=network()) as (one, two):
        with pytest.raises(ProtocolUnsupported, match=f"{two.peer_id} does not speak /unknown"):
            await one.open_stream(two.peer_id, "/unknown")
        assert one.is_connected(two.peer_id)


async def test_a_protocol_dropped_since_identify_fails_the_read():
    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle(ECHO, echo)
        await one.connect(two.peer_id)
        await settle()
        two.unhandle(ECHO)
        stream = await one.open_stream(two.peer_id, ECHO)
        await stream.write(b"x")
        with pytest.raises(StreamReset, match="does not speak"):
            await stream.read(1)


async def test_opening_has_a_deadline():
    async with hosts("memory", 2, network=network(latency_s=2.0)) as (one, two):
        two.handle(ECHO, echo)
        await one.connect(two.peer_id)
        with pytest.raises(DeadlineExceeded, match="within 1 s"):
            await one.open_stream(two.peer_id, ECHO, timeout_s=1)


async def test_handlers_end_with_their_stream(caplog):
    ended = []

    async def crash(stream):
        try:
            raise ValueError("our bug")
        finally:
            ended.append("crash")

    async def returns(stream):
        await stream.write(b"bye")
        ended.append("returns")

    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle("/crash", crash)
        two.handle("/returns", returns)
        with pytest.raises(StreamReset):
            await (await one.open_stream(two.peer_id, "/crash")).read(1)
        stream = await one.open_stream(two.peer_id, "/returns")
        assert await stream.read_exactly(3) == b"bye"
        assert await stream.read(1) == b""
        await stream.close()
        await settle()
        assert ended == ["crash", "returns"]
        assert "our bug" in caplog.text
        assert one.connections()[0].streams == two.connections()[0].streams == 0


async def test_streams_per_peer_and_protocol_are_capped():
    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle(ECHO, echo, max_streams_per_peer=3)
        streams = [await one.open_stream(two.peer_id, ECHO) for _ in range(3)]
        with pytest.raises(StreamReset):
            await (await one.open_stream(two.peer_id, ECHO)).read(1)
        assert two.refused == {"protocol-peer-streams-in": 1}
        streams[0].reset()
        await settle()
        extra = await one.open_stream(two.peer_id, ECHO)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await extra.read(1)


async def test_more_streams_than_may_be_unacknowledged_wait_their_turn():
    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle(ECHO, echo)
        await one.connect(two.peer_id)
        await settle()
        count = yamux.MAX_UNACKED + 40

        async def once():
            stream = await one.open_stream(two.peer_id, ECHO)
            await stream.write(b"x")
            await stream.close_write()
            try:
                return await stream.read(1)
            except StreamReset:  # over the per-protocol cap of the listener
                return b"refused"

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(once()) for _ in range(count)]
        assert {task.result() for task in tasks} <= {b"x", b"refused"}
        assert sum(task.result() == b"x" for task in tasks) >= yamux.MAX_UNACKED


async def test_closed_streams_the_peer_never_ends_are_reset():
    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle(ECHO, sleep_forever)
        stream = await one.open_stream(two.peer_id, ECHO)
        await stream.close()
        await asyncio.sleep(3 * KEEPALIVE_S)
        assert one.connections()[0].streams == 0


async def test_clean_close_is_seen_as_such():
    world = network()
    async with hosts("memory", 2, network=world) as (one, two):
        two.handle(ECHO, echo)
        stream = await one.open_stream(two.peer_id, ECHO)
        reading = asyncio.get_running_loop().create_task(stream.read(1))
        await settle()
        await two.aclose()
        with pytest.raises((ConnectionClosed, StreamReset)):
            await reading
        await settle()
        assert one.connections() == []
        await two.aclose()


async def test_streams_that_arrive_while_closing_are_refused(caplog):
    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle(ECHO, echo)
        await one.connect(two.peer_id)
        await settle()
        stream = await one.open_stream(two.peer_id, ECHO)
        await stream.write(b"x")
        await two._tasks.aclose()
        with pytest.raises(StreamReset):
            await stream.read(1)
        assert two.refused == {"tasks-full": 1}
        assert one.is_connected(two.peer_id)
    assert not caplog.records


async def test_disconnect_closes_and_reconnecting_works():
    async with hosts("memory", 2, network=network()) as (one, two):
        two.handle(ECHO, echo)
        await one.connect(two.peer_id)
        await one.disconnect(two.peer_id)
        assert not one.is_connected(two.peer_id)
        stream = await one.open_stream(two.peer_id, ECHO)
        await stream.write(b"x")
        assert await stream.read_exactly(1) == b"x"
        await stream.close()


async def test_partition_and_heal():
    world = network()
    async with hosts("memory", 2, network=world) as (one, two):
        paths = (one._transports[0], two._transports[0])
        await one.connect(two.peer_id)
        world.cut(*paths)
        await settle()
        with pytest.raises(PeerUnreachable):
            await one.connect(two.peer_id)
        world.heal(*paths)
        await one.connect(two.peer_id)


async def test_listening_twice_on_one_address():
    world = network()
    async with hosts("memory", 1, network=world) as (one,):
        taken = one.listen_addrs[0].without_peer()
        with pytest.raises(ConfigError, match="in use"):
            async with memory_host(world, 2, listen=[taken]):
                pass
        with pytest.raises(ConfigError, match="cannot listen on"):
            await one.listen(Multiaddr.parse("/dns4/example.com/tcp/1"))


def test_limits_are_checked():
    with pytest.raises(ConfigError, match=re.escape("HostLimits.handshakes is 0")):
        HostLimits(handshakes=0)


async def test_dials_that_fail_at_random_are_retried_by_the_caller():
    world = MemoryNetwork(random.Random(3), refuse=0.5)
    async with hosts("memory", 2, network=world) as (one, two):
        for _ in range(20):
            try:
                await one.connect(two.peer_id)
            except PeerUnreachable:
                continue
            break
        assert one.is_connected(two.peer_id)


async def test_one_host_many_transports_and_addresses():
    world = network()
    async with hosts("memory", 1, network=world, listen=[MEMORY, MEMORY]) as (one,):
        assert len(one.listen_addrs) == 2
        assert all(address.peer_id == one.peer_id for address in one.listen_addrs)


async def test_decode_is_not_stuck_behind_bulk(clock):
    """A token's round trip on a link of 100 Mbit/s that another stream saturates: under three idle ones."""
    world = network(latency_s=0.01, rate=12.5e6)
    async with hosts("memory", 2, network=world) as (one, two):

        async def sink(stream):
            while await stream.read(1 << 20):
                pass

        two.handle(ECHO, echo)
        two.handle("/sink", sink)
        await one.connect(two.peer_id)
        await settle()
        token = await one.open_stream(two.peer_id, ECHO)
        token.set_priority(Priority.DECODE)

        async def round_trip():
            start = clock.now()
            await token.write(bytes(8000))
            await token.read_exactly(8000)
            return clock.now() - start

        idle = await round_trip()
        bulk = await one.open_stream(two.peer_id, "/sink")
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(bulk.write(bytes(30_000_000)))
            await asyncio.sleep(0.5)
            busy = [await round_trip() for _ in range(20)]
            assert not writing.done()
        assert max(busy) < 3 * idle
