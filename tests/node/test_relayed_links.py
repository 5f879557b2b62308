"""Connections over a relay: dialing, being dialed, what they may carry, and how they end."""

import asyncio
import contextlib
import random

import pytest
from helpers.hosts import LOOPBACK, at_rest, held, key, memory_host, tcp_host
from helpers.relayed import UNMETERED, hidden_host, meet, relay_host, relayed_hosts
from swarmnode.node.limits import HostLimits
from swarmnode.node.relay import circuits
from swarmnode.node.relay.circuits import CircuitRefused, read_message, write_message
from swarmnode.node.relay.server import Relay
from swarmnode.node.transport.base import ConnectionClosed
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol import ping, relay
from swarmnode.protocol.errors import ConfigError, PeerUnreachable, RemoteProtocolError
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.relay import HopMessage, HopType, Limit, Status, StopMessage, StopType
from swarmnode.protocol.relay_ledger import RelayLimits

ECHO = "/test/echo/1.0.0"
STRANGER = key(77).peer_id


async def echo(stream):
    while data := await stream.read(65536):
        await stream.write(data)


async def round_trip(host, peer, payload=b"over the hills"):
    stream = await host.open_stream(peer, ECHO)
    async with asyncio.TaskGroup() as group:
        group.create_task(stream.write(payload))
        assert await stream.read_exactly(len(payload)) == payload
    await stream.close()


@pytest.fixture
def network():
    return MemoryNetwork(random.Random(0), latency_s=0.01)


def info(host, peer):
    (found,) = [one for one in host.connections() if one.peer == peer]
    return found


# Whole circuits


@pytest.mark.virtual
async def test_two_hidden_hosts_meet_at_a_relay(network):
    async with relayed_hosts("memory", network) as (one, two):
        two.handle(ECHO, echo)
        await round_trip(one, two.peer_id, random.Random(1).randbytes(300_000))
        there, back = info(one, two.peer_id), info(two, one.peer_id)
        assert (there.relayed, back.relayed) == (True, True)
        assert (there.outbound, back.outbound) == (True, False)
        assert str(there.address).endswith(f"/p2p/{key(90).peer_id}/p2p-circuit")
        assert await one.ping(two.peer_id) == pytest.approx(0.04)  # two links each way
        assert not any(addr.is_relayed for host in (one, two) for addr in host.observed_addrs)


@pytest.mark.loops
@pytest.mark.usefixtures("leakproof")
async def test_over_sockets():
    async with relayed_hosts("tcp") as (one, two):
        two.handle(ECHO, echo)
        await round_trip(one, two.peer_id, random.Random(1).randbytes(3_000_000))
        assert info(one, two.peer_id).relayed
        assert one.observed_addrs == ()


@pytest.mark.virtual
async def test_a_direct_connection_goes_first(network):
    async with (
        relay_host("memory", 90, network) as (host, _),
        memory_host(network, 1) as one,
        memory_host(network, 2) as two,
    ):
        await meet(two, host, one)
        two.handle(ECHO, echo)
        await round_trip(one, two.peer_id)
        assert info(one, two.peer_id).relayed
        await one.connect(two.peer_id)  # one is enough as long as nobody asks for more
        assert len(one.connections()) == 2
        await one.connect(two.peer_id, two.listen_addrs, direct=True)
        assert [one.relayed for one in one.connections() if one.peer == two.peer_id] == [True, False]
        stream = await one.open_stream(two.peer_id, ECHO)
        assert not stream.wire.relayed
        stream.reset()
        (relayed,) = [wire for wire in one._wires.to(two.peer_id) if wire.relayed]
        await relayed.aclose()
        await round_trip(one, two.peer_id)


@pytest.mark.virtual
async def test_direct_addresses_are_tried_before_relayed_ones(network):
    async with (
        relay_host("memory", 90, network) as (host, _),
        memory_host(network, 1) as one,
        memory_host(network, 2) as two,
    ):
        place = await meet(two, host)
        await one.connect(two.peer_id, [*place.addrs, *two.listen_addrs])
        assert not info(one, two.peer_id).relayed


@pytest.mark.virtual
async def test_listening_at_a_relay(network):
    async with relay_host("memory", 90, network) as (host, _), hidden_host("memory", 2, network) as two:
        place = Multiaddr((*host.listen_addrs[0].parts, ("p2p-circuit", "")))
        assert await two.listen(place) == place
        assert place.with_peer(two.peer_id) in two.listen_addrs
        async with hidden_host("memory", 1, network) as one:
            two.handle(ECHO, echo)
            assert await one.connect(None, [place.with_peer(two.peer_id)]) == two.peer_id
            await round_trip(one, two.peer_id)
        with pytest.raises(ConfigError, match="cannot listen on"):
            await two.listen(Multiaddr.parse(f"/memory/99/p2p/{STRANGER}/p2p-circuit"))


