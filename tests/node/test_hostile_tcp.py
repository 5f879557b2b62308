"""Hostile peers over real sockets, on both loops."""

import asyncio

import pytest
from helpers.attackers import PING, attack_tcp, opening, window
from helpers.hosts import tcp_host
from swarmnode.node.host import HostLimits
from swarmnode.node.transport import wire
from swarmnode.protocol.yamux_frames import Flag

pytestmark = pytest.mark.loops

ECHO = "/test/echo/1.0.0"


async def echo(stream):
    while data := await stream.read(65536):
        await stream.write(data)


async def test_a_peer_that_takes_nothing_is_cut(monkeypatch):
    monkeypatch.setattr(wire, "KEEPALIVE_S", 0.05)
    monkeypatch.setattr(wire, "MISSED_PINGS", 5)
    async with tcp_host(1) as host:
        ended = asyncio.Event()

        async def flood(stream):
            try:
                while True:
                    await stream.write(bytes(1 << 20))
            finally:
                ended.set()

        host.handle("/flood", flood)
        deaf = await attack_tcp(host.listen_addrs[0].port, 9)
        deaf.send(opening(1, "/flood") + window(1, 1 << 30))
        deaf.link.pause_reading()
        for _ in range(250):  # it answers pings though it never sees them: their numbers are no secret
            deaf.events.clear()
            for number in range(100):
                deaf.send(_pong(number))
            await asyncio.sleep(0.02)
            if ended.is_set():
                break
        await asyncio.wait_for(ended.wait(), 10)
        assert host.refused == {"stalled": 1}
        deaf.link.abort()
        await deaf.lost


def _pong(number):
    return PING[:2] + Flag.ACK.to_bytes(2, "big") + PING[4:8] + number.to_bytes(4, "big")


async def test_one_source_cannot_take_the_room_of_others():
    limits = HostLimits(
        limit_loopback=True, connections_per_ip=3, connections_per_subnet=5, handshakes=4, handshake_grace_s=100
    )
    async with tcp_host(1, limits=limits) as host, tcp_host(2) as honest:
        host.handle(ECHO, echo)
        ones = [await attack_tcp(host.listen_addrs[0].port, 9, source="127.0.1.1", speaks=False) for _ in range(4)]
        await ones[3].lost
        others = [await attack_tcp(host.listen_addrs[0].port, 9, source="127.0.1.2", speaks=False) for _ in range(3)]
        await others[2].lost
        assert host.refused == {
            "address-connections-in": 1,
            "transient-connections-in": 2,
        }
        honest.add_addrs(host.peer_id, host.listen_addrs)
        stream = await honest.open_stream(host.peer_id, ECHO)
        await stream.write(b"hello")
        assert await stream.read_exactly(5) == b"hello"
        await stream.close()
        assert host.refused["gave-way"] == 1
        assert sum(peer.is_cut for peer in ones) == 2
        for peer in (*ones, *others):
            peer.link.abort()


async def test_whoever_breaks_the_rules_is_let_in_less_often():
    limits = HostLimits(limit_loopback=True, connections_per_ip=20, accepts_per_ip=0.001)
    async with tcp_host(1, limits=limits) as host:
        for _ in range(4):
            rude = await attack_tcp(host.listen_addrs[0].port, 9, source="127.0.1.1", speaks=False)
            rude.link.write(b"GET / HTTP/1.1\r\n\r\n" * 100)
            await rude.lost
        assert host.refused == {"protocol-error": 3, "address-rate": 1}
