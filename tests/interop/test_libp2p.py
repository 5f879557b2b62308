"""js-libp2p and py-libp2p dial us and are dialed: everything both sides see, over real sockets."""

import asyncio
import contextlib
import random
import socket

import pytest
from helpers.echo import (
    DIGEST,
    ECHO,
    GOODBYE,
    answer_digest,
    answer_echo,
    check_digest,
    check_goodbye,
    round_trip,
    say_goodbye,
)
from helpers.hosts import tcp_host
from swarmnode.node.transport import wire
from swarmnode.node.transport.base import ConnectionClosed, ProtocolUnsupported
from swarmnode.protocol import identify, ping
from swarmnode.protocol.errors import PeerUnreachable
from swarmnode.protocol.ids import KeyType, PeerId, PrivateKey
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.yamux import Session
from swarmnode.protocol.yamux_frames import Flag

pytestmark = pytest.mark.timeout(400)

BASE = {identify.PROTOCOL, identify.PUSH_PROTOCOL, ping.PROTOCOL}
OURS = {*BASE, ECHO, DIGEST, GOODBYE}
LARGE = 5_000_000
PATIENCE_S = 20
"""For events that come at once or never; under the 30 s after which keepalives find a dead peer."""


class Us:
    """A host of ours with the test protocols, and what it hears."""

    def __init__(self, host):
        self.host = host
        self.goodbyes = asyncio.Queue()
        self._identified = asyncio.Queue()
        host.on_identify(self._identified.put_nowait)
        host.handle(ECHO, answer_echo)
        host.handle(DIGEST, answer_digest)
        host.handle(GOODBYE, self._goodbye)

    async def _goodbye(self, stream):
        self.goodbyes.put_nowait(await say_goodbye(stream))

    async def until(self, look):
        """Wait until the peer's entry in the book is as wanted; returns the entry."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for peer in self.host.peers():
                    info = self.host.book.get(peer)
                    if look(info):
                        return info
                await self._identified.get()

    @property
    def wire(self):
        """The one connection there is."""
        (found,) = self.host._wires
        return found

    async def is_left_by(self, process):
        """Kill the other process: a read that waits must fail at once."""
        stream = await self.host.open_stream(self.wire.remote, ECHO)
        await round_trip(stream, b"x")
        gone = asyncio.Event()
        self.host.on_disconnect(lambda _: gone.set())
        reading = asyncio.get_running_loop().create_task(stream.read(1))
        process.process.kill()
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ConnectionClosed):
                await reading
        assert gone.is_set()


@contextlib.asynccontextmanager
async def us(number, **options):
    async with tcp_host(number, **options) as host:
        yield Us(host)


def addresses(ready):
    return [Multiaddr.parse(text) for text in ready["addrs"]]


@pytest.mark.loops
async def test_they_dial_us(outside):
    async with us(1, agent="swarmnode/test") as our:
        address = str(our.host.listen_addrs[0])
        plain = address.rsplit("/p2p/")[0]
        async with outside.run("dial", address) as they:
            said = await they.line()
            assert (said["encryption"], said["muxer"]) == ("/noise", "/yamux/1.0.0")

            found = await they.do("identify")
            assert (found["id"], found["agent"]) == (str(our.host.peer_id), "swarmnode/test")
            assert set(found["protocols"]) >= OURS
            assert found["addrs"] == [plain]
            assert found["observed"] == str(our.wire.address)
            book = await they.do("book")
            assert book["certified"] == [plain]
            assert set(book["protocols"]) >= OURS

            info = await our.until(lambda info: info.agent)
            assert our.wire.remote == PeerId.parse(said["id"])
            assert outside.agent in info.agent
            assert info.protocols >= OURS
            assert info.addrs == ()  # it listens nowhere
            assert our.wire.life.early_muxer == outside.early_muxer

            assert len((await they.do("ping"))["ping"]) == 3
            assert await they.do(f"echo:{LARGE}") == {"echo": True}
            assert await they.do("streams:200") == {"streams": True}
            assert await they.do("digest:1000000") == {"digest": True}
            assert await they.do("goodbye:1000000") == {"goodbye": "bye"}
            assert await our.goodbyes.get() == 1_000_000
            assert len(our.host.connections()) == 1
            await our.is_left_by(they)


@pytest.mark.loops
async def test_we_dial_them(outside):
    async with outside.run("listen") as they, us(2, agent="swarmnode/test") as our:
        ready = await they.line()
        host = our.host
        peer = await host.connect(None, addresses(ready))
        assert peer == PeerId.parse(ready["id"])
        assert our.wire.life.early_muxer == outside.early_muxer
        await two_hundred_streams(host, peer)  # at once: the other side's upgrade may not be over

        info = await our.until(lambda info: info.agent and info.certified)
        assert outside.agent in info.agent
        assert info.protocols >= OURS
        assert info.addrs == info.certified == tuple(address.without_peer() for address in addresses(ready))
        found = await they.do("identify")
        assert (found["id"], found["agent"]) == (str(host.peer_id), "swarmnode/test")
        assert set(found["protocols"]) >= OURS

        for _ in range(4):  # js allows two ping streams at once: ours must end cleanly
            assert 0 < await host.ping(peer) < PATIENCE_S
        assert host.rtt(peer) is not None
        stream = await host.open_stream(peer, ECHO)
        for size in (0, 1, 70_000, LARGE):
            payload = random.Random(size).randbytes(size)
            assert await round_trip(stream, payload) == payload
        await stream.close()
        await check_digest(await host.open_stream(peer, DIGEST), 1_000_000)
        await check_goodbye(await host.open_stream(peer, GOODBYE), 1_000_000)
        assert await they.line() == {"received": 1_000_000}
        with pytest.raises(ProtocolUnsupported):
            await host.open_stream(peer, "/unknown/1.0.0")
        assert len(host.connections()) == 1
        await our.is_left_by(they)


async def two_hundred_streams(host, peer):
    async def one(number):
        payload = bytes([number % 256]) * 1000
        stream = await host.open_stream(peer, ECHO)
        assert await round_trip(stream, payload) == payload
        await stream.close_write()  # they close their side when they see the end of ours
        assert await stream.read(1) == b""

    async with asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(one(number))


async def test_pushes_both_ways(outside):
    async with outside.run("listen") as they, us(3) as our:
        await our.host.connect(None, addresses(await they.line()))
        await our.until(lambda info: info.agent)
        our.host.handle("/ours/new/1.0.0", answer_echo)
        assert await they.do("knows:/ours/new/1.0.0") == {"knows": "/ours/new/1.0.0"}
        before = set((await they.do("book"))["certified"])
        another = await our.host.listen(Multiaddr.parse("/ip4/127.0.0.1/tcp/0"))
        our.host.handle("/ours/newer/1.0.0", answer_echo)
        await they.do("knows:/ours/newer/1.0.0")
        assert set((await they.do("book"))["certified"]) == {*before, str(another)}
        await they.do("push:/theirs/new/1.0.0")
        await our.until(lambda info: "/theirs/new/1.0.0" in info.protocols)


@pytest.mark.parametrize("kind", ["RSA", "secp256k1"])
async def test_identities_of_other_kinds(outside, kind):
    """Their handshake and signed record with such a key, in both roles of the handshake.

    Neither can have an ECDSA identity: for that see tests/protocol/test_foreign_identities.py.
    """
    async with outside.run("listen", "--key", kind) as they, us(4) as dialing, us(5) as dialed:
        ready = await they.line()
        addrs = addresses(ready)
        peer = PeerId.parse(ready["id"])
        await dialing.host.connect(peer, addrs)
        await they.do(f"connect:{dialed.host.listen_addrs[0]}")
        for our in (dialing, dialed):
            info = await our.until(lambda info: info.certified)
            assert our.wire.remote == peer
            assert our.wire._connection._handshake.remote_key.type is KeyType[kind.upper()]
            assert info.certified == tuple(address.without_peer() for address in addrs)
            assert 0 < await our.host.ping(peer) < PATIENCE_S


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_ipv6_and_names(outside):
    listen = [Multiaddr.parse("/ip6/::1/tcp/0")]
    async with outside.run("listen", "--host", "::1") as they, us(6) as dialing, us(7, listen=listen) as dialed:
        ready = await they.line()
        await dialing.host.connect(None, addresses(ready))
        await they.do(f"connect:{dialed.host.listen_addrs[0]}")
        for our in (dialing, dialed):
            await our.until(lambda info: info.agent)
            assert our.wire.remote == PeerId.parse(ready["id"])
            assert our.wire.address.ip.version == 6


async def test_names_and_the_wrong_identity(outside):
    stranger = PrivateKey.from_seed(bytes(32)).peer_id
    async with outside.run("listen") as they, us(8) as our:
        ready = await they.line()
        (address,) = addresses(ready)
        with pytest.raises(PeerUnreachable, match=f"the peer is {ready['id']}, not the expected {stranger}"):
            await our.host.connect(stranger, [address.with_peer(stranger)])
        for kind in ("dns", "dns4"):
            named = Multiaddr.parse(f"/{kind}/localhost/tcp/{address.port}/p2p/{ready['id']}")
            assert await our.host.connect(None, [named]) == PeerId.parse(ready["id"])
            await our.host.disconnect(our.wire.remote)


@pytest.fixture
def their_pings(monkeypatch):
    """How many keepalive pings came, in a list."""
    came = []
    plain = Session._ping_frame

    def counting(session, flags, opaque, events):
        if flags & Flag.SYN:
            came.append(opaque)
        plain(session, flags, opaque, events)

    monkeypatch.setattr(Session, "_ping_frame", counting)
    return came


async def quiet_connection(outside, our, their_pings, hurry, count):
    """Wait until keepalives of both sides came and were answered that often; all must be as before."""
    async with outside.run("listen", *hurry) as they:
        peer = await our.host.connect(None, addresses(await they.line()))
        await our.until(lambda info: info.agent)
        before = our.wire
        async with asyncio.timeout(300):
            while our.wire.life.pongs < count or len(their_pings) < count:  # noqa: ASYNC110 - nothing tells of pings
                await asyncio.sleep(0.01)
        assert 0 < await our.host.ping(peer) < PATIENCE_S
        assert await they.do("echo:1000") == {"echo": True}
        assert our.wire is before
        assert our.host.refused == {}


async def test_a_quiet_connection_lives_on(outside, monkeypatch, their_pings):
    """Dozens of keepalives of both sides in a few seconds."""
    monkeypatch.setattr(wire, "KEEPALIVE_S", 0.05)
    async with us(10) as our:
        await quiet_connection(outside, our, their_pings, ("--hurry", "50"), 30)


@pytest.mark.slow
async def test_a_quiet_connection_lives_on_for_minutes(outside, their_pings):
    """Two minutes: five keepalives of theirs, one every 30 s, while ours come every 15 s."""
    async with us(11) as our:
        await quiet_connection(outside, our, their_pings, (), 5)
