from __future__ import annotations

import asyncio
import contextlib
import random
import time

import pytest
from helpers.hosts import MEMORY, key, memory_host, tcp_host
from helpers.virtual import EPOCH, LoopClock
from swarmnode.node import discovery as module
from swarmnode.node.clock import Clock
from swarmnode.node.discovery import Discovery
from swarmnode.node.exchanges import IDLE_STREAM_S
from swarmnode.node.limits import HostLimits
from swarmnode.node.tasks import Supervisor
from swarmnode.node.transport.base import ProtocolUnsupported
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol import protobuf
from swarmnode.protocol.errors import LocalProtocolError, PeerUnreachable, SessionClosed
from swarmnode.protocol.kad import PROTOCOL, LeasedEntry, Message, MessageType
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.records import SignedEntry, sign_entry
from swarmnode.routing.keys import models_key

KEY = models_key("test")


class World:
    """Nodes (host and discovery), each of which can be stopped as by kill -9 or be added later."""

    def __init__(self, stack, kind, latency_s=0.0):
        self.stack = stack
        self.kind = kind
        self.network = MemoryNetwork(random.Random(0), latency_s=latency_s)
        self.stops = {}
        self.numbers = iter(range(1, 1000))

    async def host(self, **options):
        number = next(self.numbers)
        host = memory_host(self.network, number, **options) if self.kind == "memory" else tcp_host(number, **options)
        return await self.stack.enter_async_context(host)

    async def node(self, door=None, clock=None, server_mode=True, **options):
        host = await self.host(**options)
        clock = clock or (LoopClock() if self.kind == "memory" else Clock())
        node = Discovery(host, clock=clock, rng=random.Random(1), server_mode=server_mode)
        tasks = await self.stack.enter_async_context(Supervisor("test"))
        running = tasks.start(node.run(), "discovery")
        self.stops[node] = (running, host)
        if door is not None:
            await node.bootstrap([address(door)])
        return node

    async def kill(self, node):
        running, host = self.stops.pop(node)
        if self.kind == "memory":
            self.network.crash(host._transports[0])
        running.cancel()
        await asyncio.wait([running])
        await host.aclose()


def address(node):
    return node._host.listen_addrs[0]


@contextlib.asynccontextmanager
async def world(kind="memory", **options):
    async with contextlib.AsyncExitStack() as stack:
        yield World(stack, kind, **options)


def payloads(entries):
    return {entry.payload for entry in entries}


# A swarm of one


@pytest.mark.virtual
async def test_alone_everything_works_at_once_even_before_run(clock):
    async with memory_host(MemoryNetwork(random.Random(0)), 1) as host:
        node = Discovery(host, clock=clock, rng=random.Random(1))
        assert await node.lookup(KEY) == []
        assert await node.publish(KEY, b"me") == 0
        assert payloads(await node.lookup(KEY)) == {b"me"}
        assert payloads(await node.lookup(KEY, fresh=True)) == {b"me"}
        await node.withdraw(KEY)
        await node.withdraw(KEY)
        assert await node.lookup(KEY) == []
        assert await node.bootstrap([]) == 0
        assert node.peers() == ()
        assert clock.now() == 0.0, "not a moment passed"


@pytest.mark.virtual
async def test_alone_an_entry_lives_on_until_withdrawn():
    async with world() as swarm:
        node = await swarm.node()
        await node.publish(KEY, b"me", ttl_s=100)
        await asyncio.sleep(1000)
        assert payloads(await node.lookup(KEY)) == {b"me"}
        await node.leave()
        assert await node.lookup(KEY) == []


async def test_payload_over_the_limit_is_the_callers_fault():
    async with world("tcp") as swarm:
        node = await swarm.node()
        with pytest.raises(LocalProtocolError, match="1000"):
            await node.publish(KEY, bytes(1001))


# Swarms


