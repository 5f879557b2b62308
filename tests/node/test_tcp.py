"""Loopback TCP on both loops: options, listening errors, dialing by name, death of a process, hostile
strangers."""

import asyncio
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from helpers.hosts import LOOPBACK, hosts, key, tcp_host
from swarmnode.node.host import Host, HostLimits
from swarmnode.node.transport import tcp
from swarmnode.node.transport.base import ConnectionClosed
from swarmnode.protocol.errors import ConfigError, PeerUnreachable
from swarmnode.protocol.multiaddr import Multiaddr

pytestmark = [pytest.mark.loops, pytest.mark.usefixtures("leakproof")]

ECHO = "/test/echo/1.0.0"


async def echo(stream):
    while data := await stream.read(65536):
        await stream.write(data)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def test_ping_and_connections():
    async with hosts("tcp", 2) as (one, two):
        await one.connect(two.peer_id)
        assert 0 < await one.ping(two.peer_id) < 1
        (info,) = one.connections()
        assert info.address == two.listen_addrs[0].without_peer()
        assert info.bytes_in > 0
        assert info.bytes_out > 0


async def test_port_in_use_names_port_and_fix():
    async with tcp_host(1) as one:
        taken = one.listen_addrs[0].without_peer()
        with pytest.raises(ConfigError, match=f"port {taken.port} is in use; choose another"):
            async with Host(key(2), listen=[taken]):
                pass


async def test_a_foreign_address_and_a_name_cannot_be_listened_on():
    async with tcp_host(1) as one:
        with pytest.raises(ConfigError, match="not an address of this machine"):
            await one.listen(Multiaddr.parse("/ip4/192.0.2.7/tcp/0"))
        with pytest.raises(ConfigError, match="cannot listen on /dns4/localhost/tcp/1"):
            await one.listen(Multiaddr.parse("/dns4/localhost/tcp/1"))


async def test_a_wildcard_is_expanded():
    async with tcp_host(1, listen=[Multiaddr.parse("/ip4/0.0.0.0/tcp/0")]) as one:
        addresses = one.listen_addrs
        assert all(not address.is_unspecified and address.port for address in addresses)
        assert any(address.is_loopback for address in addresses)


async def test_dialing_by_name():
    async with hosts("tcp", 2) as (one, two):
        port = two.listen_addrs[0].port
        await one.connect(two.peer_id, [Multiaddr.parse(f"/dns4/localhost/tcp/{port}")])
        with pytest.raises(PeerUnreachable, match=r"nowhere\.invalid"):
            await one.connect(key(9).peer_id, [Multiaddr.parse("/dns4/nowhere.invalid/tcp/1")])


async def test_nobody_listens():
    async with tcp_host(1) as one:
        address = Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{free_port()}")
        with pytest.raises(PeerUnreachable, match=f"{address}: connection refused; check the address"):
            await one.connect(None, [address])


async def test_ipv6_when_there_is_some():
    try:
        async with hosts("tcp", 2, listen=[Multiaddr.parse("/ip6/::1/tcp/0")]) as (one, two):
            await one.connect(two.peer_id)
    except ConfigError:
        pytest.skip("no IPv6 loopback here")


async def test_a_silent_stranger_and_a_chatty_one_are_cut():
    limits = HostLimits(handshake_timeout_s=0.2)
    async with tcp_host(1, limits=limits) as one:
        port = one.listen_addrs[0].port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""  # cut by the deadline
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 100)
        assert await reader.read() == b""
        writer.close()
        assert one.connections() == []


