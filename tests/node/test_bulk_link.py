"""Bulk connections over an emulated 40 ms path: each socket has the congestion control it should, at both ends."""

import asyncio
import contextlib
import functools
import random
import socket

import pytest
from helpers.hosts import key
from swarmnode.node.host import Host
from swarmnode.node.transport import bbr, tcp
from swarmnode.node.transport.tcp import TcpTransport
from swarmnode.protocol.multiaddr import Multiaddr

pytestmark = [pytest.mark.netns, pytest.mark.loops, pytest.mark.usefixtures("leakproof")]

SINK = "/test/sink/1.0.0"


async def sink(stream):
    while await stream.read(1 << 16):
        pass


def host_in(space, number):
    """A host whose sockets are in a namespace, in this process."""
    address = Multiaddr.parse(f"/ip4/{space.address}/tcp/0")
    transport = TcpTransport(space.socket)
    return Host(key(number), listen=[address], transports=[transport], rng=random.Random(number))


@contextlib.asynccontextmanager
async def connected(lab, **path):
    link = lab.wan(**path)
    async with host_in(link.a, 1) as one, host_in(link.b, 2) as two:
        for host in (one, two):
            host.handle(SINK, sink)
        known = asyncio.Event()
        one.on_identify(lambda _: known.set())
        await one.connect(two.peer_id, two.listen_addrs)
        await known.wait()
        yield one, two


@functools.cache
def first_of(wanted):
    """The one of a list that this system gives us."""
    with socket.socket() as sock:
        tcp.control_congestion(sock, wanted)
        return congestion(sock)


def congestion(sock):
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


def controls(host):
    """Congestion control of every connection, by its kind."""
    found = {}
    for wire in host._wires:
        found.setdefault(wire.bulk, set()).add(congestion(wire.socket))
    return found


async def test_each_connection_has_its_congestion_control_at_both_ends(lab):
    async with connected(lab, delay_ms=20) as (one, two):
        heavy = await one.open_stream(two.peer_id, SINK, bulk=True)
        light = await one.open_stream(two.peer_id, SINK)
        assert heavy.wire is not light.wire
        expected = {False: {first_of(tcp.LATENCY)}, True: {first_of(tcp.BULK)}}
        assert expected[False] != expected[True]
        assert controls(one) == controls(two) == expected


@pytest.mark.slow
async def test_bbr_leaves_its_start_where_the_send_buffer_is_too_small_for_that(lab):
    async with connected(lab, delay_ms=50, rate_mbit=100) as (one, two):
        heavy = await one.open_stream(two.peer_id, SINK, bulk=True)
        if congestion(heavy.wire.socket) != b"bbr":
            pytest.skip("no BBR here")

        async def pump():
            while True:
                await heavy.write(bytes(1 << 20))

        async def settled():
            while bbr.startup_bandwidth(heavy.wire.socket) is None:  # noqa: ASYNC110 - the kernel does not call us
                await asyncio.sleep(0.05)
            while bbr.startup_bandwidth(heavy.wire.socket) is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

        pumping = asyncio.get_running_loop().create_task(pump())
        async with asyncio.timeout(60):
            await settled()
        pumping.cancel()
        heavy.reset()
        await asyncio.gather(pumping, return_exceptions=True)
