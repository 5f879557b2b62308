"""Dialing from the listening port: what the other side sees, and what happens where that port cannot be used."""

import asyncio

import pytest
from helpers.hosts import tcp_host
from swarmnode.protocol.errors import PeerUnreachable

pytestmark = [pytest.mark.loops, pytest.mark.usefixtures("leakproof")]

PATIENCE_S = 20


async def test_the_other_side_sees_the_listening_port():
    async with tcp_host(1) as one, tcp_host(2) as two:
        one.dial_from_listener(lambda _: True)
        came = asyncio.Event()
        two.on_connect(lambda _: came.set())
        await one.connect(two.peer_id, two.listen_addrs)
        async with asyncio.timeout(PATIENCE_S):
            await came.wait()
        (here,), (there,) = one.wires, two.wires
        assert here.from_listener
        assert there.address == one.bound_addrs[0]


async def test_a_second_connection_takes_a_port_of_its_own():
    """The same four numbers cannot be used twice: the dial goes on from another port, and nobody notices."""
    async with tcp_host(1) as one, tcp_host(2) as two:
        one.dial_from_listener(lambda _: True)
        await one.connect(two.peer_id, two.listen_addrs)
        await one._dialer.dial(two.peer_id, two.listen_addrs, PATIENCE_S)
        assert sorted(wire.from_listener for wire in one.wires) == [False, True]


async def test_without_a_listener_a_port_of_its_own_does():
    async with tcp_host(1, listen=[]) as one, tcp_host(2) as two:
        one.dial_from_listener(lambda _: True)
        await one.connect(two.peer_id, two.listen_addrs)
        (wire,) = one.wires
        assert not wire.from_listener


async def test_a_refusal_is_not_asked_for_twice():
    async with tcp_host(1) as one:
        async with tcp_host(2) as two:
            gone, addrs = two.peer_id, two.listen_addrs
        one.dial_from_listener(lambda _: True)
        with pytest.raises(PeerUnreachable, match="refused"):
            await one.connect(gone, addrs)
        assert len(one.dial_failures()) == 1


async def test_dials_back_never_come_from_the_listening_port():
    async with tcp_host(1) as one, tcp_host(2) as two:
        one.dial_from_listener(lambda _: True)
        wire = await one.dial_anew(two.peer_id, two.bound_addrs[0])
        assert not wire.from_listener
        (there,) = two.wires
        assert there.address != one.bound_addrs[0]
        await wire.aclose()
