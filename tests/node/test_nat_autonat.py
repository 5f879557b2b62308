"""AutoNAT between whole hosts: who is dialed, what proves it, who is refused, and how often."""

import asyncio
import contextlib
import random

import pytest
from helpers.hosts import MEMORY, hosts, key, memory_host
from swarmnode.node.nat import autonat
from swarmnode.node.nat.autonat import Allowance, Answering, Asking
from swarmnode.node.transport.memory import MemoryNetwork, Nat
from swarmnode.protocol import autonat_v1, protobuf, reachability
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.reachability import DIAL_BACK, DIAL_REQUEST, DialStatus, ResponseStatus, Server, respond
from swarmnode.protocol.verdict import Outcome

pytestmark = pytest.mark.virtual

PUBLIC = Multiaddr.parse("/ip4/203.0.113.7/tcp/4001")


@contextlib.asynccontextmanager
async def ready(count=2):
    """Hosts that all answer and ask, connected with the first."""
    async with hosts("memory", count) as made:
        asking = [Asking(host) for host in made]
        for host, one in zip(made, asking, strict=True):
            Answering(host, random.Random(0)).register()
            one.register()
        for host in made[1:]:
            await host.connect(made[0].peer_id)
        await asyncio.sleep(1)
        yield made, asking


async def test_a_reachable_address_is_dialed_and_proven():
    async with ready() as ((server, client), (_, asking)):
        before = len(server.connections())
        assert await asking.ask(server.peer_id, client.bound_addrs[0]) is Outcome.REACHED
        await asyncio.sleep(1)
        assert len(server.connections()) == before, "the dial back is gone"


async def test_nobody_there_is_a_failure():
    async with ready() as ((server, _), (_, asking)):
        assert await asking.ask(server.peer_id, Multiaddr.parse("/memory/999")) is Outcome.FAILED


async def test_somebody_else_there_is_a_failure():
    async with ready(3) as ((server, _, third), (_, asking, _)):
        assert await asking.ask(server.peer_id, third.bound_addrs[0]) is Outcome.FAILED


async def test_behind_a_nat_nothing_comes_back():
    network = MemoryNetwork(random.Random(0))
    async with memory_host(network, 1) as server:
        Answering(server, random.Random(0)).register()
        async with memory_host(network, 2, nat=Nat.CONE) as client:
            asking = Asking(client)
            asking.register()
            await client.connect(server.peer_id, server.listen_addrs)
            assert await asking.ask(server.peer_id, client.bound_addrs[0]) is Outcome.FAILED


@contextlib.asynccontextmanager
async def one_server(handler):
    """A host that answers dial requests by `handler(stream, server)`, and one that asks."""

    async def serve(stream):
        server = Server()
        while server.request is None:
            server.feed(await stream.read(10_000))
        await handler(stream, server)

    async with hosts("memory", 2) as made:
        made[0].handle(DIAL_REQUEST, serve)
        asking = Asking(made[1])
        asking.register()
        await made[1].connect(made[0].peer_id)
        await asyncio.sleep(1)
        yield made, asking


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (respond(ResponseStatus.OK, 0, DialStatus.OK), Outcome.NOTHING),
        (respond(ResponseStatus.OK, 0, DialStatus.DIAL_BACK_ERROR), Outcome.NOTHING),
        (respond(ResponseStatus.OK, 0, DialStatus.DIAL_ERROR), Outcome.FAILED),
        (respond(ResponseStatus.OK, 1, DialStatus.DIAL_ERROR), Outcome.NOTHING),
        (respond(ResponseStatus.DIAL_REFUSED), Outcome.REFUSED),
        (respond(ResponseStatus.REQUEST_REJECTED), Outcome.BUSY),
        (respond(ResponseStatus.INTERNAL_ERROR), Outcome.NOTHING),
        (b"\x03abc", Outcome.NOTHING),
        (b"", Outcome.NOTHING),
    ],
)
async def test_what_a_server_says_without_a_nonce(answer, outcome):
    async def say(stream, server):
        await stream.write(answer)

    async with one_server(say) as ((server, client), asking):
        assert await asking.ask(server.peer_id, client.bound_addrs[0]) is outcome
        assert not asking._came