@pytest.mark.parametrize("kind", [pytest.param("memory", marks=pytest.mark.virtual), "tcp"])
async def test_three_nodes_find_each_others_entries(kind):
    async with world(kind) as swarm:
        first = await swarm.node()
        second = await swarm.node(first)
        third = await swarm.node(second)
        for number, node in enumerate((first, second, third)):
            assert await node.publish(KEY, bytes([number + 1])) == 2
        for node in (first, second, third):
            assert payloads(await node.lookup(KEY)) == {b"\1", b"\2", b"\3"}
        assert await third.find_peer(first._host.peer_id) is not None
        await second.leave()
        assert payloads(await third.lookup(KEY, fresh=True)) == {b"\1", b"\3"}


@pytest.mark.loops
async def test_thirty_nodes_on_loopback_converge_and_survive_ten_deaths():
    async with world("tcp") as swarm:
        nodes = [await swarm.node()]
        for _ in range(29):
            nodes.append(await swarm.node(random.Random(len(nodes)).choice(nodes)))
        await asyncio.gather(*(node.publish(KEY, bytes([number])) for number, node in enumerate(nodes)))
        for node in nodes:
            assert len(await node.lookup(KEY)) == 30
        for node in nodes[10:20]:
            await swarm.kill(node)
        for node in nodes[:10] + nodes[20:]:
            start = time.monotonic()
            found = payloads(await node.lookup(KEY, fresh=True))
            assert time.monotonic() - start < 1.0
            assert found >= {bytes([number]) for number in (*range(10), *range(20, 30))}
        newcomer = await swarm.node(nodes[25])
        assert len(await newcomer.lookup(KEY)) >= 20


@pytest.mark.virtual
async def test_thirty_nodes_far_apart_forget_the_dead_in_time(clock):
    """50 ms round trips, an hour's worth of maintenance compressed; the dead are gone after a lease."""
    async with world(latency_s=0.025) as swarm:
        nodes = [await swarm.node()]
        for _ in range(29):
            nodes.append(await swarm.node(random.Random(len(nodes)).choice(nodes)))
        for number, node in enumerate(nodes[:5]):
            assert await node.publish(KEY, bytes([number])) >= 8
        start = clock.now()
        assert len(await nodes[17].lookup(KEY)) == 5
        assert clock.now() - start < 0.5
        for node in (nodes[0], *nodes[20:]):
            await swarm.kill(node)
        start = clock.now()
        assert len(await nodes[7].lookup(KEY)) == 5
        assert clock.now() - start < 1.0
        await asyncio.sleep(120)
        assert payloads(await nodes[12].lookup(KEY, fresh=True)) == {b"\1", b"\2", b"\3", b"\4"}
        for node in nodes[1:20]:
            assert len(node.peers()) == 18, "and the tables hold the living, all of them"


@pytest.mark.virtual
async def test_clients_take_part_without_being_listed():
    async with world() as swarm:
        server = await swarm.node()
        other = await swarm.node(server)
        client = await swarm.node(server, server_mode=False, listen=[])
        await client.publish(KEY, b"client")
        assert payloads(await other.lookup(KEY)) == {b"client"}
        await asyncio.sleep(100)
        assert {contact.peer for contact in other.peers()} == {server._host.peer_id}
        assert len(client.peers()) == 2
        with pytest.raises(ProtocolUnsupported):
            await server._host.open_stream(client._host.peer_id, PROTOCOL)


@pytest.mark.virtual
async def test_lookups_of_one_key_are_shared_and_the_next_one_is_free(clock):
    async with world(latency_s=0.05) as swarm:
        first = await swarm.node()
        second = await swarm.node(first)
        await first.publish(KEY, b"x")
        before = second.dht._ids
        found = await asyncio.gather(*(second.lookup(KEY) for _ in range(50)))
        assert all(payloads(entries) == {b"x"} for entries in found)
        assert second.dht._ids - before <= 2, "one query, one question"
        start = clock.now()
        assert payloads(await second.lookup(KEY)) == {b"x"}
        assert clock.now() == start


