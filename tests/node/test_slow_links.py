"""A wire on a slow link makes small frames, on a fast one large ones."""

import random

import pytest
from helpers.hosts import hosts
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol.link_rate import SMALL_FRAME
from swarmnode.protocol.yamux import MAX_DATA

pytestmark = pytest.mark.virtual

SINK = "/test/sink/1.0.0"


async def swallow(stream):
    while await stream.read(65536):
        pass


@pytest.mark.parametrize(("rate", "limit"), [(1e6, SMALL_FRAME), (20e6, MAX_DATA)])
async def test_frames_suit_the_link(rate, limit):
    async with hosts("memory", 2, network=MemoryNetwork(random.Random(0), latency_s=0.01, rate=rate)) as (near, far):
        far.handle(SINK, swallow)
        stream = await near.open_stream(far.peer_id, SINK)
        (wire,) = near._wires
        assert wire.session.frame_limit == MAX_DATA
        await stream.write(bytes(round(rate)))
        assert wire.session.frame_limit == limit
        await stream.close()
