"""A relay under floods: its limits hold to the last reservation, session and byte, and honest traffic goes on."""

import asyncio
import contextlib
import random
import socket
from collections import Counter

import pytest
from helpers.hosts import at_rest, key, tcp_host
from helpers.relayed import hidden_host, meet, relay_host
from swarmnode.node.limits import HostLimits
from swarmnode.node.relay.circuits import CircuitRefused, read_message, write_message
from swarmnode.node.relay.server import Relay
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.node.transport.tcp import TcpTransport
from swarmnode.protocol import relay
from swarmnode.protocol.errors import PeerUnreachable
from swarmnode.protocol.relay import HopMessage, HopType, Status, StopMessage, StopType
from swarmnode.protocol.relay_ledger import RelayLimits

ECHO = "/test/echo/1.0.0"
PIECE = 16 * 1024
COUNTED = HostLimits(limit_loopback=True)


def from_address(number, address):
    """A host whose connections come from this loopback address."""

    def bound(*args):
        sock = socket.socket(*args)
        sock.bind((address, 0))
        return sock

    return tcp_host(number, listen=[], transports=[TcpTransport(bound)])


@contextlib.asynccontextmanager
async def crowd(count, address="127.0.1.1", first=1):
    """Hosts that come from one address."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(from_address(n, address)) for n in range(first, first + count)]


@contextlib.asynccontextmanager
async def counted_relay(limits):
    """A relay that counts loopback addresses like others."""
    async with tcp_host(90, limits=COUNTED) as host, Relay(host, limits) as service:
        yield host, service


async def outcomes(attempts):
    """How often it went well, and how often it was refused."""
    done = await asyncio.gather(*attempts, return_exceptions=True)
    for one in done:
        if isinstance(one, BaseException) and not isinstance(one, CircuitRefused | PeerUnreachable):
            raise one
    return Counter("refused" if isinstance(one, Exception) else "granted" for one in done)


@pytest.mark.usefixtures("leakproof")
async def test_reservations_of_one_address_to_the_last():
    limits = RelayLimits(reservations_per_ip=3, reservations_per_subnet=4)
    async with (
        counted_relay(limits) as (host, service),
        crowd(10) as flood,
        crowd(2, "127.0.1.2", 50) as others,
    ):
        at = [host.listen_addrs[0].without_peer()]
        assert await outcomes(one.circuits.reserve(host.peer_id, at) for one in flood) == {"granted": 3, "refused": 7}
        assert await outcomes(one.circuits.reserve(host.peer_id, at) for one in others) == {"granted": 1, "refused": 1}
        assert service.status().reservations == 4
        assert service.status().refused == {"address-reservations": 7, "subnet-reservations": 1}
        keeps = next(one for one in flood if one.circuits.places)
        for _ in range(5):  # who has a place can always renew it
            await keeps.circuits.reserve(host.peer_id)
        await keeps.disconnect(host.peer_id)
        while service.status().reservations == 4:  # noqa: ASYNC110 - the relay has no event for it
            await asyncio.sleep(0.001)
        late = next(one for one in others if not one.circuits.places)
        await late.circuits.reserve(host.peer_id)


@pytest.mark.usefixtures("leakproof")
async def test_sessions_of_one_address_to_the_last():
    limits = RelayLimits(circuits_per_ip=4, circuits_per_subnet=5)
    async with (
        counted_relay(limits) as (host, service),
        crowd(8) as flood,
        crowd(3, "127.0.1.2", 50) as others,
        from_address(80, "127.0.2.1") as target,
    ):
        await meet(target, host, *flood, *others)
        assert await outcomes(one.connect(target.peer_id) for one in flood) == {"granted": 4, "refused": 4}
        assert await outcomes(one.connect(target.peer_id) for one in others) == {"granted": 1, "refused": 2}
        assert len([info for info in target.connections() if info.relayed]) == 5
        assert service.status().circuits == 5
        assert service.status().refused == {"address-circuits": 4, "subnet-circuits": 2}
        for one in (*flood, *others):
            await one.disconnect(target.peer_id)
        await at_rest(host, target)
        assert service.status().circuits == 0


async def raw_circuit(host, source, target):
    """The two ends of a circuit without a connection on it, and the task that holds the target's."""
    arrived = asyncio.Queue()
    ended = asyncio.Event()

    async def take(stream):
        request = await read_message(stream, StopMessage.decode)
        assert request.peer == source.peer_id
        await write_message(stream, StopMessage(type=StopType.STATUS, status=Status.OK))
        arrived.put_nowait(stream)
        await ended.wait()

    target.handle(relay.STOP, take)
    near = await source.open_stream(host.peer_id, relay.HOP, addrs=host.listen_addrs)
    await write_message(near, HopMessage(type=HopType.CONNECT, peer=target.peer_id))
    assert (await read_message(near, HopMessage.decode)).status is Status.OK
    return near, await arrived.get(), ended


async def send_until_reset(stream, size):
    with contextlib.suppress(OSError):
        await stream.write(bytes(size))


