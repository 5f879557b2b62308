"""Each router is of the kind it claims, found out from outside as RFC 5780 does it."""

import contextlib
import socket

import pytest
from lab.nat import Nat, NatWorld

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("leakproof")]

PATIENCE_S = 10.0
SILENCE_S = 0.2
"""A refusal arrives in well under a millisecond here; what takes this long was dropped."""


def udp(space, address=""):
    sock = space.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE_S)
    sock.bind((address, 0))
    return sock


def probe(world, number=0):
    """(address seen is the client's own, one mapping for two destinations, strangers get through)"""
    client = world.clients[number]
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(udp(client))
        first, second, stranger = (
            stack.enter_context(udp(world.relay, address))
            for address in (world.relay.addresses[0], world.relay.addresses[1], world.relay.addresses[1])
        )
        seen = []
        for server in (first, second):
            here.sendto(b"hello", server.getsockname())
            seen.append(server.recvfrom(100)[1])
        stranger.sendto(b"stranger", seen[0])
        first.sendto(b"known", seen[0])  # comes after, if the other comes at all
        strangers = here.recv(100) == b"stranger"
        own = (client.address, here.getsockname()[1])
    return seen[0] == own, seen[0] == seen[1], strangers


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Nat.OPEN, (True, True, True)),
        (Nat.FULL, (False, True, True)),
        (Nat.CONE, (False, True, False)),
        (Nat.SYMMETRIC, (False, False, False)),
        (Nat.RST, (False, True, False)),
    ],
)
def test_mapping_and_filtering(lab, kind, expected):
    assert probe(NatWorld(lab, [kind])) == expected


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (Nat.OPEN, ConnectionRefusedError),
        (Nat.FULL, ConnectionRefusedError),
        (Nat.CONE, TimeoutError),
        (Nat.SYMMETRIC, TimeoutError),
        (Nat.RST, ConnectionRefusedError),
    ],
)
def test_what_a_stranger_hears_on_tcp(lab, kind, answer):
    world = NatWorld(lab, [kind])
    with world.relay.socket() as sock:
        sock.settimeout(SILENCE_S)
        with pytest.raises(answer):
            sock.connect((world.routers[0].address, 9))


def test_every_client_reaches_the_relay_over_tcp(lab):
    world = NatWorld(lab, [Nat.OPEN, Nat.CONE, Nat.SYMMETRIC], rate_mbit=100)
    with world.relay.socket() as server:
        server.bind((world.relay.address, 0))
        server.listen()
        server.settimeout(PATIENCE_S)
        for client in world.clients:
            with client.socket() as sock:
                sock.settimeout(PATIENCE_S)
                sock.connect(server.getsockname())
                server.accept()[0].close()
    with udp(world.clients[1]) as one, udp(world.clients[0]) as two:  # an open client is public for the others too
        one.sendto(b"across", (world.clients[0].address, two.getsockname()[1]))
        assert two.recv(10) == b"across"
