"""Hosts over terrible links, hundreds of seeds: gentle weather changes nothing, harmful weather never data.

Each seed is a history of its own, on a virtual clock: `pytest "tests/node/test_terrible.py::test_harm[swap-17]"`
repeats one.
"""

import asyncio
import random

import pytest
from helpers.hosts import at_rest, held, hosts
from helpers.terrible import HARMS, Gentle, Harmful
from swarmnode.node.transport.base import ConnectionClosed, StreamReset
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.node.transport.wire import HANDSHAKE_TIMEOUT_S, KEEPALIVE_S, MISSED_PINGS
from swarmnode.protocol.errors import DeadlineExceeded, PeerUnreachable

pytestmark = pytest.mark.virtual

ECHO = "/test/echo/1.0.0"
STREAMS = 4
NOTICED_S = KEEPALIVE_S * (MISSED_PINGS + 1)
"""A connection on which nothing sensible arrives any more is given up within this."""
BOUND_S = HANDSHAKE_TIMEOUT_S + NOTICED_S + 5.0
"""Within this everybody who waits has its bytes or an error; the five seconds are the weather's own."""
LOSSES = (StreamReset, ConnectionClosed, PeerUnreachable, DeadlineExceeded)
"""What the loss of a connection may look like. Not EOF: a text cut short must not look like its end."""


class Echo:
    """A server that gives back what it gets, and keeps how each of its streams ended."""

    def __init__(self):
        self.ends = []

    async def __call__(self, stream):
        received = bytearray()
        try:
            while data := await stream.read(5000):
                received += data
                await stream.write(data)
            self.ends.append(bytes(received))
        except BaseException as exc:
            self.ends.append(exc)
            raise


async def say(host, peer, data):
    """Have `data` echoed; the answer is `data`, or an error of LOSSES is raised. Anything else fails the test."""
    stream = await host.open_stream(peer, ECHO)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(send(stream, data))
            answer = group.create_task(hear(stream, data))
    except* LOSSES as lost:
        stream.reset()
        raise lost.exceptions[0] from None
    assert answer.result() == data
    await stream.close()


async def send(stream, data):
    middle = len(data) // 3
    await stream.write(data[:middle], data[middle:])
    await stream.close_write()


async def hear(stream, data):
    """Read to the end; every byte is checked as it comes."""
    received = bytearray()
    while piece := await stream.read(3000):
        assert data.startswith(piece, len(received)), "wrong bytes"
        received += piece
    return received


async def outcome(host, peer, data):
    """None when everything came back, or the loss."""
    try:
        await say(host, peer, data)
    except LOSSES as exc:
        return exc
    return None


def network(seed):
    rng = random.Random(seed)
    rate = rng.choice((None, None, 1e5, 1e7))
    return MemoryNetwork(rng, latency_s=rng.choice((0.0, 0.001, 0.08)), rate=rate)


@pytest.mark.parametrize("seed", range(100))
async def test_gentle_weather_changes_nothing(seed):
    world = network(seed)
    weather = world.weather = Gentle(seed)
    rng = random.Random(seed)
    async with hosts("memory", 2, network=world) as (one, two):
        echo = Echo()
        two.handle(ECHO, echo)
        most = min(300 * weather.piece, 1_500_000 if world.rate is None else int(world.rate))
        texts = [rng.randbytes(rng.randint(0, most)) for _ in range(STREAMS)]
        async with asyncio.timeout(BOUND_S), asyncio.TaskGroup() as group:
            for text in texts:
                group.create_task(say(one, two.peer_id, text))
        await at_rest(one, two)
        assert sorted(echo.ends) == sorted(texts)
        assert world.dials == 1


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("harm", HARMS)
async def test_harm(harm, seed):
    world = network(seed)
    rng = random.Random(f"{harm} {seed}")
    async with hosts("memory", 2, network=world) as (one, two):
        echo = Echo()
        two.handle(ECHO, echo)
        texts = [rng.randbytes(rng.randint(1, 20_000)) for _ in range(STREAMS)]
        after = rng.randint(0, 500) if rng.random() < 0.3 else rng.randint(0, sum(map(len, texts)))
        source = rng.choice((one, two))._transports[0]
        weather = world.weather = Harmful(seed, harm, source, after)
        weather.piece = max(weather.piece, 50)  # single bytes are for the gentle
        async with asyncio.timeout(BOUND_S):
            outcomes = await asyncio.gather(*(outcome(one, two.peer_id, text) for text in texts))
        met = [wire for host in (one, two) for wire in host._wires]
        await asyncio.sleep(BOUND_S)  # what broke meanwhile, or lies broken and idle, is found out
        assert weather.struck, "the keepalive at least brings as many bytes as this test waits for"
        assert all(wire.closed for wire in met), "a connection outlived the harm done to it"
        assert len(echo.ends) <= STREAMS
        for end in echo.ends:
            assert end in texts or isinstance(end, LOSSES), end
        assert outcomes.count(None) <= sum(isinstance(end, bytes) for end in echo.ends)
        assert held(one) == held(two) == {}
        world.weather = None
        await say(one, two.peer_id, texts[0])
        await at_rest(one, two)
