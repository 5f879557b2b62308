"""Nodes come and go, links fail, networks part: what readers see of the servers that live and of those that died."""

import pytest
from sim.scenarios import churn, heavy_tailed, partition


def check(seen):
    assert seen.reads
    assert seen.complete / seen.reads >= 0.99
    assert seen.missing / seen.expected <= 0.001
    assert seen.ghosts == 0
    assert seen.oldest_ghost_s <= 120


def test_a_third_of_the_nodes_leaves_every_minute():
    check(churn(30, minutes=3.0))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_nodes_for_ten_minutes(seed):
    check(churn(100, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "trouble",
    [{"loss": 0.005}, {"client_share": 0.33}, {"skew_s": 40.0}, {"lifetime": heavy_tailed(200.0)}, {"encode": True}],
    ids=["losses", "clients behind NAT", "clocks", "heavy-tailed lives", "encoded"],
)
def test_with_other_troubles(trouble):
    check(churn(60, minutes=5.0, **trouble))


def test_halves_of_a_cut_network_find_each_other_again():
    seen = partition(24, cut_s=150.0, servers=6)
    assert seen.across_before == seen.across_during == 1.0
    assert seen.healed_s < 60


@pytest.mark.slow
@pytest.mark.parametrize("cut_s", [120.0, 900.0])
def test_larger_halves(cut_s):
    seen = partition(60, cut_s=cut_s)
    assert seen.across_during >= 0.95
    assert seen.healed_s < 60
