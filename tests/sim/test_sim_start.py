"""Many nodes that start together on too few processors: answers come late, and everybody must find everybody soon."""

import pytest
from sim.latency import Busy
from sim.network import Network
from sim.population import nearest

COUNT = 30
NEAREST = 19


def gaps(nodes):
    """Pairs of a node and one of its nearest that it does not name."""
    found = []
    for node in nodes:
        near = nearest([one for one in nodes if one is not node], node.peer.raw, NEAREST)
        named = {contact.peer for contact in node.dht.table.closest(node.peer.kad_key, NEAREST)}
        found += [(node, other) for other in near if other.peer not in named]
    return found


def crowd(seed, hold_up_s, lasts_s):
    """Thirty nodes join through the first within `lasts_s`, while messages are held up."""
    latency = Busy(hold_up_s)
    network = Network(seed, latency=latency, encode=False)
    nodes = [network.add()]
    network.run(1)
    start = network.now
    for _ in range(COUNT - 1):
        network.at(start + lasts_s * network.rng.random(), lambda: nodes.append(network.add(nodes[0])))
    network.run(lasts_s)
    latency.hold_up_s = 0.0
    return network, nodes


@pytest.mark.parametrize("hold_up_s", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_thirty_find_each_other_within_ten_seconds(seed, hold_up_s):
    network, nodes = crowd(seed, hold_up_s, 5.0)
    network.run(10.0)
    assert len(nodes) == COUNT
    assert gaps(nodes) == []


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_even_when_most_answers_came_too_late(seed):
    network, nodes = crowd(seed, 2.0, 20.0)
    assert len(gaps(nodes)) > 30
    network.run(30.0)
    assert gaps(nodes) == []
