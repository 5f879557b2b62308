"""Whole nodes learn where they are: on a virtual clock, with real distances between them, and liars among them."""

from __future__ import annotations

import asyncio
import cmath
import contextlib
import random
from itertools import combinations
from statistics import median

import pytest
from helpers.hosts import memory_host
from helpers.virtual import LoopClock
from swarmnode.node.discovery import Discovery
from swarmnode.node.tasks import Supervisor
from swarmnode.node.transport.memory import MemoryNetwork

pytestmark = pytest.mark.virtual

RADIUS_S = 0.06
LAST_MILE_S = 0.002
NODES = 14
SETTLED_S = 150.0


class Disc:
    """Nodes on a disc; half a round trip between two of them is their distance and both last miles."""

    def __init__(self, stack):
        self.rng = random.Random(7)
        self.network = MemoryNetwork(random.Random(7))
        self.network.distance = self._distance
        self._stack = stack
        self._places = {}
        self.nodes = []

    def _distance(self, source, target):
        return LAST_MILE_S + abs(self._places[source] - self._places[target]) * (source is not target)

    def real_s(self, first, second):
        return 2 * self._distance(first._host._transports[0], second._host._transports[0])

    async def add(self, server_mode=True):
        listen = {} if server_mode else {"listen": []}
        host = memory_host(self.network, len(self.nodes) + 1, **listen)
        self._places[host._transports[0]] = cmath.rect(RADIUS_S * self.rng.random() ** 0.5, self.rng.uniform(0, 7))
        await self._stack.enter_async_context(host)
        number = len(self.nodes) + 1
        node = Discovery(host, clock=LoopClock(), rng=random.Random(number), server_mode=server_mode)
        tasks = await self._stack.enter_async_context(Supervisor("test"))
        tasks.start(node.run(), "discovery")
        if self.nodes:
            await node.bootstrap([self.rng.choice(self.nodes)._host.listen_addrs[0]])
        self.nodes.append(node)
        return node

    def errors(self, nodes):
        """Relative error of every prediction between two nodes, whether they ever met or not."""
        return [
            abs(one.coordinate.rtt_s(other.coordinate) - self.real_s(one, other)) / self.real_s(one, other)
            for one, other in combinations(nodes, 2)
        ]


@contextlib.asynccontextmanager
async def disc(count=NODES):
    async with contextlib.AsyncExitStack() as stack:
        made = Disc(stack)
        for _ in range(count):
            await made.add()
        yield made


async def test_predicted_round_trips_approach_the_real_ones():
    """Median relative error under 15 % after two and a half minutes, and the nodes know about it."""
    async with disc() as swarm:
        await asyncio.sleep(SETTLED_S)
        errors = swarm.errors(swarm.nodes)
        print(f"median error {median(errors):.1%}, nine of ten under {sorted(errors)[len(errors) * 9 // 10]:.1%}")
        assert median(errors) < 0.15
        assert median(node.coordinate.error for node in swarm.nodes) < 0.25


async def test_a_client_learns_its_place_and_is_told_to_nobody():
    async with disc(8) as swarm:
        await asyncio.sleep(SETTLED_S)
        client = await swarm.add(server_mode=False)
        await asyncio.sleep(60)
        errors = [
            abs(client.coordinate.rtt_s(node.coordinate) - swarm.real_s(client, node)) / swarm.real_s(client, node)
            for node in swarm.nodes[:-1]
        ]
        assert median(errors) < 0.25
        for node in swarm.nodes[:-1]:
            assert client._host.peer_id not in node.dht.whereabouts._neighbours


LYING_S = 240.0


def lies(swarm, liar):
    """What a liar may claim: one far place, any place, or the other side of the world, as far out as it really is."""
    genuine = liar.dht.whereabouts.told
    return {
        "far": lambda: (9.0, -9.0, 5.0, 0.0),
        "wild": lambda: (swarm.rng.uniform(-10, 10), swarm.rng.uniform(-10, 10), 0.0, 0.0),
        "mirrored": lambda: (-genuine()[0], -genuine()[1], *genuine()[2:]),
    }


@pytest.mark.parametrize("lie", ["far", "mirrored", pytest.param("wild", marks=pytest.mark.slow)])
async def test_liars_move_nobody_far(lie):
    """Two of 14 lie for four minutes: the others go on predicting each other, and nobody is carried away."""
    async with disc() as swarm:
        await asyncio.sleep(SETTLED_S)
        honest, liars = swarm.nodes[2:], swarm.nodes[:2]
        before = median(swarm.errors(honest))
        for liar in liars:
            liar.dht.whereabouts.told = lies(swarm, liar)[lie]
        during = []
        for _ in range(8):
            await asyncio.sleep(LYING_S / 8)
            during.append(median(swarm.errors(honest)))
            assert max(one.coordinate.rtt_s(other.coordinate) for one, other in combinations(honest, 2)) < 8 * RADIUS_S
        print(f"{lie}: median error {before:.1%} before, {during} meanwhile")
        assert max(during) < before + 0.06