async def test_options_are_set_before_connect():
    with socket.socket() as sock:
        tcp.tune(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        if sys.platform == "linux":
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == tcp.USER_TIMEOUT_MS
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == tcp.NOTSENT_LOWAT


class Choosy:
    """A socket of a system that offers some congestion controls only."""

    def __init__(self, *offered):
        self.offered = offered
        self.chosen = None

    def setsockopt(self, level, option, value):
        if value not in self.offered:
            raise PermissionError(1, "Operation not permitted")
        self.chosen = value


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="not offered by this system")
async def test_congestion_control_is_the_best_to_be_had():
    for offered, latency, bulk in [
        ((b"reno", b"cubic", b"bbr"), b"cubic", b"bbr"),
        ((b"reno", b"bbr"), b"reno", b"bbr"),  # what an unprivileged process is often left with
        ((b"cubic",), b"cubic", b"cubic"),
        ((), None, None),
    ]:
        for wanted, expected in ((tcp.LATENCY, latency), (tcp.BULK, bulk)):
            sock = Choosy(*offered)
            tcp.control_congestion(sock, wanted)
            assert sock.chosen == expected


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="not offered by this system")
@pytest.mark.parametrize("listen", ["/ip4/127.0.0.1/tcp/0", "/ip4/0.0.0.0/tcp/0"])
async def test_dialing_from_the_listening_port(listen):
    async with hosts("tcp", 2) as (_, two):
        transport = tcp.TcpTransport()
        listener = await transport.listen(Multiaddr.parse(listen), lambda _: asyncio.BufferedProtocol())
        links = []

        class Link(asyncio.BufferedProtocol):
            def connection_made(self, link):
                links.append(link)

        await transport.dial(two.listen_addrs[0].without_peer(), lambda _: Link(), from_listener=True)
        assert links[0].get_extra_info("sockname") == ("127.0.0.1", listener.address.port)
        # and all the while nobody else gets the port by accident
        with pytest.raises(ConfigError, match="is in use"):
            await tcp.TcpTransport().listen(listener.address, lambda _: asyncio.BufferedProtocol())
        links[0].abort()
        await listener.aclose()
        await listener.aclose()
        with pytest.raises(OSError, match="no listening port"):
            await transport.dial(two.listen_addrs[0].without_peer(), lambda _: Link(), from_listener=True)


CHILD = """
    import asyncio, sys
    from swarmnode.node.host import Host
    from swarmnode.protocol.ids import PrivateKey
    from swarmnode.protocol.multiaddr import Multiaddr

    async def hold(stream):
        await stream.write(b"!")
        await stream.read(1)

    async def main():
        async with Host(PrivateKey.from_seed(bytes(32)), listen=[Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]) as host:
            host.handle("/hold", hold)
            print(host.listen_addrs[0], flush=True)
            await asyncio.Event().wait()

    asyncio.run(main())
"""


async def test_kill_9_is_noticed_at_once_by_every_stream():
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", textwrap.dedent(CHILD), stdout=subprocess.PIPE
    )
    try:
        address = Multiaddr.parse((await child.stdout.readline()).decode().strip())
        async with tcp_host(1) as one:
            peer = await one.connect(None, [address])
            gone = asyncio.Event()
            one.on_disconnect(lambda _: gone.set())
            streams = [await one.open_stream(peer, "/hold") for _ in range(10)]
            for stream in streams:
                await stream.read_exactly(1)
            reads = [asyncio.get_running_loop().create_task(stream.read(1)) for stream in streams]
            await asyncio.sleep(0)
            start = time.monotonic()
            child.kill()
            results = await asyncio.gather(*reads, return_exceptions=True)
            took = time.monotonic() - start
            assert all(isinstance(result, ConnectionClosed) for result in results)
            assert gone.is_set()
            # 50 ms is the promise on a quiet machine; tests share theirs
            assert took < 1
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def test_connections_per_ip_do_not_count_loopback():
    async with hosts("tcp", 4, limits=HostLimits(connections_per_ip=1)) as (one, *others):
        for other in others:
            await other.connect(one.peer_id)
        assert len(one.connections()) == 3


async def test_loopback_needs_no_bulk_connections_however_slow():
    async with hosts("tcp", 2) as (one, two):
        identified = asyncio.Event()
        one.on_identify(lambda _: identified.set())
        await one.connect(two.peer_id)
        await identified.wait()
        for wire in one._wires:
            wire.life.rtt_min_s = 1.0
        assert one.bulk_lanes(two.peer_id) == 1
        two.handle("/echo", echo)
        assert not (await one.open_stream(two.peer_id, "/echo", bulk=True)).wire.bulk


async def test_listening_stops_with_the_host():
    async with tcp_host(1, listen=[LOOPBACK]) as one:
        address = one.listen_addrs[0]
    async with tcp_host(2) as two:
        with pytest.raises(PeerUnreachable):
            await two.connect(None, [address])
