"""Peers that send what nobody reads, against whole hosts: the node's bound, who pays, what is counted."""

import asyncio
import random

import pytest
from helpers.hosts import hosts
from swarmnode.node.transport.base import StreamReset
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol.yamux_memory import NODE_REASON

pytestmark = pytest.mark.virtual

ECHO, DEAF = "/test/echo/1.0.0", "/test/deaf/1.0.0"
LIMIT = 1_000_000


async def echo(stream):
    while data := await stream.read(65536):
        await stream.write(data)


async def sleep_forever(stream):
    await asyncio.Event().wait()


async def flood(host, target):
    """Five streams full of bytes that nobody reads; how many were reset."""
    resets = 0
    for _ in range(5):
        stream = await host.open_stream(target, DEAF)
        try:
            await stream.write(bytes(200_000))
            await asyncio.sleep(1)
            await stream.write(b"more")
        except StreamReset:
            resets += 1
    return resets


async def test_a_crowd_that_fills_memory_pays_for_it_and_an_honest_peer_does_not(monkeypatch):
    monkeypatch.setattr("swarmnode.node.wires.HeldMemory.__init__.__defaults__", (LIMIT,))
    async with hosts("memory", 5, network=MemoryNetwork(random.Random(0), latency_s=0.01)) as (server, honest, *crowd):
        server.handle(ECHO, echo)
        server.handle(DEAF, sleep_forever)
        stream = await honest.open_stream(server.peer_id, ECHO)
        async with asyncio.TaskGroup() as group:
            floods = [group.create_task(flood(host, server.peer_id)) for host in crowd]
            for _ in range(100):
                await stream.write(bytes(10_000))
                assert await stream.read_exactly(10_000) == bytes(10_000)
                await asyncio.sleep(0.05)
                assert server._wires._held.used <= LIMIT
        assert server.refused[NODE_REASON] >= 10
        assert sum(task.result() for task in floods) <= server.refused[NODE_REASON]
        assert all(host.refused == {} for host in crowd)
    assert server._wires._held.used == 0
