"""Vivaldi over the simulated world: how far off, does it know, and what liars do to it."""

import pytest
from sim.scenarios import LIES, places


def test_coordinates_predict_round_trips_and_know_how_well():
    seen = places(60, 200)
    assert seen.median < 0.2
    assert 0.5 * seen.median < seen.own < 2 * seen.median


@pytest.mark.parametrize("lie", LIES)
def test_one_liar_in_ten_spoils_little(lie):
    assert places(60, 250, liars=0.1, lie=lie, liars_from=200).median < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("seed", range(1, 4))
def test_liars_are_survived(seed, lie):
    assert places(150, 400, liars=0.01, lie=lie, liars_from=300, seed=seed).median < 0.16
    assert places(150, 400, liars=0.1, lie=lie, liars_from=300, seed=seed).median < 0.2
    assert places(150, 400, liars=0.1, lie=lie, seed=seed).median < 0.25, "from the start"
    fifth = places(150, 450, liars=0.2, lie=lie, liars_from=300, seed=seed)
    assert fifth.median < 0.35
    assert fifth.own > 0.6 * fifth.median, "nobody believes to know what it does not"
