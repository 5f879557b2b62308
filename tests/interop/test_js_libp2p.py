"""js-libp2p dials us and we dial it: ping, identify, echo, many streams, half-close, abrupt death."""

import asyncio
import random
from pathlib import Path

import pytest
from helpers import js_peer
from helpers.hosts import tcp_host
from swarmnode.node.transport.base import ConnectionClosed, ProtocolUnsupported
from swarmnode.protocol.errors import PeerUnreachable
from swarmnode.protocol.ids import PeerId, PrivateKey
from swarmnode.protocol.multiaddr import Multiaddr

pytestmark = [
    pytest.mark.interop_js,
    pytest.mark.skipif(js_peer.npm() is None, reason="npm is not installed"),
    pytest.mark.timeout(360),
]

BUILD = Path(__file__).parent.parent.parent / "build" / "interop_js"
ECHO = js_peer.ECHO


@pytest.fixture(scope="session")
def folder():
    return js_peer.install(BUILD)


async def echo(stream):
    """The listener's half of the js peer's echo protocol."""
    while True:
        header = await stream.read_exactly(5)
        size = int.from_bytes(header[1:], "big")
        payload = await stream.read_exactly(size)
        if header[0] == 0:
            await stream.write(header, payload)
        elif header[0] == 2:
            await stream.write(bytes(5))


async def round_trip(stream, payload):
    async with asyncio.TaskGroup() as group:
        group.create_task(stream.write(b"\0", len(payload).to_bytes(4, "big"), payload))
        await stream.read_exactly(5)
        return await stream.read_exactly(len(payload))


@pytest.mark.loops
async def test_we_dial_js(folder):
    async with js_peer.js_peer(folder, "listen") as js, tcp_host(1) as host:
        ready = await js.line()
        addrs = [Multiaddr.parse(text) for text in ready["addrs"]]
        peer = await host.connect(None, addrs)
        assert peer == PeerId.parse(ready["id"])
        identified = asyncio.Event()
        host.on_identify(lambda _: identified.set())
        if not host.book.get(peer).agent:
            await identified.wait()
        assert "js-libp2p" in host.book.get(peer).agent
        assert ECHO in host.book.get(peer).protocols
        for _ in range(4):  # js allows two ping streams at once: ours must end cleanly
            assert 0 < await host.ping(peer) < 5
        assert host.rtt(peer) is not None
        stream = await host.open_stream(peer, ECHO)
        for size in (0, 1, 70_000, 5_000_000):
            payload = random.Random(size).randbytes(size)
            assert await round_trip(stream, payload) == payload
        await stream.close()
        with pytest.raises(ProtocolUnsupported):
            await host.open_stream(peer, "/unknown/1.0.0")


async def test_js_dials_us(folder):
    async with tcp_host(2, agent="swarmnode/test") as host:
        host.handle(ECHO, echo)
        address = str(host.listen_addrs[0])
        secure = {"connected": True, "encryption": "/noise", "muxer": "/yamux/1.0.0"}
        for what, expected in (
            (("echo", "5000000"), {"echo": True}),
            (("streams", "200"), {"streams": True}),
        ):
            async with js_peer.js_peer(folder, "dial", address, *what) as js:
                assert await js.line() == secure
                assert await js.line() == expected
        async with js_peer.js_peer(folder, "dial", address, "ping") as js:
            await js.line()
            assert len((await js.line())["ping"]) == 3
        async with js_peer.js_peer(folder, "dial", address, "identify") as js:
            await js.line()
            said = await js.line()
            assert (said["id"], said["agent"]) == (str(host.peer_id), "swarmnode/test")
            assert ECHO in said["protocols"]
            assert said["addrs"] == [address.rsplit("/p2p/")[0]]
            assert said["observed"].startswith("/ip4/127.0.0.1/tcp/")


async def test_two_hundred_streams_to_js_at_once(folder):
    async with js_peer.js_peer(folder, "listen") as js, tcp_host(3) as host:
        ready = await js.line()
        peer = await host.connect(None, [Multiaddr.parse(text) for text in ready["addrs"]])
        await host.ping(peer)  # until its own upgrade has ended, js resets all but a few early streams

        async def one(number):
            payload = bytes([number % 256]) * 1000
            stream = await host.open_stream(peer, ECHO)
            assert await round_trip(stream, payload) == payload
            await stream.close_write()  # js closes its side when it sees the end of ours
            assert await stream.read(1) == b""

        async with asyncio.TaskGroup() as group:
            for number in range(200):
                group.create_task(one(number))
        assert len(host.connections()) == 1


async def test_killing_js_is_noticed_at_once(folder):
    async with js_peer.js_peer(folder, "listen") as js, tcp_host(4) as host:
        ready = await js.line()
        peer = await host.connect(None, [Multiaddr.parse(text) for text in ready["addrs"]])
        stream = await host.open_stream(peer, ECHO)
        await round_trip(stream, b"x")
        gone = asyncio.Event()
        host.on_disconnect(lambda _: gone.set())
        reading = asyncio.get_running_loop().create_task(stream.read(1))
        js.process.kill()
        with pytest.raises(ConnectionClosed):
            await reading
        assert gone.is_set()


async def test_the_wrong_identity_is_told(folder):
    stranger = PrivateKey.from_seed(bytes(32)).peer_id
    async with js_peer.js_peer(folder, "listen") as js, tcp_host(5) as host:
        ready = await js.line()
        addrs = [Multiaddr.parse(text).with_peer(stranger) for text in ready["addrs"]]
        with pytest.raises(PeerUnreachable, match=f"the peer is {ready['id']}, not the expected {stranger}"):
            await host.connect(stranger, addrs)