@pytest.mark.virtual
async def test_the_death_of_a_relay_is_known_at_once(network):
    async with relayed_hosts("memory", network) as (one, two):
        two.handle(ECHO, echo)
        stream = await one.open_stream(two.peer_id, ECHO)
        await stream.write(b"x")
        assert await stream.read(1) == b"x"
        lost = []
        one.circuits.on_lost.append(lost.append)
        before = one.clock.now()
        for wire in one._wires.to(key(90).peer_id):
            wire.abort("the relay is gone")
        with pytest.raises(ConnectionClosed):
            await stream.read(1)
        assert one.clock.now() - before < 0.001
        assert [place.relay for place in lost] == [key(90).peer_id]
        assert one.circuits.places == ()
        await at_rest(one, two)


@pytest.mark.virtual
async def test_a_host_that_ends_says_good_bye_over_its_relay(network):
    async with relay_host("memory", 90, network) as (host, _), hidden_host("memory", 1, network) as one:
        async with hidden_host("memory", 2, network) as two:
            await meet(two, host, one)
            await one.connect(two.peer_id)
        await asyncio.sleep(0.1)
        assert not one.is_connected(two.peer_id)
        (ended,) = [e for e in one.ended_connections() if e.peer == two.peer_id]
        assert "closed" in ended.reason or "reset" in ended.reason
        await at_rest(one, host)


@pytest.mark.virtual
@pytest.mark.parametrize("turns", range(12))
async def test_a_host_may_end_at_any_moment_of_its_relays_death(network, turns):
    async with relay_host("memory", 90, network) as (host, _), hidden_host("memory", 1, network) as one:
        async with hidden_host("memory", 2, network) as two:
            await meet(two, host, one)
            await one.connect(two.peer_id)
            for wire in two._wires.to(host.peer_id):
                wire.abort("the relay is gone")
            for _ in range(turns):
                await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        await at_rest(one, host)
        assert host._tasks.crashes == one._tasks.crashes == two._tasks.crashes == 0


@pytest.mark.virtual
async def test_dialing_over_a_relay_needs_no_second_turn(network):
    """With one dial at a time, that of the relay must not wait for that of the circuit."""
    limits = HostLimits(dials=1)
    async with (
        relay_host("memory", 90, network) as (host, _),
        hidden_host("memory", 2, network) as two,
        hidden_host("memory", 1, network, limits=limits) as one,
    ):
        place = await meet(two, host)
        await one.connect(two.peer_id, place.addrs)
        assert one.clock.now() < 1


@pytest.mark.virtual
async def test_a_slow_relay_holds_the_writer_up(network):
    """Hardly anything queues in the link: a frame, and not all that the inner windows allow."""
    async with relayed_hosts("memory", network, RelayLimits(bytes_per_s=20_000)) as (one, two):
        two.handle(ECHO, echo)
        streams = [await one.open_stream(two.peer_id, ECHO) for _ in range(6)]  # their windows are more than the link's
        writing = [asyncio.get_running_loop().create_task(stream.write(bytes(8_000_000))) for stream in streams]
        (link,) = [wire._transport for wire in one._wires.to(two.peer_id)]
        most = 0
        for _ in range(200):
            await asyncio.sleep(0.05)
            most = max(most, link.get_write_buffer_size())
        for task in writing:
            task.cancel()
        await asyncio.wait(writing)
        assert 0 < most < 2 * 65_536


# What is refused


@pytest.mark.virtual
async def test_no_place_no_circuit(network):
    async with relay_host("memory", 90, network) as (host, service), hidden_host("memory", 1, network) as one:
        at = relay.through(host.listen_addrs[0].without_peer(), host.peer_id)
        with pytest.raises(PeerUnreachable, match="the relay would be one of the ends"):
            await one.connect(host.peer_id, [at])
        with pytest.raises(PeerUnreachable, match="declined: no reservation"):
            await one.connect(STRANGER, [at])
        assert service.ledger.refused == {"no-reservation": 1}
        await at_rest(one, host)


