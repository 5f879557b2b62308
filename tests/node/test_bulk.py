"""Bulk connections on a virtual network: when there are any, how many, who refuses, when they end."""

import asyncio
import random

import pytest
from helpers.hosts import at_rest, hosts, key, memory_host
from swarmnode.node import bulk
from swarmnode.node.host import HostLimits
from swarmnode.node.transport.memory import MemoryNetwork, Nat

pytestmark = pytest.mark.virtual

SINK, HOLD = "/test/sink/1.0.0", "/test/hold/1.0.0"
RTT_S = 0.1


async def sink(stream):
    while await stream.read(1 << 16):
        pass


async def hold(stream):
    await stream.read(1)


def far_apart(rtt_s=RTT_S):
    return MemoryNetwork(random.Random(0), latency_s=rtt_s / 2)


async def introduced(one, two, *, rate=1e9):
    """Connected, and told what the other speaks; as if `rate` had been seen to flow."""
    for host in (one, two):
        host.handle(SINK, sink)
        host.handle(HOLD, hold)
    await one.connect(two.peer_id)
    while not (  # noqa: ASYNC110 - identify has no event for both sides
        one.book.get(two.peer_id).protocols and two.book.get(one.peer_id).protocols
    ):
        await asyncio.sleep(0.01)
    one._bulk._rates[two.peer_id] = rate


def kinds(host):
    """How many connections for latency, how many for bulk."""
    marks = [info.bulk for info in host.connections()]
    return marks.count(False), marks.count(True)


def wire(stream):
    return stream.wire


async def test_bulk_and_latency_use_different_connections():
    async with hosts("memory", 2, network=far_apart()) as (one, two):
        await introduced(one, two)
        before = await one.open_stream(two.peer_id, HOLD)
        heavy = await one.open_stream(two.peer_id, SINK, bulk=True)
        after = await one.open_stream(two.peer_id, HOLD)
        assert wire(before) is wire(after) is not wire(heavy)
        assert wire(heavy).bulk
        # the other side knows, too: what it sends in a hurry stays off it
        assert kinds(one) == kinds(two) == (1, 1)
        back = await two.open_stream(one.peer_id, HOLD)
        assert not wire(back).bulk
        # and its own bulk goes there, without a connection more
        assert wire(await two.open_stream(one.peer_id, SINK, bulk=True)).bulk
        for stream in (before, after, back):
            stream.reset()


async def test_a_lane_per_stream_until_there_are_enough():
    async with hosts("memory", 2, network=far_apart()) as (one, two):
        await introduced(one, two)
        lanes = one.bulk_lanes(two.peer_id)
        assert lanes == bulk.MAX_LANES
        together = await asyncio.gather(
            *(one.open_stream(two.peer_id, SINK, bulk=True) for _ in range(2 * lanes)),
        )
        assert kinds(one) == (1, lanes)
        assert len({wire(stream) for stream in together}) == lanes
        for _ in range(3 * lanes):
            await one.open_stream(two.peer_id, SINK, bulk=True)
        assert kinds(one) == (1, lanes)
        per_lane = [bulk._load(lane) for lane in one._wires if lane.bulk]
        assert max(per_lane) - min(per_lane) <= 2


@pytest.mark.parametrize(("rtt_s", "lanes"), [(0.002, 0), (0.01, 1), (0.05, 3), (0.1, 5), (0.3, 5)])
async def test_how_many_lanes_a_path_deserves(rtt_s, lanes):
    async with hosts("memory", 2, network=far_apart(rtt_s)) as (one, two):
        await introduced(one, two, rate=80e6)
        assert one.bulk_lanes(two.peer_id) == max(1, lanes)
        streams = [await one.open_stream(two.peer_id, SINK, bulk=True) for _ in range(7)]
        assert kinds(one) == (1, lanes)
        assert all(wire(stream).bulk == bool(lanes) for stream in streams)