@pytest.mark.virtual
async def test_a_peer_that_never_answers_costs_little_and_only_once(clock):
    async with world(latency_s=0.001) as swarm:
        nodes = [await swarm.node()]
        for _ in range(3):
            nodes.append(await swarm.node(nodes[0]))
        await nodes[1].publish(KEY, b"x")

        async def hang(stream):
            await asyncio.Event().wait()

        nodes[0]._host.handle(PROTOCOL, hang)
        nodes[3]._exchanges._idle.clear()
        for limit_s in (0.5, 0.1):
            start = clock.now()
            assert payloads(await nodes[3].lookup(KEY, fresh=True)) == {b"x"}
            assert clock.now() - start < limit_s
        await nodes[3].publish(KEY, b"y")


# Joining


async def test_unreachable_entrances_are_named_with_their_cause():
    async with world("tcp") as swarm:
        gone = await swarm.node()
        where = address(gone)
        await swarm.kill(gone)
        node = await swarm.node()
        with pytest.raises(PeerUnreachable, match="refused") as caught:
            await node.bootstrap([where])
        assert str(where.port) in str(caught.value)
        with pytest.raises(PeerUnreachable, match="itself"):
            await node.bootstrap([address(node)])
        good = await swarm.node()
        assert await node.bootstrap([where, address(good)]) == 1


@pytest.mark.virtual
async def test_a_lonely_node_tries_its_entrances_again():
    async with world() as swarm:
        door = Multiaddr.parse("/memory/500")
        node = await swarm.node()
        with pytest.raises(PeerUnreachable):
            await node.bootstrap([door])
        await asyncio.sleep(300)
        late = await swarm.node(listen=[door])
        await asyncio.sleep(module.REJOIN_CAP_S + 1)
        assert [contact.peer for contact in node.peers()] == [late._host.peer_id]


@pytest.mark.virtual
async def test_an_island_grows_together_with_the_rest_when_its_entrance_is_back():
    """Somebody came in through a node that had not found its own way in yet: neither of them is alone."""
    async with world() as swarm:
        door = Multiaddr.parse("/memory/500")
        node = await swarm.node()
        with pytest.raises(PeerUnreachable):
            await node.bootstrap([door])
        friend = await swarm.node(node)
        await asyncio.sleep(300)
        late = await swarm.node(listen=[door])
        other = await swarm.node(late)
        await asyncio.sleep(module.ISLAND_CAP_S + 60)
        members = {one._host.peer_id for one in (node, friend, late, other)}
        for one in (node, friend, late, other):
            assert {contact.peer for contact in one.peers()} == members - {one._host.peer_id}


@pytest.mark.virtual
async def test_a_restarted_peer_is_found_again():
    async with world() as swarm:
        first = await swarm.node(listen=[Multiaddr.parse("/memory/500")])
        second = await swarm.node(first)
        await swarm.kill(first)
        await asyncio.sleep(60)
        assert second.peers() == ()
        third = await swarm.node(listen=[Multiaddr.parse("/memory/500")])
        await third.publish(KEY, b"x")
        await second.bootstrap([address(third)])
        assert payloads(await second.lookup(KEY, fresh=True)) == {b"x"}


@pytest.mark.virtual
async def test_leaving_ends_what_waits():
    async with world(latency_s=0.2) as swarm:
        first = await swarm.node()
        second = await swarm.node(first)
        waiting = asyncio.gather(second.lookup(KEY), return_exceptions=True)
        await asyncio.sleep(0.01)
        await swarm.kill(second)
        (result,) = await waiting
        assert isinstance(result, SessionClosed)
        with pytest.raises(SessionClosed):
            await second.lookup(KEY, fresh=True)


