"""Keeping places at relays: enough of them, renewed in time, replaced when they die, announced while they last."""

import asyncio
import contextlib
import random

import pytest
from helpers.hosts import at_rest, key, memory_host
from helpers.relayed import UNMETERED, hidden_host, relay_host
from swarmnode.node.relay import keeper as keeping
from swarmnode.node.relay.keeper import Keeper, Turn
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol import relay
from swarmnode.protocol.relay_ledger import RelayLimits, Rushed
from swarmnode.routing.table import Contact

pytestmark = pytest.mark.virtual
HOUR = 3600


@pytest.fixture
def network():
    return MemoryNetwork(random.Random(0), latency_s=0.01)


class World:
    """Some relays and a hidden host that keeps places at them."""

    def __init__(self, network, stack):
        self.network = network
        self.stack = stack
        self.events = []
        self.relays = {}

    async def relay(self, number, limits=UNMETERED):
        host, service = await self.stack.enter_async_context(relay_host("memory", number, self.network, limits))
        self.relays[host.peer_id] = host, service
        return host

    async def keep(self, count, named=(), find=None):
        self.host = await self.stack.enter_async_context(hidden_host("memory", 1, self.network))
        named = [relay.listen_addrs[0] for relay in named]
        self.keeper = Keeper(self.host, rng=random.Random(0), named=named, find=find)
        self.keeper.on_change.append(lambda event: self.events.append((event.turn, event.place.relay)))
        self.keeper.want(count)
        task = asyncio.get_running_loop().create_task(self.keeper.run())
        self.stack.push_async_callback(self.end, task)
        await self.keeper.settled()

    async def end(self, task):
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()

    @property
    def at(self):
        return {place.relay for place in self.keeper.places}

    @property
    def announced(self):
        return {relay.CircuitAddress.of(addr).relay for addr in self.host.listen_addrs if addr.is_relayed}


@pytest.fixture
async def world(network):
    async with contextlib.AsyncExitStack() as stack:
        yield World(network, stack)


async def find_all(world):
    return [Contact(peer, host.listen_addrs) for peer, (host, _) in world.relays.items()]


async def test_a_named_relay(world):
    first = await world.relay(90)
    await world.keep(1, named=[first])
    assert world.at == world.announced == {first.peer_id}
    assert world.events == [(Turn.GAINED, first.peer_id)]
    assert first.connections()[0].protected_by == ("relayed",)
    assert world.host.connections()[0].protected_by == ("relay",)
    world.keeper.want(0)
    await asyncio.sleep(1)
    assert world.at == world.announced == set()
    assert world.events[-1] == (Turn.LOST, first.peer_id)
    assert world.host.connections()[0].protected_by == ()


async def test_relays_are_found_and_the_nearest_taken(world):
    world.network.distance = lambda a, b: 0.002 * (a.number + b.number)
    for number in range(90, 96):
        await world.relay(number)
    await world.keep(2, find=lambda: find_all(world))
    assert world.at == world.announced == {key(90).peer_id, key(91).peer_id}


async def test_connected_peers_that_are_relays_need_no_search(world):
    first, plain = await world.relay(90), await world.stack.enter_async_context(memory_host(world.network, 50))
    await world.keep(1)
    assert world.at == set()
    await world.host.connect(plain.peer_id, plain.listen_addrs)
    await world.host.connect(first.peer_id, first.listen_addrs)
    await asyncio.sleep(0.5)
    assert world.at == {first.peer_id}


async def test_a_place_is_renewed_long_before_its_end(world):
    first = await world.relay(90, RelayLimits(reservation_s=HOUR))
    await world.keep(1, named=[first])
    _, service = world.relays[first.peer_id]
    for _ in range(30):
        before = world.keeper.places[0].expires
        await asyncio.sleep(HOUR / 4)
        assert service.ledger.has(world.host.peer_id, first.clock.now())
        assert world.keeper.places[0].expires - world.host.clock.now() > HOUR * 0.25
        assert world.keeper.places[0].expires >= before
    renewed = world.events.count((Turn.RENEWED, first.peer_id))
    assert 30 / 4 / (keeping.RENEW_AT + keeping.RENEW_SPREAD) - 1 <= renewed <= 30 / 4 / keeping.RENEW_AT
    assert world.events.count((Turn.GAINED, first.peer_id)) == 1


async def test_the_dead_are_replaced_at_once(world):
    first, second, third = [await world.relay(number) for number in (90, 91, 92)]
    await world.keep(2, named=[first, second], find=lambda: find_all(world))
    assert world.announced == {first.peer_id, second.peer_id}
    world.network.crash(first._transports[0])
    await asyncio.sleep(0.02)
    assert world.announced == {second.peer_id}
    await asyncio.sleep(1)
    assert world.announced == {second.peer_id, third.peer_id}
    assert (Turn.LOST, first.peer_id) in world.events


async def test_a_relay_that_comes_back_is_asked_again(world):
    first = await world.relay(90)
    await world.keep(1, named=[first])
    world.network.hold(first._transports[0], world.host._transports[0])
    await asyncio.sleep(60)
    assert world.at == world.announced == set()
    world.network.heal(first._transports[0], world.host._transports[0])
    await asyncio.sleep(120)
    assert world.at == {first.peer_id}


async def test_a_relay_that_is_full(world):
    full, other = await world.relay(90, RelayLimits(reservations=1)), await world.relay(91)
    occupant = await world.stack.enter_async_context(hidden_host("memory", 2, world.network))
    await occupant.circuits.reserve(full.peer_id, [full.listen_addrs[0].without_peer()])
    await world.keep(2, named=[full], find=lambda: find_all(world))
    assert world.at == {other.peer_id}
    await occupant.disconnect(full.peer_id)
    await asyncio.sleep(60)
    assert world.at == {full.peer_id, other.peer_id}


async def test_a_place_that_is_not_renewed_is_lost_at_its_end(world):
    first = await world.relay(90, RelayLimits(reservation_s=HOUR))
    await world.keep(1, named=[first])
    _, service = world.relays[first.peer_id]
    service.ledger.reserve = refuse
    await asyncio.sleep(0.9 * HOUR)
    assert world.announced == {first.peer_id}  # it holds until then
    await asyncio.sleep(0.1 * HOUR + 2 * keeping.RETRY_S)
    assert world.announced == set()
    assert world.events == [(Turn.GAINED, first.peer_id), (Turn.LOST, first.peer_id)]
    assert first._tasks.crashes == world.host._tasks.crashes == 0


def refuse(*args):
    raise Rushed("not now")


async def test_no_more_places_than_wanted_nor_than_there_may_be(world):
    relays = [await world.relay(number) for number in range(90, 97)]
    await world.keep(100, named=relays)
    assert len(world.at) == keeping.MAX_PLACES
    world.keeper.want(1)
    await asyncio.sleep(1)
    assert len(world.at) == len(world.announced) == 1
    await at_rest(world.host)


async def test_nobody_asks_all_the_time(world):
    """A host without any relay looks now and then, and searches seldom."""
    searches = []

    async def nobody():
        searches.append(world.host.clock.now())
        return []

    await world.keep(2, find=nobody)
    await asyncio.sleep(600)
    assert 10 <= len(searches) <= 600 / keeping.FIND_S + 1