@pytest.mark.parametrize(("rate", "lanes"), [(10e6, 1), (13e6, 1), (20e6, 5)])
async def test_lanes_are_added_when_the_line_takes_more_than_they_carry(rate, lanes):
    # each link of this network has the rate: as if a buffer held it up there
    network = MemoryNetwork(random.Random(0), latency_s=RTT_S / 2, rate=rate)
    async with hosts("memory", 2, network=network) as (one, two):
        await introduced(one, two, rate=0)
        assert one.bulk_lanes(two.peer_id) == 1
        async with asyncio.TaskGroup() as group:
            pumps = []
            for _ in range(8):
                while len(pumps) < one.bulk_lanes(two.peer_id):
                    stream = await one.open_stream(two.peer_id, SINK, bulk=True)
                    pumps.append(group.create_task(pump(stream)))
                await asyncio.sleep(2 * bulk.SAMPLE_S)
            assert kinds(one) == (1, lanes)
            # who receives sees the same
            assert two.bulk_lanes(one.peer_id) == lanes
            for task in pumps:
                task.cancel()


async def pump(stream):
    while True:
        await stream.write(bytes(1 << 16))


async def test_what_has_flowed_is_forgotten_with_the_last_lane():
    async with hosts("memory", 2, network=far_apart()) as (one, two):
        await introduced(one, two)
        await (await one.open_stream(two.peer_id, SINK, bulk=True)).close()
        await asyncio.sleep(3 * bulk.IDLE_S)
        for host, other in ((one, two), (two, one)):
            assert host.bulk_lanes(other.peer_id) == 1
            assert not host._bulk._rates
            assert not host._bulk._lanes


async def test_before_the_first_keepalive_the_handshake_tells_the_distance():
    async with hosts("memory", 2, network=far_apart()) as (one, two):
        await introduced(one, two)
        for info in one._wires:
            info.life.rtt_min_s = None
        assert one.bulk_lanes(two.peer_id) == bulk.MAX_LANES


async def test_a_peer_that_does_not_speak_it_is_never_asked():
    network = far_apart()
    async with hosts("memory", 2, network=network) as (one, two):
        two.unhandle(bulk.PROTOCOL)
        await introduced(one, two)
        dials = network.dials
        stream = await one.open_stream(two.peer_id, SINK, bulk=True)
        assert not wire(stream).bulk
        assert network.dials == dials


async def test_a_peer_that_refuses_costs_the_attempt_once(clock):
    network = far_apart()
    async with memory_host(network, 1) as one, memory_host(network, 2, limits=one_connection()) as two:
        one.add_addrs(two.peer_id, two.listen_addrs)
        await introduced(one, two)
        main = wire(await one.open_stream(two.peer_id, HOLD))
        await asyncio.sleep(RTT_S)
        started = clock.now()
        stream = await one.open_stream(two.peer_id, SINK, bulk=True)
        assert wire(stream) is main
        assert clock.now() - started < bulk.DIAL_S + bulk.DIAL_RTTS * RTT_S
        dials = network.dials
        started = clock.now()
        assert not wire(await one.open_stream(two.peer_id, SINK, bulk=True)).bulk
        assert clock.now() - started == 0
        assert network.dials == dials
        await asyncio.sleep(bulk.RETRY_S)
        await one.open_stream(two.peer_id, SINK, bulk=True)
        assert network.dials == dials + 1
        assert kinds(one) == (1, 0)


def one_connection():
    return HostLimits(connections_per_peer=1)


async def test_a_peer_that_drops_the_idle_connection_for_the_new_one_is_connected_again():
    network = far_apart()
    async with memory_host(network, 1) as one, memory_host(network, 2, limits=one_connection()) as two:
        one.add_addrs(two.peer_id, two.listen_addrs)
        await introduced(one, two)
        stream = await one.open_stream(two.peer_id, SINK, bulk=True)
        assert not wire(stream).bulk
        await stream.write(b"through")
        assert kinds(one) == (1, 0)


async def test_the_list_of_peers_left_alone_is_bounded(monkeypatch, clock):
    monkeypatch.setattr(bulk, "MAX_LEFT_ALONE", 2)
    async with hosts("memory", 1) as (one,):
        for number in range(5):
            one._bulk._leave_alone(key(number).peer_id)
        assert len(one._bulk._left_alone) == 2
        await asyncio.sleep(bulk.RETRY_S)
        one._bulk._leave_alone(key(9).peer_id)
        assert list(one._bulk._left_alone) == [key(9).peer_id]