@pytest.mark.virtual
async def test_leaving_takes_a_second_at_most(clock):
    async with world(latency_s=5.0) as swarm:
        first = await swarm.node()
        second = await swarm.node()
        second.dht._enter(module.Contact(first._host.peer_id, (address(first).without_peer(),)), None, clock.now())
        query = asyncio.gather(second.publish(KEY, b"x"))
        await asyncio.sleep(0.1)
        assert second.dht.published == [KEY]
        start = clock.now()
        await second.leave()
        assert clock.now() - start <= module.LEAVE_S
        await swarm.kill(second)
        with pytest.raises(SessionClosed):
            await query


@pytest.mark.virtual
async def test_idle_streams_are_closed():
    async with world() as swarm:
        first = await swarm.node()
        second = await swarm.node(first)
        assert len(second._exchanges)
        second.dht.upkeep.due_at = float("inf")  # it would ask around
        await asyncio.sleep(IDLE_STREAM_S + 5)
        assert not len(second._exchanges)
        assert payloads(await second.lookup(KEY)) == set()


# Hostile peers, over real streams


def entry(number=77, payload=b"here", issued=EPOCH, **changes):
    made = sign_entry(key(number), KEY, payload, seq=1, issued_ms=int(issued * 1000), ttl_s=100)
    fields = {name: getattr(made, name) for name in SignedEntry.__dataclass_fields__}
    return SignedEntry(**fields | changes)


async def ask(stream, *messages):
    """Send raw messages, read as many replies; None when the stream was reset."""
    split = protobuf.Delimited(1 << 20)
    replies = []
    try:
        for message in messages:
            raw = message if isinstance(message, bytes) else protobuf.delimited(message.encode())
            await stream.write(raw)
            while True:
                chunk = await stream.read(65536)
                if not chunk:
                    return None
                done = [Message.decode(part) for part in split.feed(chunk)]
                if done:
                    replies += done
                    break
    except OSError:
        return None
    return replies


def put(*entries):
    return Message(type=MessageType.PUT_ENTRIES, key=KEY, entries=tuple(LeasedEntry(one, one.ttl_s) for one in entries))


@pytest.mark.virtual
async def test_several_requests_on_one_stream():
    async with world() as swarm:
        node = await swarm.node()
        stranger = await swarm.host()
        stream = await stranger.open_stream(node._host.peer_id, PROTOCOL, addrs=[address(node)])
        replies = await ask(
            stream,
            Message(type=MessageType.PING),
            put(entry()),
            Message(type=MessageType.GET_ENTRIES, key=KEY),
            Message(type=MessageType.FIND_NODE, key=b"x"),
        )
        assert [reply.type for reply in replies] == [
            MessageType.PING, MessageType.PUT_ENTRIES, MessageType.GET_ENTRIES, MessageType.FIND_NODE,
        ]  # fmt: skip
        assert replies[1].accepted == 1
        assert replies[2].entries[0].entry == entry()
        await stream.close()


@pytest.mark.virtual
@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        protobuf.uvarint(1 << 30),
        protobuf.delimited(b"\xff\xff"),
        protobuf.delimited(protobuf.encode([(1, 99)])),
        put(entry(payload=b"lies", signature=bytes(64))),
        put(entry(), entry(78, subkey=key(79).peer_id)),
    ],
    ids=["varint", "huge", "junk", "unknown type", "unsigned", "forged signer"],
)
async def test_rule_breakers_are_cut_off_and_nothing_of_theirs_is_kept(bad):
    async with world() as swarm:
        node = await swarm.node()
        stranger = await swarm.host()
        stream = await stranger.open_stream(node._host.peer_id, PROTOCOL, addrs=[address(node)])
        assert await ask(stream, bad) is None
        held = await node.lookup(KEY)
        assert [one.subkey for one in held] in ([], [key(77).peer_id])
        assert all(one.verify() for one in held)
        friend = await swarm.node(node)
        await friend.publish(KEY, b"honest")
        assert b"honest" in payloads(await node.lookup(KEY, fresh=True)), "the node serves others as before"


