"""A node in a process of its own under a flood, half-open and dribbling peers: its memory, and an honest peer."""

import asyncio
import contextlib
import sys

import pytest
from helpers.attackers import attack_tcp, data, opening
from helpers.besieged import MIB, besieged, mutes
from helpers.hosts import key, tcp_host
from swarmnode.protocol.connection import Connection
from swarmnode.protocol.errors import PeerUnreachable
from swarmnode.protocol.noise import StaticKey
from swarmnode.protocol.yamux_frames import INITIAL_WINDOW

pytestmark = [
    pytest.mark.loops,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

BUDGET = 128 * MIB
SLOW = 256


def this_loop():
    return "uvloop" if type(asyncio.get_running_loop()).__module__.startswith("uvloop") else "asyncio"


async def persist(node, honest):
    """An honest peer that tries again when it is refused, as all of ours do."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(PeerUnreachable, OSError):
                return await node.echo(honest)
            await asyncio.sleep(0.05)


async def assert_free(node, honest):
    """Nothing is held but what the honest peer itself needs."""
    async with asyncio.timeout(20):
        while True:
            status = await node.status(honest)
            used = status["used"]["system"]
            if used["connections"] == used["streams-in"] == 1:
                return status["refused"]
            await asyncio.sleep(0.05)


def first_flight():
    """What an honest dialer says first."""
    return Connection(StaticKey.create(key(8)), initiator=True).pull()


@pytest.mark.parametrize("flooding", [200, pytest.param(1000, marks=pytest.mark.slow)])
async def test_half_open_dribbling_and_flooding_strangers(flooding):
    async with besieged(this_loop(), handshake_grace_s=0.1, handshake_timeout_s=1.0) as node, tcp_host(1) as honest:
        await node.echo(honest)
        base = node.memory()
        await honest.disconnect(node.address.peer_id)
        slow = await mutes(node.port, SLOW, first_flight())
        for _ in range(10):
            for mute in slow:
                mute.dribble()
            await asyncio.sleep(0.01)
        await persist(node, honest)
        flood = await mutes(node.port, flooding)
        await node.echo(honest)
        await honest.disconnect(node.address.peer_id)
        await persist(node, honest)
        refused = await assert_free(node, honest)  # the flood is still there, as far as it is concerned
        assert node.memory("VmHWM") - base < BUDGET
        assert refused.get("transient-connections-in", 0) + refused.get("gave-way", 0) >= SLOW - 128
        assert refused["handshake-timeout"] >= 1
        for mute in (*slow, *flood):
            mute.link.abort()


async def test_proven_strangers_who_fill_what_they_can():
    async with besieged(this_loop(), streams_in=600) as node, tcp_host(1) as honest:
        await node.echo(honest)
        base = node.memory()
        party = [await attack_tcp(node.port, number) for number in range(10, 26)]
        for peer in party:
            for number in range(24):  # echoes that nobody reads: both windows fill
                peer.send(opening(2 * number + 1, "/test/echo/1.0.0"))
                peer.send(data(2 * number + 1, bytes(INITIAL_WINDOW // 2)))
            peer.link.write(b"\xff\xff" + bytes(60_000))  # and a frame that never ends
        await node.echo(honest)
        assert node.memory("VmHWM") - base < BUDGET
        status = await node.status(honest)
        assert status["used"]["system"]["connections"] == 1 + len(party)
        for peer in party:
            peer.link.abort()
        await assert_free(node, honest)