async def test_a_peer_that_cannot_be_dialed_costs_a_bounded_wait(clock):
    network = far_apart()
    private = network.transport(private=True)
    async with memory_host(network, 1) as one, memory_host(network, 2) as two:
        two._transports[0].nat = Nat.CONE
        two.add_addrs(one.peer_id, one.listen_addrs)
        await introduced(two, one)
        assert private.private
        started = clock.now()
        stream = await one.open_stream(two.peer_id, SINK, bulk=True)
        assert not wire(stream).bulk
        assert clock.now() - started <= bulk.DIAL_S + bulk.DIAL_RTTS * RTT_S + 0.01
        # it dials us without trouble, and then that connection serves both
        assert wire(await two.open_stream(one.peer_id, SINK, bulk=True)).bulk
        assert wire(await one.open_stream(two.peer_id, SINK, bulk=True)).bulk


async def test_idle_lanes_are_closed_and_used_ones_are_not():
    async with hosts("memory", 2, network=far_apart()) as (one, two):
        await introduced(one, two)
        quiet, busy = [await one.open_stream(two.peer_id, SINK, bulk=True) for _ in range(2)]
        await quiet.close()
        wire(busy).used_at -= 2 * bulk.IDLE_S  # however seldom that is brought up to date
        await asyncio.sleep(3 * bulk.IDLE_S)
        assert wire(quiet).closed
        assert wire(busy).is_open
        assert kinds(one) == kinds(two) == (1, 1)
        await busy.close()
        await asyncio.sleep(3 * bulk.IDLE_S)
        assert kinds(one) == kinds(two) == (1, 0)
        await at_rest(one, two)  # nobody looks for idle lanes any more
        assert wire(await one.open_stream(two.peer_id, SINK, bulk=True)).bulk


async def test_what_the_other_side_may_be_closing_is_not_used():
    async with hosts("memory", 2, network=far_apart()) as (one, two):
        await introduced(one, two)
        stream = await one.open_stream(two.peer_id, SINK, bulk=True)
        await stream.close()
        await asyncio.sleep(bulk.IDLE_S - 1)
        (lane,) = [other for other in two._wires.to(one.peer_id) if other.bulk]
        assert lane.is_open
        fresh = await two.open_stream(one.peer_id, SINK, bulk=True)
        assert wire(fresh) is not lane


async def test_a_lane_that_breaks_leaves_the_rest_alone():
    async with hosts("memory", 2, network=far_apart()) as (one, two):
        await introduced(one, two)
        hurry = await one.open_stream(two.peer_id, HOLD)
        lane = wire(await one.open_stream(two.peer_id, SINK, bulk=True))
        lane.abort("cut")
        assert wire(await one.open_stream(two.peer_id, HOLD)) is wire(hurry)
        assert one.is_connected(two.peer_id)
        again = await one.open_stream(two.peer_id, SINK, bulk=True)
        assert wire(again) is not lane


async def test_when_only_lanes_are_left_a_connection_is_dialed_or_they_must_do():
    network = far_apart()
    async with hosts("memory", 2, network=network) as (one, two):
        await introduced(one, two)
        lane = wire(await one.open_stream(two.peer_id, SINK, bulk=True))
        wire(await one.open_stream(two.peer_id, HOLD)).abort("cut")
        fresh = wire(await one.open_stream(two.peer_id, HOLD))
        assert not fresh.bulk
        fresh.abort("cut")
        network.refuse = 1.0
        assert wire(await one.open_stream(two.peer_id, HOLD)) is lane


async def test_the_only_connection_cannot_be_marked():
    async with hosts("memory", 2, network=far_apart()) as (one, two):
        await introduced(one, two)
        (main,) = one._wires.to(two.peer_id)
        with pytest.raises(ConnectionResetError):
            await one._bulk._mark(main)
        assert kinds(two) == (1, 0)


async def test_streams_to_ourselves_need_no_connection():
    async with hosts("memory", 1) as (one,):
        one.handle(SINK, sink)
        await (await one.open_stream(one.peer_id, SINK, bulk=True)).close()
