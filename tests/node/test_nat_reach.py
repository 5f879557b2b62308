"""The verdict of whole hosts behind NATs of every kind, in memory: what is tried, what comes out, what is announced."""

import asyncio
import contextlib
import random

import pytest
from helpers.hosts import memory_host
from swarmnode.node.nat.reach import ADVERTISED, Reachability
from swarmnode.node.transport.memory import MemoryNetwork, Nat
from swarmnode.protocol.verdict import Reach, Source

pytestmark = pytest.mark.virtual

OPEN, FULL, CONE, SYMMETRIC = Nat.OPEN, Nat.FULL, Nat.CONE, Nat.SYMMETRIC


@contextlib.asynccontextmanager
async def world(nat, observers=4, network=None):
    """A host behind a NAT, its service, and open hosts that it is connected with; everybody answers and asks."""
    network = network or MemoryNetwork(random.Random(0), latency_s=0.02)
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        services, made = [], []
        for number in range(1, observers + 2):
            host = await stack.enter_async_context(memory_host(network, number, nat=nat if number == 1 else OPEN))
            service = Reachability(host, clock=host.clock, rng=random.Random(number))
            services.append((service, group.create_task(service.run())))
            made.append(host)
        await asyncio.sleep(0)
        for other in made[1:]:
            await made[0].connect(other.peer_id, other.listen_addrs)
        try:
            yield made, services[0][0]
        finally:
            for _, task in services:
                task.cancel()


@pytest.mark.parametrize(
    ("nat", "reach", "source"),
    [
        (OPEN, Reach.PUBLIC, Source.LISTEN),
        (FULL, Reach.PUBLIC, Source.OBSERVED),
        (SYMMETRIC, Reach.PRIVATE, None),
    ],
)
async def test_each_kind_of_nat(nat, reach, source):
    heard = []
    async with world(nat) as (hosts, service):
        service.on_change.append(lambda verdict: heard.append(verdict.reach))
        await asyncio.sleep(400)
        assert service.verdict.reach is reach
        assert service.verdict.confidence == 1.0
        assert heard == [reach], "no flapping"
        proven = [where for where, (_, v) in service.verdicts.items() if v.reach is Reach.PUBLIC]
        assert [service.verdicts[address][0] for address in proven] == ([source] if source is not None else [])
        known = hosts[1].addrs(hosts[0].peer_id)
        assert set(proven) <= set(known), "what works is announced"


async def test_a_router_that_lets_in_whom_we_dialed_fools_only_those():
    """Three were dialed from the listening port, and get in; the fourth was not, and does not."""
    async with world(CONE, observers=8) as (_, service):
        await asyncio.sleep(200)
        assert service.verdict.reach is Reach.PRIVATE


async def test_a_mapped_address_is_verified_and_announced_until_it_is_gone():
    async with world(FULL) as (hosts, service):
        await asyncio.sleep(100)
        (proven,) = service._assessor.reachable(hosts[0].clock.now())
        service.mapped([proven])
        await asyncio.sleep(100)
        assert service.verdicts[proven][0] is Source.MAPPED
        assert hosts[0].listen_addrs[0].without_peer() == proven
        hosts[0].dial_from_listener(lambda _: False)
        for other in hosts[1:]:
            await hosts[0].disconnect(other.peer_id)
        service.mapped([])
        await asyncio.sleep(100)
        assert hosts[0]._advertised[ADVERTISED] == ()


async def test_alone_nothing_is_known():
    async with world(OPEN, observers=0) as (_, service):
        await asyncio.sleep(100)
        assert service.verdict.reach is Reach.UNKNOWN


async def test_a_network_that_closes_and_opens_is_noticed():
    network = MemoryNetwork(random.Random(0), latency_s=0.02)
    heard = []
    async with world(OPEN, network=network) as (hosts, service):
        service.on_change.append(lambda verdict: heard.append(verdict.reach))
        await asyncio.sleep(100)
        hosts[0]._transports[0].nat = SYMMETRIC
        service.recheck()
        await asyncio.sleep(100)
        hosts[0]._transports[0].nat = OPEN
        service.recheck()
        await asyncio.sleep(100)
        assert heard == [Reach.PUBLIC, Reach.PRIVATE, Reach.PUBLIC]


async def test_protocols_end_with_the_service():
    async with world(OPEN, observers=1) as (hosts, _):
        await asyncio.sleep(10)
        assert any("autonat" in protocol for protocol in hosts[0].protocols)
    assert not any("autonat" in protocol for protocol in hosts[0].protocols)