@pytest.mark.virtual
async def test_no_relay_over_a_relay(network):
    """One reaches the second relay over the first only: no place there, no circuit over it."""
    async with relay_host("memory", 90, network) as (first, _), hidden_host("memory", 1, network) as one:
        second = hidden_host("memory", 91, network)
        async with second, Relay(second, UNMETERED) as service:
            await meet(second, first, one)
            await one.connect(second.peer_id)
            assert info(one, second.peer_id).relayed
            with pytest.raises(PeerUnreachable):
                await one.circuits.reserve(second.peer_id)
            wire = one._wires.best(second.peer_id)  # and for those who ask nevertheless
            for request in (HopMessage(type=HopType.RESERVE), HopMessage(type=HopType.CONNECT, peer=STRANGER)):
                stream = await one.open_on(wire, relay.HOP)
                await write_message(stream, request)
                assert (await read_message(stream, HopMessage.decode)).status is Status.PERMISSION_DENIED
            assert service.ledger.refused == {"over-relay": 2}
            nested = Multiaddr(
                (*info(one, second.peer_id).address.with_peer(second.peer_id).parts, ("p2p-circuit", ""))
            )
            with pytest.raises(PeerUnreachable, match="no transport for this kind of address"):
                await one.connect(STRANGER, [nested.with_peer(STRANGER)])


@pytest.mark.virtual
async def test_two_relays_that_know_each_other_by_each_other_only(network):
    async with memory_host(network, 1) as one:
        first, second = key(90).peer_id, key(91).peer_id
        nowhere = Multiaddr.parse("/memory/99")
        one.add_addrs(first, [relay.through(nowhere, second)])
        one.add_addrs(second, [relay.through(nowhere, first)])
        with pytest.raises(PeerUnreachable):
            await one.connect(first)
        assert one.clock.now() < 1  # nobody waited for anybody in a circle


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (StopMessage(type=StopType.CONNECT, peer=STRANGER).encode(), Status.PERMISSION_DENIED),
        (StopMessage(type=StopType.CONNECT).encode(), Status.MALFORMED_MESSAGE),
        (StopMessage(type=StopType.STATUS, status=Status.OK).encode(), Status.UNEXPECTED_MESSAGE),
    ],
)
async def test_who_may_bring_somebody(network, request_bytes, status):
    async with relayed_hosts("memory", network) as (one, _), memory_host(network, 5) as five:
        await one.connect(five.peer_id, five.listen_addrs)
        await asyncio.sleep(0.1)  # until five knows, too
        stream = await five.open_stream(one.peer_id, relay.STOP)
        await stream.write(bytes((len(request_bytes),)), request_bytes)
        assert (await read_message(stream, StopMessage.decode)).status is status


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x02\x08\x07", Status.MALFORMED_MESSAGE),
        (b"\xff\x7f", Status.MALFORMED_MESSAGE),  # 16 KB are announced
        (b"\x02\x08\x01", Status.MALFORMED_MESSAGE),  # to whom?
        (b"\x02\x08\x02", Status.UNEXPECTED_MESSAGE),
    ],
)
async def test_what_a_relay_does_not_understand(network, data, status):
    async with relay_host("memory", 90, network) as (host, _), memory_host(network, 1) as one:
        await one.connect(host.peer_id, host.listen_addrs)
        stream = await one.open_stream(host.peer_id, relay.HOP)
        await stream.write(data)
        assert (await read_message(stream, HopMessage.decode)).status is status
        await stream.close()
        await at_rest(host)
        assert held(host) == {}


# Limits of the relay


@pytest.mark.virtual
async def test_a_relay_that_passes_little_on(network):
    limits = RelayLimits(circuit_bytes=100_000, circuit_s=30)
    async with relayed_hosts("memory", network, limits) as (one, two):
        two.handle(ECHO, echo)
        assert await one.ping(two.peer_id) > 0
        (place,) = one.circuits.places
        assert place.limit == Limit(duration_s=30, data_bytes=100_000)
        for host, peer in ((one, two.peer_id), (two, one.peer_id)):
            with pytest.raises(PeerUnreachable, match="passes little on"):
                await host.open_stream(peer, ECHO)
            assert ping.PROTOCOL in host.book.get(peer).protocols
        await asyncio.sleep(31)
        assert not one.is_connected(two.peer_id)
        assert not two.is_connected(one.peer_id)


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("limit", "reason"), [("connections_per_relay", "relay-connections-in"), ("accepts_per_relay", "relay-rate")]
)
async def test_one_relay_may_bring_so_many(network, limit, reason):
    limits = HostLimits(**{"connections_per_relay": 2, limit: 2 if limit == "connections_per_relay" else 0.001})
    async with contextlib.AsyncExitStack() as stack:
        host, _ = await stack.enter_async_context(relay_host("memory", 90, network))
        one = await stack.enter_async_context(hidden_host("memory", 1, network, limits=limits))
        others = [await stack.enter_async_context(hidden_host("memory", n, network)) for n in range(2, 6)]
        await meet(one, host, *others)
        for other in others[:2]:
            await other.connect(one.peer_id)
        if reason == "relay-rate":  # what is over at once counts as well
            for other in others[:2]:
                await other.disconnect(one.peer_id)
            await asyncio.sleep(1)
        for number, other in enumerate(others[2:], 1):
            with pytest.raises(PeerUnreachable):
                await other.connect(one.peer_id)
            assert one.refused == {reason: number}
        await at_rest(one, host, *others)


