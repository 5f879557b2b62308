"""The first streams of a connection: few, until the peer has shown that it is ready for more."""

import asyncio
import random

import pytest
from helpers.hosts import hosts
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.node.transport.wire import EARLY_STREAMS

pytestmark = pytest.mark.virtual

LATENCY = 0.1
ECHO = "/test/echo/1.0.0"


async def echo(stream):
    while data := await stream.read(100):
        await stream.write(data)


async def once(host, peer):
    stream = await host.open_stream(peer, ECHO)
    await stream.write(b"x")
    assert await stream.read_exactly(1) == b"x"
    await stream.close()


async def test_a_crowd_of_streams_waits_for_the_first_answer():
    network = MemoryNetwork(random.Random(0), latency_s=LATENCY)
    async with hosts("memory", 2, network=network) as (one, two):
        two.handle(ECHO, echo)
        await one.connect(two.peer_id)
        (wire,) = one._wires
        async with asyncio.TaskGroup() as group:
            for _ in range(200):
                group.create_task(once(one, two.peer_id))
            await asyncio.sleep(1.9 * LATENCY)
            assert wire.session.unacked == EARLY_STREAMS
            await asyncio.sleep(0.2 * LATENCY)
            assert wire.session.unacked > 100
        assert len(one.connections()) == 1
