"""Every implementation of a byte stream against the one conformance suite."""

import asyncio
import contextlib
import random

import pytest
from helpers.hosts import hosts
from helpers.streams import CHECKS
from swarmnode.node.transport.memory import MemoryNetwork

PROTOCOL = "/test/stream/1.0.0"


@contextlib.asynccontextmanager
async def ends(kind, *, network=None, loopback=False):
    """The two ends of a fresh stream."""
    arrived, finished = asyncio.Queue(1), asyncio.Event()

    async def handler(stream):
        await arrived.put(stream)
        await finished.wait()

    async with hosts(kind, 2, network=network) as (one, two):
        target = one if loopback else two
        target.handle(PROTOCOL, handler)
        near = await one.open_stream(target.peer_id, PROTOCOL)
        far = await arrived.get()
        assert (near.remote, near.protocol) == (target.peer_id, PROTOCOL)
        assert (far.remote, far.protocol) == (one.peer_id, PROTOCOL)
        yield near, far
        finished.set()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.virtual
async def test_memory(check):
    network = MemoryNetwork(random.Random(0), latency_s=0.001)
    async with ends("memory", network=network) as (near, far):
        await check(near, far)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.virtual
async def test_memory_over_a_slow_path(check):
    network = MemoryNetwork(random.Random(0), latency_s=0.02, jitter_s=0.01, rate=100e6)
    async with ends("memory", network=network) as (near, far):
        await check(far, near)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.loops
@pytest.mark.usefixtures("leakproof")
async def test_tcp(check):
    async with ends("tcp") as (near, far):
        await check(near, far)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.virtual
async def test_loopback(check):
    async with ends("memory", loopback=True) as (near, far):
        await check(near, far)
