"""How good look-ups are, against brute force and against the `kademlia` package's search on the same network."""

import pytest
from sim.scenarios import lookups, mean, size

RIVAL = {"name": "kademlia", "with": {"timeout_s": 1.0}}
"""A second instead of its five: our figures do not rest on its patience."""


def test_a_fifth_silently_dead_costs_little_and_hides_nobody():
    seen = lookups(200, 0.2, tries=25, rivals=(RIVAL,))
    ours, read, theirs = seen["locate"], seen["read"], seen["kademlia"]
    assert mean(ours.recalls) >= 0.97 > mean(theirs.recalls)
    assert mean(ours.rtts) < 5 < mean(theirs.rtts) / 2
    assert mean(read.recalls) >= 0.97
    assert mean(read.rtts) < 5
    assert mean(read.asked) < mean(theirs.asked)


def test_everybody_alive():
    seen = lookups(200, 0.0, tries=25, rivals=(RIVAL,))
    ours, theirs = seen["locate"], seen["kademlia"]
    assert mean(ours.recalls) >= 0.98
    assert mean(ours.rtts) < 3.5 < mean(theirs.rtts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_nodes(seed):
    alive = lookups(1000, 0.0, tries=100, seed=seed)
    assert mean(alive["locate"].recalls) >= 0.99
    dead = lookups(1000, 0.2, tries=100, seed=seed, rivals=(RIVAL,))
    ours, theirs = dead["locate"], dead["kademlia"]
    assert mean(ours.recalls) >= 0.97
    assert mean(ours.rtts) < 5 < mean(theirs.rtts) / 3
    per_peer_found = mean(ours.asked) / mean(ours.recalls)
    assert per_peer_found < 1.1 * mean(theirs.asked) / mean(theirs.recalls)
    assert mean(dead["read"].asked) < mean(theirs.asked)


@pytest.mark.slow
def test_costs_grow_with_the_logarithm():
    small, large = (size(count, minutes=0.5, tries=60) for count in (100, 800))
    assert small.lost == large.lost == 0
    assert mean(large.lookup.rtts) - mean(small.lookup.rtts) < 0.5 * 3, "three doublings"
    assert mean(large.lookup.asked) - mean(small.lookup.asked) < 2 * 3