async def receive_until_reset(stream):
    """How much came before the reset. Bytes that are here when a reset comes are lost to a reader, so keep up."""
    total = 0
    with contextlib.suppress(OSError):
        while data := await stream.read(1 << 20):
            total += len(data)
    return total


@pytest.mark.virtual
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("name", "reason"), [("circuit_bytes", "circuit-bytes"), ("day_bytes", "day-bytes")])
async def test_bytes_to_the_last(backwards, name, reason):
    most = 300_007
    network = MemoryNetwork(random.Random(0), latency_s=0.001)
    limits = RelayLimits(**{name: most})
    async with (
        relay_host("memory", 90, network, limits) as (host, service),
        hidden_host("memory", 1, network) as one,
        hidden_host("memory", 2, network) as two,
    ):
        await meet(two, host)
        near, far, ended = await raw_circuit(host, one, two)
        if backwards:
            near, far = far, near
        async with asyncio.TaskGroup() as group:
            group.create_task(send_until_reset(near, 3 * most))
            got = group.create_task(receive_until_reset(far))
        ended.set()
        assert got.result() <= most
        assert service.status().bytes_total == most  # as far as it was passed on: to the last one
        assert service.status().refused == {reason: 1}
        assert service.status().circuits == 0


@pytest.mark.virtual
async def test_time_to_the_second():
    network = MemoryNetwork(random.Random(0), latency_s=0.001)
    limits = RelayLimits(circuit_s=1000)
    async with (
        relay_host("memory", 90, network, limits) as (host, service),
        hidden_host("memory", 1, network) as one,
        hidden_host("memory", 2, network) as two,
    ):
        await meet(two, host, one)
        await one.connect(two.peer_id)
        await asyncio.sleep(999)
        assert one.is_connected(two.peer_id)
        await asyncio.sleep(1.1)
        assert not one.is_connected(two.peer_id)
        assert service.status().refused == {"circuit-time": 1}
        await one.connect(two.peer_id)  # a new one may be had


async def echo(stream):
    while data := await stream.read(1 << 20):
        await stream.write(data)


async def swallow(stream):
    while await stream.read(1 << 20):
        pass


async def flood_forever(host, peer):
    stream = await host.open_stream(peer, "/test/sink/1.0.0")
    while True:
        await stream.write(bytes(1 << 20))


async def echoes_in(host, peer, seconds):
    """How many pieces went there and back, one after another."""
    stream = await host.open_stream(peer, ECHO)
    count, until = 0, host.clock.now() + seconds
    while host.clock.now() < until:
        await stream.write(bytes(PIECE))
        await stream.read_exactly(PIECE)
        count += 1
    await stream.close()
    return count


@pytest.mark.virtual
async def test_honest_traffic_keeps_its_rate():
    """Seven peers want all of a relay's 4 MB/s; who asks for a fraction of that gets it nevertheless."""
    network = MemoryNetwork(random.Random(0), latency_s=0.02)
    limits = RelayLimits(bytes_per_s=4_000_000)
    async with contextlib.AsyncExitStack() as stack:
        host, service = await stack.enter_async_context(relay_host("memory", 90, network, limits))
        honest, target, sink, *bad = [
            await stack.enter_async_context(hidden_host("memory", n, network)) for n in range(1, 11)
        ]
        target.handle(ECHO, echo)
        sink.handle("/test/sink/1.0.0", swallow)
        await meet(target, host, honest)
        await meet(sink, host, *bad)
        quiet = await echoes_in(honest, target.peer_id, 10)
        floods = [asyncio.get_running_loop().create_task(flood_forever(one, sink.peer_id)) for one in bad]
        await asyncio.sleep(2)
        before, since = service.status().bytes_total, host.clock.now()
        busy = await echoes_in(honest, target.peer_id, 10)
        passed = (service.status().bytes_total - before) / (host.clock.now() - since)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        assert busy >= 0.8 * quiet > 50
        assert 3_900_000 < passed < 4_100_000  # the floods got all the rest, and no more


@pytest.mark.virtual
async def test_requests_of_one_peer_have_a_rate():
    network = MemoryNetwork(random.Random(0), latency_s=0.001)
    async with (
        relay_host("memory", 90, network, RelayLimits(requests_per_peer=1)) as (host, service),
        hidden_host("memory", 1, network) as one,
        hidden_host("memory", 2, network) as two,
    ):
        at = [host.listen_addrs[0].without_peer()]
        await one.circuits.reserve(host.peer_id, at)
        flood = [one.circuits.reserve(host.peer_id) for _ in range(40)]
        assert (await outcomes(flood))["granted"] == 40
        flood = [one.circuits.reserve(host.peer_id) for _ in range(40)]
        assert (await outcomes(flood))["refused"] >= 16
        await two.circuits.reserve(host.peer_id, at)  # others are not asked to pay for it
        assert service.status().refused["peer-rate"] >= 16
        assert key(1).peer_id == one.peer_id
