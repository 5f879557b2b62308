"""js-libp2p's DHT and ours, over real sockets: each as the other's server and client, and all in one swarm."""

import asyncio
import contextlib
import random
from functools import partial

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from helpers import js_peer
from helpers.hosts import tcp_host
from swarmnode.node.clock import Clock
from swarmnode.node.discovery import Discovery
from swarmnode.node.tasks import Supervisor
from swarmnode.protocol import kad, protobuf
from swarmnode.protocol.ids import PeerId, PrivateKey, PublicKey
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing.keys import content_key

pytestmark = [pytest.mark.interop_js, pytest.mark.timeout(400)]

PATIENCE_S = 30
THING = content_key(b"\x01" * 32)
ANOTHER = content_key(b"\x02" * 32)


@pytest.fixture(scope="module")
def folder():
    """js-libp2p, installed."""
    if js_peer.npm() is None:
        pytest.skip("npm is not installed")
    try:
        return js_peer.install()
    except RuntimeError as exc:  # without a network there is nothing to test with
        pytest.skip(f"cannot be installed here: {str(exc)[-300:]}")


class Swarm:
    """Nodes of ours and of theirs; all end with it."""

    def __init__(self, stack, folder):
        self._stack = stack
        self._folder = folder
        self._made = 0

    async def ours(self, *doors, server_mode=True):
        self._made += 1
        host = await self._stack.enter_async_context(tcp_host(self._made))
        node = Discovery(host, clock=Clock(), rng=random.Random(self._made), server_mode=server_mode)
        tasks = await self._stack.enter_async_context(Supervisor("test"))
        tasks.start(node.run(), "discovery")
        await node.bootstrap(doors)
        return node

    async def theirs(self, *arguments, role="server"):
        node = await self._stack.enter_async_context(js_peer.js_peer(self._folder, *arguments, "--dht", role))
        node.ready = await node.line()
        node.peer = PeerId.parse(node.ready["id"])
        node.addrs = [Multiaddr.parse(text) for text in node.ready.get("addrs", ())]
        return node


@pytest.fixture
async def swarm(folder):
    async with contextlib.AsyncExitStack() as stack:
        yield Swarm(stack, folder)


def address(node):
    return node._host.listen_addrs[0]


def peer(node):
    return node.peer if hasattr(node, "peer") else node._host.peer_id


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - several nodes and a process take part
            await asyncio.sleep(0.01)


def rsa_record():
    """A public key whose id is a hash, with the key of its record."""
    public = rsa.generate_private_key(65537, 2048).public_key()
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    value = protobuf.encode([(1, 0), (2, der)])
    return b"/pk/" + PeerId.from_public_key(PublicKey.unmarshal(value)).raw, value


def small_record(number):
    public = PrivateKey.from_seed(number.to_bytes(32, "big")).public
    return b"/pk/" + PeerId.from_public_key(public).raw, public.marshal()


async def test_their_client_asks_our_servers(swarm):
    """FIND_NODE, PUT_VALUE, GET_VALUE, ADD_PROVIDER and GET_PROVIDERS of theirs, answered by ours."""
    first = await swarm.ours()
    second = await swarm.ours(address(first))
    they = await swarm.theirs("listen", role="client")
    await they.do(f"connect:{address(first)}")
    await they.do("table:1")
    assert await they.do(f"find:{peer(second)}") == {
        "find": {"id": str(peer(second)), "addrs": [str(address(second).without_peer())]}
    }
    assert (await they.do(f"find:{peer(first)}"))["find"]["id"] == str(peer(first))
    both = {str(peer(first)), str(peer(second))}
    assert set((await they.do(f"closest:{THING.hex()}"))["closest"]) == both

    for key, value in (rsa_record(), small_record(1)):
        assert set((await they.do(f"put:{key.hex()},{value.hex()}"))["put"]) == both
        assert await first.get_value(key) == value
    assert (await they.do(f"put:{b'/pk/wrong'.hex()},00"))["put"] == []

    ours_key, ours_value = rsa_record()
    assert await first.put_value(ours_key, ours_value) == 1
    assert await they.do(f"get:{ours_key.hex()}") == {"get": ours_value.hex()}
    assert await they.do(f"get:{rsa_record()[0].hex()}") == {"get": None}

    assert set((await they.do(f"provide:{THING.hex()}"))["provide"]) == both
    await until(lambda: all(len(node.dht.providers) for node in (first, second)))  # nobody answers that
    for node in (first, second):
        (found,) = await node.providers(THING)
        assert found.peer == they.peer
        assert found.addrs == tuple(addr.without_peer() for addr in they.addrs)
    await second.provide(ANOTHER)
    assert await they.do(f"providers:{ANOTHER.hex()}") == {
        "providers": [{"id": str(peer(second)), "addrs": [str(address(second).without_peer())]}]
    }
    assert they.peer not in first.dht.table, "a client is no server"


