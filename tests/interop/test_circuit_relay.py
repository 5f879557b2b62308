"""js-libp2p's relay serves us, js-libp2p uses ours and gets through, py-libp2p takes a place at ours."""

import asyncio
import contextlib
import random

import pytest
from helpers.echo import DIGEST, ECHO, answer_digest, answer_echo, round_trip
from helpers.hosts import tcp_host
from swarmnode.node.relay.server import Relay
from swarmnode.protocol import relay
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.relay_ledger import RelayLimits

pytestmark = pytest.mark.timeout(400)
SIZE = 1_000_000
PATIENCE_S = 20
BOTH_LIMITS = [RelayLimits(), RelayLimits(circuit_s=0, circuit_bytes=0)]


@contextlib.asynccontextmanager
async def hidden(number):
    """A host of ours that nobody can dial, with the test protocols."""
    async with tcp_host(number, listen=[], agent="swarmnode/test") as host:
        host.handle(ECHO, answer_echo)
        host.handle(DIGEST, answer_digest)
        yield host


@contextlib.asynccontextmanager
async def our_relay(limits=None):
    """A relay of ours: (host, service, its address as text)."""
    async with tcp_host(9) as host, Relay(host, limits) as service:
        yield host, service, str(host.listen_addrs[0])


async def echoes(host, peer, size=SIZE):
    payload = random.Random(size).randbytes(size)
    stream = await host.open_stream(peer, ECHO)
    assert await round_trip(stream, payload) == payload
    await stream.close()


def the(host, peer):
    (found,) = [info for info in host.connections() if info.peer == peer]
    return found


@pytest.fixture
def js(outside):
    if outside.name != "js":
        pytest.skip("js-libp2p's part")
    return outside


@pytest.fixture
def py(outside):
    if outside.name != "py":
        pytest.skip("py-libp2p's part")
    return outside


@pytest.mark.loops
async def test_we_meet_at_a_relay_of_theirs(js):
    """A place, its voucher, a circuit between two of ours with a megabyte each way."""
    async with js.run("listen", "--relay") as they, hidden(1) as one, hidden(2) as two:
        (address,) = [Multiaddr.parse(text) for text in (await they.line())["addrs"]]
        place = await two.circuits.reserve(address.peer_id, [address.without_peer()])
        assert place.limit is None
        assert place.addrs[0] == relay.through(address.without_peer(), address.peer_id)
        await one.connect(two.peer_id, place.addrs)
        assert the(one, two.peer_id).relayed
        await echoes(one, two.peer_id)
        again = await two.circuits.reserve(address.peer_id)
        assert again.expires > place.expires - 1  # told in whole seconds of another clock
        they.process.kill()
        async with asyncio.timeout(PATIENCE_S):
            while one.is_connected(two.peer_id) or two.circuits.places:  # noqa: ASYNC110 - two hosts hear of it
                await asyncio.sleep(0.01)


async def test_they_dial_us_through_their_relay(js):
    async with js.run("listen", "--relay") as relaying, hidden(3) as our:
        (address,) = [Multiaddr.parse(text) for text in (await relaying.line())["addrs"]]
        place = await our.circuits.reserve(address.peer_id, [address.without_peer()])
        async with js.run("dial", str(place.addrs[0].with_peer(our.peer_id)), "--circuit") as they:
            said = await they.line()
            assert await they.do(f"echo:{SIZE}") == {"echo": True}
            assert the(our, PeerId.parse(said["id"])).relayed
            assert await they.do(f"digest:{SIZE}") == {"digest": True}


@pytest.mark.parametrize("limits", BOTH_LIMITS, ids=["limited", "unlimited"])
async def test_they_use_our_relay(js, limits):
    """One of theirs takes a place at ours, another of theirs and one of ours dial it there."""
    async with (
        our_relay(limits) as (_, service, at),
        js.run("listen", "--at", at) as listener,
        hidden(4) as our,
    ):
        ready = await listener.line()
        (address,) = [text for text in ready["addrs"] if "/p2p-circuit" in text]
        peer = PeerId.parse(ready["id"])
        assert service.status().reservations == 1
        async with js.run("dial", address, "--circuit") as dialer:
            assert (await dialer.line())["connected"]
            assert await dialer.do(f"echo:{SIZE}") == {"echo": True}
            assert await dialer.do("ping")
            assert service.status().circuits == 1
        await our.connect(peer, [Multiaddr.parse(address)])
        assert the(our, peer).relayed
        await echoes(our, peer)
        assert service.status().bytes_total > 4 * SIZE
        assert service.status().refused == {}


async def test_they_dial_us_through_our_relay(js):
    async with our_relay() as (host, _, at), hidden(5) as our:
        place = await our.circuits.reserve(host.peer_id, [Multiaddr.parse(at).without_peer()])
        async with js.run("dial", str(place.addrs[0].with_peer(our.peer_id)), "--circuit") as they:
            said = await they.line()
            assert await they.do(f"echo:{SIZE}") == {"echo": True}
            await echoes(our, PeerId.parse(said["id"]))
            assert (await they.do("identify"))["agent"] == "swarmnode/test"


async def test_py_takes_a_place_at_our_relay(py):
    async with our_relay() as (host, service, at), py.run("dial", at) as they:
        me = PeerId.parse((await they.line())["id"])
        said = (await they.do("reserve"))["reserve"]
        assert said["ok"]
        voucher = relay.Voucher.open(bytes.fromhex(said["voucher"]), relay=host.peer_id, peer=me)
        assert voucher.expires == said["expires"]
        assert service.ledger.has(me, host.clock.now())
