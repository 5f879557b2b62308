"""js-libp2p's AutoNAT, versions 1 and 2, in a network with public addresses: each side has the other dialed."""

import contextlib
import random

import pytest
from helpers import js_peer
from helpers.hosts import key
from helpers.outside import outside_peer
from swarmnode.node.host import Host
from swarmnode.node.nat.autonat import Answering, Asking
from swarmnode.node.transport.tcp import TcpTransport
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.verdict import Outcome

pytestmark = [pytest.mark.interop_js, pytest.mark.netns, pytest.mark.timeout(400)]

OURS, THEIRS = "44.7.7.1", "44.7.7.2"
"""js-libp2p dials no private addresses and no documentation ranges; here nobody else has these."""


@contextlib.asynccontextmanager
async def pair(lab, version):
    """A host of ours, its AutoNAT client, and a js peer, both listening."""
    if js_peer.npm() is None:
        pytest.skip("npm is not installed")
    try:
        folder = js_peer.install()
    except RuntimeError as exc:
        pytest.skip(f"cannot be installed here: {str(exc)[-300:]}")
    near, far = lab.space("near"), lab.space("far")
    near.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", far.name)
    for space, address in ((near, OURS), (far, THEIRS)):
        space.ip("address", "add", f"{address}/24", "dev", "eth0")
        space.ip("link", "set", "eth0", "up")
    words = ["node", "--import", "./polyfill.mjs", "node.mjs", "listen", "--host", THEIRS, "--autonat", version]
    host = Host(
        key(1),
        listen=[Multiaddr.parse(f"/ip4/{OURS}/tcp/4001")],
        transports=[TcpTransport(near.socket)],
        rng=random.Random(1),
    )
    async with host, outside_peer(far.command(words), cwd=folder, env=js_peer.environment()) as js:
        ready = await js.line()
        asking = Asking(host)
        asking.register()
        Answering(host, random.Random(0)).register()
        peer = PeerId.parse(ready["id"])
        await host.connect(peer, [Multiaddr.parse(text) for text in ready["addrs"]])
        yield host, asking, js, peer, ready["addrs"][0].partition("/p2p/")[0]


async def test_version_2(lab):
    async with pair(lab, "2") as (host, asking, js, peer, address):
        assert await asking.ask(peer, host.bound_addrs[0]) is Outcome.REACHED
        assert await asking.ask(peer, Multiaddr.parse(f"/ip4/{OURS}/tcp/4002")) is Outcome.FAILED
        assert await js.do(f"reachable:{address}") == {"reachable": address}, "by its own machinery, through us"
        closed = address.rpartition("/")[0] + "/9"
        assert await js.do(f"verify:{closed}") == {"success": 0, "failure": 1, "came": False}


async def test_version_2_charges_for_another_ip(lab):
    """An address of another machine costs dial data, from us to them and from them to us."""
    async with pair(lab, "2") as (_, asking, js, peer, _):
        assert await asking.ask(peer, Multiaddr.parse("/ip4/44.7.7.3/tcp/4001")) is Outcome.FAILED
        found = await js.do("verify:/ip4/44.7.7.3/tcp/4001")
        assert found == {"success": 0, "failure": 1, "came": False}


async def test_version_1(lab):
    """We answer. js-libp2p's own server tries the connection there is instead of dialing, and then closes that one."""
    async with pair(lab, "1") as (_, _, js, _, address):
        assert await js.do(f"verify:{address}") == {"success": 1, "failure": 0}
        assert await js.do("verify:" + address.rpartition("/")[0] + "/9") == {"success": 0, "failure": 1}
