"""Whole nodes behind NATs: they hold places at relays of the swarm, meet there, and outlive the relays."""

import asyncio
import io
import json
import random
from dataclasses import asdict

import pytest
from helpers.internet import Internet
from swarmnode.node.console import Console
from swarmnode.node.node import Node
from swarmnode.node.observe import report
from swarmnode.node.observed import show_connections, show_relaying
from swarmnode.node.relay.keeper import Turn
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.relay import CircuitAddress
from swarmnode.protocol.verdict import Reach

pytestmark = pytest.mark.virtual

ECHO = "/test/echo/1.0.0"
SOON_S = 10.0


@pytest.fixture
async def internet(tmp_path):
    async with Internet(7, tmp_path) as made:
        yield made


async def echo(stream):
    while data := await stream.read(65536):
        await stream.write(data)


async def public(internet, count):
    """Nodes that relay for others."""
    doors = [await internet.node(relay="on")]
    doors += [await internet.node(doors[0], relay="on") for _ in range(count - 1)]
    return doors


def relays_of(node: Node):
    return {CircuitAddress.of(Multiaddr.parse(text)).relay for text in node.relaying.status().places}


async def until(condition):
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - conditions of several nodes
            await asyncio.sleep(0.01)


async def test_a_hidden_node_finds_two_relays_by_itself(internet):
    doors = await public(internet, 5)
    hidden = await internet.node(doors[0], private=True, reachability="private")
    await until(lambda: len(relays_of(hidden)) == 2)
    assert relays_of(hidden) <= {door.peer_id for door in doors}
    assert all(text in map(str, hidden.addrs) for text in hidden.relaying.status().places)
    serving = [door.relaying.status().serves for door in doors]
    assert sum(status.reservations for status in serving) == 2
    assert (await hidden.status()).relaying.serves is None


async def test_hidden_nodes_meet_and_outlive_relay_after_relay(internet):
    doors = await public(internet, 5)
    one, two = [await internet.node(*doors[:2], private=True, reachability="private") for _ in range(2)]
    two.host.handle(ECHO, echo)
    await until(lambda: len(relays_of(one)) == len(relays_of(two)) == 2)
    rng = random.Random(0)
    for _ in range(3):
        places = [Multiaddr.parse(text) for text in two.relaying.status().places]
        await one.host.connect(two.peer_id, places)
        (info,) = [info for info in one.host.connections() if info.peer == two.peer_id]
        assert info.relayed
        stream = await one.host.open_stream(two.peer_id, ECHO)
        payload = rng.randbytes(100_000)
        async with asyncio.TaskGroup() as group:
            group.create_task(stream.write(payload))
            assert await stream.read_exactly(len(payload)) == payload
        used = CircuitAddress.of(info.address).relay
        await internet.kill(next(door for door in doors if door.peer_id == used))
        doors = [door for door in doors if door.peer_id != used]
        with pytest.raises(OSError, match="connection"):
            await stream.read(1)
        await until(lambda used=used: used not in relays_of(two) and len(relays_of(two)) == 2)


async def test_the_verdict_decides_both_ways(internet):
    doors = await public(internet, 3)
    node = await internet.node(doors[0], relay="auto")
    events = []
    node.relaying.on_place(lambda event: events.append(event.turn))
    assert node.relaying.status().serves is None  # an address in memory is no public one
    node.relaying.set_reach(Reach.PUBLIC)
    await until(lambda: node.relaying.status().serves is not None)
    node.relaying.set_reach(Reach.PRIVATE)
    await until(lambda: node.relaying.status().serves is None and len(relays_of(node)) == 2)
    node.relaying.set_reach(Reach.PUBLIC)
    await until(lambda: node.relaying.status().serves is not None and not relays_of(node))
    assert events == [Turn.GAINED, Turn.GAINED, Turn.LOST, Turn.LOST]
    assert not any(addr.is_relayed for addr in node.addrs)


async def test_what_status_says(internet):
    (door,) = await public(internet, 1)
    hidden = await internet.node(door, private=True, relays=[str(door.addrs[0])])
    (place,) = hidden.relaying.status().places
    assert said(hidden) == f"  relayed at {place}\n"
    assert said(door) == "  relay: 1 places taken, 0 circuits open of 0, 0 B passed on, 0 refused\n"
    connections = io.StringIO()
    one = await internet.node(door, private=True)
    await one.host.connect(None, [Multiaddr.parse(place)])
    rows = [row | {"rate_in": 0.0, "rate_out": 0.0} for row in report(one.host, connections=True)["connections"]]
    body = report(one.host, connections=True) | {"connections": rows}
    show_connections(body, Console(out=connections))
    assert {line.split()[2] for line in connections.getvalue().splitlines()[2:4]} == {"direct", "relayed"}


def said(node):
    out = io.StringIO()
    show_relaying(json.loads(json.dumps(asdict(node.relaying.status()))), Console(out=out))
    return out.getvalue()


async def test_off_is_off(internet):
    (door,) = await public(internet, 1)
    node = await internet.node(door, relay="off", reachability="public")
    await asyncio.sleep(5)
    assert node.relaying.status().serves is None


async def test_named_relays_are_held_whatever_the_verdict(internet):
    doors = await public(internet, 3)
    named = [str(doors[2].addrs[0])]
    node = await internet.node(doors[0], relays=named)
    assert relays_of(node) == {doors[2].peer_id}  # before others hear that it is ready
    node.relaying.set_reach(Reach.PUBLIC)
    await asyncio.sleep(1)
    assert relays_of(node) == {doors[2].peer_id}