async def test_a_silent_server_is_given_up():
    async def nothing(stream, server):
        await stream.read(1)

    async with one_server(nothing) as ((server, client), asking):
        began = asyncio.get_running_loop().time()
        assert await asking.ask(server.peer_id, client.bound_addrs[0]) is Outcome.NOTHING
        assert asyncio.get_running_loop().time() - began == pytest.approx(autonat.ASK_S)


@pytest.mark.parametrize("right", [True, False])
async def test_only_our_nonce_proves(right):
    async def back(stream, server):
        host = made[0]
        wire = await host.dial_anew(made[1].peer_id, made[1].bound_addrs[0])
        call = await host.open_on(wire, DIAL_BACK)
        nonce = server.request.nonce if right else server.request.nonce ^ 1
        await call.write(protobuf.delimited(reachability.encode_dial_back(nonce)))
        try:
            answers.append(await call.read(10))
        except OSError as exc:
            answers.append(type(exc).__name__)
        await wire.aclose()
        await stream.write(respond(ResponseStatus.OK, 0, DialStatus.OK))

    answers = []
    async with one_server(back) as (made, asking):
        found = await asking.ask(made[0].peer_id, made[1].bound_addrs[0])
        assert found is (Outcome.REACHED if right else Outcome.NOTHING)
        assert answers == [b"\x00" if right else "StreamReset"]


async def test_a_peer_is_served_only_so_often():
    async with ready() as ((server, client), (_, asking)):
        address = client.bound_addrs[0]
        served = [await asking.ask(server.peer_id, address) for _ in range(autonat.PEER_BURST + 1)]
        assert served == [Outcome.REACHED] * autonat.PEER_BURST + [Outcome.BUSY]
        await asyncio.sleep(1 / autonat.PEER_RATE)
        assert await asking.ask(server.peer_id, address) is Outcome.REACHED


def test_allowances_by_peer_network_and_all_hold_exactly():
    def served(count, peer, seen):
        return sum(allowance.take(peer(n), seen(n), 0.0) for n in range(count))

    def ids(n):
        return key(n).peer_id

    allowance = Allowance()
    assert served(20, lambda _: ids(1), lambda _: PUBLIC) == autonat.PEER_BURST
    allowance = Allowance()
    assert served(40, ids, lambda n: Multiaddr.parse(f"/ip4/203.0.113.{n}/tcp/1")) == autonat.NETWORK_BURST
    allowance = Allowance()
    assert served(100, ids, lambda n: Multiaddr.parse(f"/ip4/203.0.{n}.1/tcp/1")) == autonat.TOTAL_BURST
    assert sum(allowance.take_data(0.0) for _ in range(50)) == autonat.DATA_BURST


async def test_version_1_is_answered():
    async with ready() as ((server, client), _):
        for address, status in ((client.bound_addrs[0], 0), (Multiaddr.parse("/memory/999"), 100)):
            stream = await client.open_stream(server.peer_id, autonat_v1.PROTOCOL)
            await stream.write(protobuf.delimited(autonat_v1.Dial(client.peer_id, (address,)).encode()))
            (raw,) = protobuf.Delimited(1000).feed(await stream.read(1000))
            answer = autonat_v1.Answer.decode(raw)
            assert (answer.status, answer.addr) == (status, None if status else address)
            await stream.close()


async def test_ones_own_router_is_not_dialed():
    network = MemoryNetwork(random.Random(0))
    async with memory_host(network, 1, listen=[MEMORY]) as host:
        host.advertise("router", [PUBLIC])
        answering = Answering(host, random.Random(0))
        assert not answering._may_dial(Multiaddr.parse("/ip4/203.0.113.7/tcp/9"))
        assert answering._may_dial(Multiaddr.parse("/ip4/203.0.113.8/tcp/9"))
        six = Multiaddr.parse("/ip6/2600::1/tcp/9")
        assert not answering._may_dial(six), "no IPv6 here"
        host.advertise("router", [Multiaddr.parse("/ip6/2600::2/tcp/9")])
        assert answering._may_dial(six)