async def test_our_client_asks_their_servers(swarm):
    """The same the other way round; ours serves nobody."""
    first = await swarm.theirs("listen")
    second = await swarm.theirs("listen")
    await second.do(f"connect:{first.addrs[0]}")
    for they in (first, second):
        await they.do("table:1")
    our = await swarm.ours(first.addrs[0], server_mode=False)
    await until(lambda: len(our.peers()) == 2)
    contact = await our.find_peer(second.peer)
    assert contact.addrs == tuple(addr.without_peer() for addr in second.addrs)
    found = await our._result(our.dht.locate(THING, our._clock.now()))
    assert {contact.peer for contact in found.contacts} == {first.peer, second.peer}

    for key, value in (rsa_record(), small_record(1)):
        assert await our.put_value(key, value) == 2
        for they in (first, second):
            assert await they.do(f"get:{key.hex()}") == {"get": value.hex()}
    key, value = rsa_record()
    await second.do(f"put:{key.hex()},{value.hex()}")
    assert await our.get_value(key) == value
    assert await our.get_value(rsa_record()[0]) is None

    assert await our.provide(THING) == 2
    mine = {"id": str(peer(our)), "addrs": [str(address(our).without_peer())]}
    for they in (first, second):
        assert await they.do(f"providers:{THING.hex()}") == {"providers": [mine]}
    await second.do(f"provide:{ANOTHER.hex()}")
    (found,) = await our.providers(ANOTHER)
    assert (found.peer, found.addrs) == (second.peer, contact.addrs)


async def test_many_requests_on_one_stream(swarm):
    """One after another, unanswered ones between them, as go-libp2p sends them."""
    they = await swarm.theirs("listen")
    our = await swarm.ours(they.addrs[0])
    host = our._host
    stream = await host.open_stream(they.peer, kad.PROTOCOL)
    split = protobuf.Delimited(kad.MAX_MESSAGE_BYTES)
    own = kad.KadPeer(host.peer_id, (address(our).without_peer().to_bytes(),))
    key, value = rsa_record()
    for request in (
        kad.Message(type=kad.MessageType.FIND_NODE, key=host.peer_id.raw),
        kad.Message(type=kad.MessageType.ADD_PROVIDER, key=THING, provider_peers=(own,)),
        kad.Message(type=kad.MessageType.PUT_VALUE, key=key, record=kad.Record(key, value)),
        kad.Message(type=kad.MessageType.GET_PROVIDERS, key=THING),
        kad.Message(type=kad.MessageType.GET_VALUE, key=key),
        kad.Message(type=kad.MessageType.PING),
    ):
        await stream.write(protobuf.delimited(request.encode()))
        if request.type in kad.UNANSWERED:
            continue
        replies = []
        while not replies:
            replies = list(split.feed(await stream.read(65536)))
        reply = kad.Message.decode(replies[0])
        assert reply.type is request.type
        if request.record or request.type is kad.MessageType.GET_VALUE:
            assert reply.record.value == value
        if request.type is kad.MessageType.GET_PROVIDERS:
            assert [one.peer for one in reply.provider_peers] == [host.peer_id]
    await stream.close()


async def test_one_swarm_of_both(swarm):
    """Four of ours and three of theirs, joined through each other: each finds every other one."""
    nodes = [await swarm.ours()]
    for number in range(1, 7):
        door = nodes[-1]
        if number % 2:
            they = await swarm.theirs("listen")
            await they.do(f"connect:{address(door)}")
            await they.do("table:1")
            table = door.dht.table
            await until(partial(table.__contains__, they.peer))  # they do not name themselves: identify does
            nodes.append(they)
        else:
            nodes.append(await swarm.ours(door.addrs[0]))
    ours, theirs = nodes[::2], nodes[1::2]
    for node in nodes:
        for other in nodes:
            if node is other:
                continue
            if node in ours:
                tries = [await node.find_peer(peer(other))]
                while tries[-1] is None and len(tries) < 5:  # on a busy machine a process may answer too late
                    tries.append(await node.find_peer(peer(other)))
                assert tries[-1] is not None, f"{nodes.index(node)} does not find {nodes.index(other)}"
            else:
                assert (await node.do(f"find:{peer(other)}"))["find"]["id"] == str(peer(other))
    await ours[0].provide(THING)
    await theirs[2].do(f"provide:{THING.hex()}")
    both = {peer(ours[0]), peer(theirs[2])}
    await until(lambda: sum(len(node.dht.providers) > 0 for node in ours) == len(ours))
    for node in ours:
        assert {contact.peer for contact in await node.providers(THING)} == both
    for node in theirs:
        found = (await node.do(f"providers:{THING.hex()}"))["providers"]
        assert {PeerId.parse(one["id"]) for one in found} == both
    entry_key = ours[0].models_key()
    assert await ours[0].publish(entry_key, b"here") == 3, "theirs cannot hold our entries"
    assert [entry.payload for entry in await ours[3].lookup(entry_key)] == [b"here"]
