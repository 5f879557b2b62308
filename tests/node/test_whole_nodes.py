"""Whole nodes on an internet in memory, under a virtual clock: hours in seconds, and the same every time."""

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from helpers.hosts import held
from helpers.internet import Internet
from helpers.virtual import VirtualLoop
from swarmnode.node.transport.wire import KEEPALIVE_S, MISSED_PINGS
from swarmnode.protocol.errors import PeerUnreachable

NOTICED_S = KEEPALIVE_S * (MISSED_PINGS + 1)
"""A peer that fell silent is given up within this (docs/spec/transport.md)."""
KEY = b"k" * 32
SETTLE_S = 60.0
HEALED_S = 60.0
"""After a partition every node finds what every other one announced within this: republication takes 40 s."""
FEW = 12
SLACK = 8
"""Requests that may be under way when things are counted."""
MANY = pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(300)])


@pytest.fixture
async def internet(tmp_path):
    async with Internet(1, tmp_path) as internet:
        yield internet


async def swarm(internet, count):
    """Nodes that join one after another, each through two of those before."""
    nodes = []
    for _ in range(count):
        doors = internet.rng.sample(nodes, min(2, len(nodes)))
        nodes.append(await internet.node(*doors))
    await asyncio.sleep(SETTLE_S)
    return nodes


async def publish(nodes):
    """Each node announces its number under one key."""
    await asyncio.gather(*(node.discovery.publish(KEY, bytes([n])) for n, node in enumerate(nodes)))


async def found(node):
    """The numbers announced, as a node sees them now."""
    return sorted(entry.payload[0] for entry in await node.discovery.lookup(KEY, fresh=True))


def known(node):
    """The peers in a node's routing table."""
    return {contact.peer for contact in node.discovery.peers()}