# Reservations


async def offer(network, host, answer, asker):
    """Let `host` answer RESERVE with certain bytes; what the asker makes of it."""

    async def serve(stream):
        await read_message(stream, HopMessage.decode)
        await write_message(stream, answer(host, asker))

    host.handle(relay.HOP, serve)
    return await asker.circuits.reserve(host.peer_id, [host.listen_addrs[0].without_peer()])


def reservation(host, asker, **changes):
    expires = int(host.clock.wall()) + 3600
    fields = {
        "expires": expires,
        "addrs": (host.listen_addrs[0],),
        "voucher": relay.Voucher(relay=host.peer_id, peer=asker.peer_id, expires=expires).seal(host.key),
    }
    place = relay.Reservation(**(fields | changes))
    return HopMessage(type=HopType.STATUS, status=Status.OK, reservation=place)


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda host, asker: HopMessage(type=HopType.STATUS, status=Status.RESERVATION_REFUSED), CircuitRefused),
        (lambda host, asker: HopMessage(type=HopType.STATUS), CircuitRefused),
        (lambda host, asker: HopMessage(type=HopType.CONNECT, status=Status.OK), CircuitRefused),
        (lambda host, asker: HopMessage(type=HopType.STATUS, status=Status.OK), RemoteProtocolError),
        (lambda host, asker: reservation(host, asker, voucher=b"no voucher"), RemoteProtocolError),
        (lambda host, asker: reservation(host, asker, expires=int(host.clock.wall()) + 59), RemoteProtocolError),
        (lambda host, asker: reservation(host, asker, expires=5), RemoteProtocolError),
        (lambda host, asker: reservation(host, host), RemoteProtocolError),  # somebody else's voucher
    ],
)
async def test_answers_that_are_no_reservation(network, answer, error):
    async with memory_host(network, 90) as host, hidden_host("memory", 1, network) as one:
        with pytest.raises(error):
            await offer(network, host, answer, one)
        assert one.circuits.places == ()
        await at_rest(one, host)


@pytest.mark.virtual
async def test_what_a_relay_says_of_its_addresses_is_bounded(network):
    async with memory_host(network, 90) as host, hidden_host("memory", 1, network) as one:
        many = [Multiaddr.parse(f"/ip4/203.0.113.9/tcp/{port}/p2p/{host.peer_id}") for port in range(1, 9)]
        foreign = Multiaddr.parse(f"/ip4/203.0.113.9/tcp/9/p2p/{STRANGER}")
        nested = relay.through(Multiaddr.parse("/ip4/203.0.113.9/tcp/9"), STRANGER).with_peer(host.peer_id)

        def answer(host, asker):
            return reservation(host, asker, addrs=(foreign, nested, *many), expires=1 << 62, voucher=b"")

        place = await offer(network, host, answer, one)
        used = host.listen_addrs[0].without_peer()
        expected = [relay.through(address, host.peer_id) for address in (used, *(a.without_peer() for a in many))]
        assert list(place.addrs) == expected[: circuits.MAX_RELAY_ADDRS]
        assert place.expires == pytest.approx(one.clock.now() + circuits.MAX_LIFE_S)


@pytest.mark.loops
@pytest.mark.usefixtures("leakproof")
async def test_a_relay_on_loopback_tells_its_loopback_address():
    async with relay_host("tcp", 90, None, listen=[LOOPBACK]) as (host, _), tcp_host(1, listen=[]) as one:
        place = await one.circuits.reserve(host.peer_id, [host.listen_addrs[0].without_peer()])
        assert place.addrs == (relay.through(host.listen_addrs[0].without_peer(), host.peer_id),)