@pytest.mark.virtual
async def test_untimely_entries_are_not_kept():
    async with world() as swarm:
        node = await swarm.node()
        stranger = await swarm.host()
        stream = await stranger.open_stream(node._host.peer_id, PROTOCOL, addrs=[address(node)])
        (reply,) = await ask(stream, put(entry(issued=EPOCH + 100), entry(78, issued=EPOCH - 200)))
        assert reply.accepted == 0
        assert await node.lookup(KEY) == []
        stream.reset()


@pytest.mark.virtual
@pytest.mark.parametrize(
    "answer",
    [
        b"\xff" * 11,
        Message(type=MessageType.PING),
        Message(type=MessageType.GET_ENTRIES, key=KEY, entries=(LeasedEntry(entry(signature=bytes(64)), 100),)),
        Message(
            type=MessageType.GET_ENTRIES,
            key=models_key("other"),
            entries=(LeasedEntry(sign_entry(key(5), models_key("other"), b"x", seq=1, issued_ms=0, ttl_s=99), 99),),
        ),
    ],
    ids=["junk", "another type", "forged", "another key"],
)
async def test_lying_answers_count_as_none(answer):
    async with world() as swarm:
        liar, honest = await swarm.node(), await swarm.node()
        node = await swarm.node(liar)
        await node.bootstrap([address(honest)])
        await honest.publish(KEY, b"true")

        async def lie(stream):
            await stream.read(65536)
            await stream.write(answer if isinstance(answer, bytes) else protobuf.delimited(answer.encode()))
            await stream.read(1)

        liar._host.handle(PROTOCOL, lie)
        node._exchanges._idle.clear()
        assert payloads(await node.lookup(KEY, fresh=True)) == {b"true"}
        assert liar._host.peer_id not in {contact.peer for contact in node.peers()}


@pytest.mark.virtual
async def test_streams_served_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_SERVED_STREAMS", 2)
    async with world() as swarm:
        node = await swarm.node()
        stranger = await swarm.host()
        streams = [await stranger.open_stream(node._host.peer_id, PROTOCOL, addrs=[address(node)]) for _ in range(3)]
        answers = [await ask(stream, Message(type=MessageType.PING)) for stream in streams]
        assert [reply is not None for reply in answers] == [True, True, False]
        streams[0].reset()
        await asyncio.sleep(1)
        stream = await stranger.open_stream(node._host.peer_id, PROTOCOL)
        assert await ask(stream, Message(type=MessageType.PING)) is not None


@pytest.mark.virtual
async def test_a_silent_asker_is_dropped():
    async with world() as swarm:
        node = await swarm.node()
        stranger = await swarm.host(listen=[MEMORY])
        stream = await stranger.open_stream(node._host.peer_id, PROTOCOL, addrs=[address(node)])
        await ask(stream, Message(type=MessageType.PING))
        assert node._serving == 1
        await asyncio.sleep(module.SERVE_IDLE_S + 1)
        assert node._serving == 0


@pytest.mark.virtual
async def test_peers_of_the_table_stay_connected_when_idle_connections_are_closed():
    limits = HostLimits(high_water=3, low_water=1, grace_s=1.0)
    async with world(latency_s=0.01) as w:
        door = await w.node(limits=limits)
        for _ in range(2):
            await w.node(door)
        await asyncio.sleep(600)  # long after anything was asked on their connections
        table = {contact.peer for contact in door.dht.table}
        assert set(door._host.peers()) == table
        strangers = [await w.host() for _ in range(2)]
        for stranger in strangers:
            await asyncio.sleep(60)
            await stranger.connect(None, [address(door)])
        await asyncio.sleep(0.5)
        assert door._host.refused == {"trimmed": 1}
        assert set(door._host.peers()) == table | {strangers[1].peer_id}