@pytest.mark.virtual
@pytest.mark.parametrize("count", [FEW, MANY])
async def test_nodes_form_a_dht_and_outlive_half_of_it(count, internet):
    nodes = await swarm(internet, count)
    assert all(len(known(node)) >= min(count - 1, 20) for node in nodes)
    await publish(nodes[: count // 2])
    for node in internet.rng.sample(nodes, 5):
        assert await found(node) == list(range(count // 2))
    for node in nodes[1::2]:
        await internet.power_off(node)
    left = nodes[::2]
    announced = [n for n in range(count // 2) if n % 2 == 0]
    await asyncio.sleep(240)  # what the dead announced has run out, who is dead is known
    for node in left:
        assert known(node) <= {other.peer_id for other in left}
        assert await found(node) == announced


@pytest.mark.virtual
@pytest.mark.parametrize(("count", "lasts_s"), [(8, 120), pytest.param(50, 300, marks=MANY.marks)])
async def test_a_partition_heals(count, lasts_s, internet):
    nodes = await swarm(internet, count)
    await publish(nodes)
    east, west = nodes[::2], nodes[1::2]
    internet.part(east, west)
    await asyncio.sleep(lasts_s)
    for number, node in enumerate(nodes):
        assert await found(node) == list(range(number % 2, count, 2))
    internet.heal(east, west)
    await asyncio.sleep(HEALED_S)
    for node in nodes:
        assert await found(node) == list(range(count))


@pytest.mark.virtual
async def test_silence_shorter_than_the_keepalive_is_not_noticed(internet, clock):
    nodes = await swarm(internet, FEW)
    before = [node.host.connections() for node in nodes]
    dials = internet.network.dials
    internet.part(nodes[:1], nodes[1:])
    waiting = [asyncio.create_task(other.host.ping(nodes[0].peer_id, timeout_s=60)) for other in nodes[1:]]
    start = clock.now()
    await asyncio.sleep(KEEPALIVE_S)
    assert not any(task.done() for task in waiting)
    internet.heal(nodes[:1], nodes[1:])
    for took in await asyncio.gather(*waiting):
        assert KEEPALIVE_S <= took < KEEPALIVE_S + 1.0
    assert clock.now() - start < KEEPALIVE_S + 1.0
    for old, node in zip(before, nodes, strict=True):
        assert {i.opened_at for i in old} <= {i.opened_at for i in node.host.connections()}
    assert internet.network.dials == dials


@pytest.mark.virtual
@pytest.mark.parametrize("death", ["kill", "power_off"])
async def test_deaths_are_noticed_in_time(death, internet, clock):
    nodes = await swarm(internet, FEW)
    victim, others = nodes[3], [node for node in nodes if node is not nodes[3]]
    watching = [node for node in others if node.host.is_connected(victim.peer_id)]
    assert len(watching) > FEW // 2
    noticed = []
    for node in watching:
        node.host.on_disconnect(lambda peer: peer == victim.peer_id and noticed.append(clock.now()))
    start = clock.now()
    await getattr(internet, death)(victim)
    stopped = clock.now()
    await asyncio.sleep(NOTICED_S)
    assert len(noticed) == len(watching)
    if death == "kill":
        assert max(noticed) - start < 0.2
    else:
        assert min(noticed) - stopped > KEEPALIVE_S * (MISSED_PINGS - 1)
        assert max(noticed) - start <= NOTICED_S


@pytest.mark.virtual
async def test_an_idle_hour_costs_nothing_that_stays(internet, clock):
    nodes = await swarm(internet, 4)
    await publish(nodes)
    await asyncio.sleep(600)
    tasks, things, dials = len(asyncio.all_tasks()), await census_of_a_round(), internet.network.dials
    start = clock.now()
    await asyncio.sleep(3600)
    assert clock.now() == start + 3600
    assert internet.network.dials == dials, "connections were made anew"
    for node in nodes:
        assert len(node.host.peers()) == len(nodes) - 1
        for other in nodes:
            if other is not node:
                assert node.host.rtt(other.peer_id) == pytest.approx(internet.rtt_s(node, other), abs=0.001)
    assert await found(nodes[0]) == list(range(4))
    await asyncio.sleep(90)
    assert len(asyncio.all_tasks()) <= tasks + SLACK
    now = await census_of_a_round()
    assert all(now[kind] <= things[kind] + SLACK for kind in now), (things, now)


async def census_of_a_round():
    """The most of each at any time until everything has been announced anew; timers of exchanges pass by in dozens."""
    most = Counter()
    for _ in range(6):
        await asyncio.sleep(10)
        most |= census()
    return most


def census():
    """How many there are of the things a long life could pile up."""
    gc.collect()
    kinds = ("Wire", "MuxStream", "MuxedStream", "Task", "Future", "TimerHandle", "Contact", "_Link", "Event")
    return Counter(name for thing in gc.get_objects() if (name := type(thing).__name__) in kinds)


@pytest.mark.virtual
async def test_nodes_behind_nats_take_part_and_cannot_be_dialed(internet, clock):
    nodes = await swarm(internet, 6)
    hidden = [await internet.node(nodes[n], private=True) for n in range(3)]
    await asyncio.gather(*(node.discovery.publish(KEY, bytes([n])) for n, node in enumerate(hidden)))
    assert await found(nodes[5]) == await found(hidden[0]) == [0, 1, 2]
    await asyncio.sleep(SETTLE_S)
    for node in nodes:
        assert known(node) == {other.peer_id for other in nodes if other is not node}
    start = clock.now()
    with pytest.raises(PeerUnreachable, match="no answer"):
        await hidden[0].ping(str(hidden[1].addrs[0]))
    assert clock.now() - start == pytest.approx(10, abs=0.5)
    door = nodes[0]
    assert await door.host.ping(hidden[0].peer_id) == pytest.approx(internet.rtt_s(door, hidden[0]), abs=0.001)


@pytest.mark.virtual
async def test_looking_around_takes_the_paths_time(internet, clock):
    nodes = await swarm(internet, 4)
    for node in nodes[1:]:
        took = await nodes[0].ping(str(node.addrs[0]))
        assert took == pytest.approx(internet.rtt_s(nodes[0], node), abs=0.001)
        assert await nodes[0].info(node.peer_id, bytes(32)) is None
    status = await nodes[0].status()
    assert (status.peers, status.known_nodes, status.spans) == (3, 3, ())


@pytest.mark.virtual
async def test_what_leaves_is_forgotten_at_once(internet):
    nodes = await swarm(internet, 6)
    await publish(nodes)
    await nodes[2].drain()
    await internet.stop(nodes[2])
    assert await found(nodes[0]) == [0, 1, 3, 4, 5]
    await asyncio.sleep(15)
    for node in internet.nodes:
        assert "crashes" not in held(node.host)
        assert nodes[2].peer_id not in node.host.peers()


# The same seed, the same history


async def history(seed, home):
    """Some minutes of a small swarm in which everything happens; (digest, events)."""
    async with Internet(seed, home) as internet:
        nodes = await swarm(internet, 6)
        await publish(nodes)
        hidden = await internet.node(nodes[0], private=True)
        internet.part(nodes[:2], nodes[2:])
        await asyncio.sleep(NOTICED_S)
        await internet.power_off(nodes[2])
        await internet.kill(nodes[3])
        internet.heal(nodes[:2], nodes[4:])
        await internet.node(nodes[4], nodes[1])
        await asyncio.sleep(120)
        await found(hidden)
        await nodes[1].drain()
        await asyncio.sleep(60)
    return internet.digest, internet.events


def run_history(seed):
    with tempfile.TemporaryDirectory() as home, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(history(seed, Path(home)))


def test_the_same_seed_is_the_same_history():
    first = run_history(1)
    assert first[1] > 1000
    assert run_history(1) == first
    assert run_history(2) != first


@pytest.mark.slow
def test_the_history_does_not_depend_on_the_process():
    command = [sys.executable, "-c", "from test_whole_nodes import run_history; print(run_history(1))"]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=100)
        assert done.stdout.strip() == str(run_history(1)), done.stderr
