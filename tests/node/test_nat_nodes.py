"""Whole nodes that find out by themselves what they are behind, and act on it."""

import asyncio

import pytest
from helpers.internet import Internet
from swarmnode.node.transport.memory import Nat
from swarmnode.protocol.verdict import Reach

pytestmark = pytest.mark.virtual

OPEN_NODES = 5


async def world(internet, nat):
    """Open nodes, and one behind a NAT that has joined through the first."""
    first = await internet.node(nat=Nat.OPEN)
    others = [await internet.node(first, nat=Nat.OPEN) for _ in range(OPEN_NODES - 1)]
    return [first, *others], await internet.node(first, nat=nat)


@pytest.mark.parametrize(
    ("nat", "reach"),
    [(Nat.OPEN, Reach.PUBLIC), (Nat.FULL, Reach.PUBLIC), (Nat.CONE, Reach.PRIVATE), (Nat.SYMMETRIC, Reach.PRIVATE)],
)
async def test_a_node_serves_the_dht_if_it_can_be_reached(tmp_path, nat, reach):
    async with Internet(1, tmp_path) as internet:
        others, node = await world(internet, nat)
        await asyncio.sleep(150)
        assert node.nat.reach.verdict.reach is reach
        assert node.discovery.dht.server_mode is (reach is Reach.PUBLIC)
        serves = node.discovery._protocol in node.host.protocols
        assert serves is (reach is Reach.PUBLIC)
        assert all(other.nat.reach.verdict.reach is Reach.PUBLIC for other in others)
        places = node.relaying.status().places
        assert bool(places) is (reach is Reach.PRIVATE), "who cannot be reached holds places at relays"
        if reach is Reach.PRIVATE:
            assert any(addr.is_relayed for addr in node.addrs)


async def test_a_node_told_what_it_is_asks_nobody(tmp_path):
    async with Internet(2, tmp_path) as internet:
        first = await internet.node(nat=Nat.OPEN)
        node = await internet.node(first, nat=Nat.SYMMETRIC, reachability="private")
        assert node.nat is None
        assert not node.discovery.dht.server_mode
