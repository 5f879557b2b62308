"""Vivaldi: distances come to predict round trips, and a liar moves nobody far."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.routing.coordinates import MAX_S, MAX_STEP_S, MIN_ERROR, MIN_REMOTE_ERROR, Coordinate, moved

unit = st.floats(-MAX_S, MAX_S)
positive = st.floats(0, MAX_S)
coordinates = st.builds(Coordinate, x=unit, y=unit, height=positive, error=st.floats(0, 1))


def simulate(rng, places, heights, rounds, noise=0.0):
    """Everybody measures a random other each round; returns coordinates and the median relative error."""
    count = len(places)

    def rtt(i, j):
        true = math.dist(places[i], places[j]) + heights[i] + heights[j]
        return true * (1 + rng.uniform(-noise, noise))

    held = [Coordinate() for _ in range(count)]
    for _ in range(rounds):
        for i in range(count):
            j = rng.randrange(count)
            if i != j:
                held[i] = moved(held[i], held[j], rtt(i, j), rng)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    errors = sorted(abs(held[i].rtt_s(held[j]) - rtt(i, j)) / rtt(i, j) for i, j in pairs)
    return held, errors[len(errors) // 2]


@pytest.mark.parametrize("seed", range(3))
def test_distances_come_to_predict_round_trips(seed):
    rng = random.Random(seed)
    places = [(rng.uniform(0, 0.2), rng.uniform(0, 0.1)) for _ in range(30)]
    heights = [rng.uniform(0.001, 0.02) for _ in places]
    held, error = simulate(rng, places, heights, 150, noise=0.1)
    assert error < 0.2
    assert max(c.error for c in held) < 0.5


def test_two_peers_that_start_in_one_point_part():
    own = other = Coordinate()
    rng = random.Random(1)
    for _ in range(60):
        own, other = moved(own, other, 0.1, rng), moved(other, own, 0.1, rng)
    assert own.rtt_s(other) == pytest.approx(0.1, rel=0.1)


@given(coordinates, coordinates, st.floats(allow_nan=True), st.integers(0, 9))
def test_one_sample_never_moves_us_far_or_out_of_bounds(own, other, rtt_s, seed):
    after = moved(own, other, rtt_s, random.Random(seed))
    Coordinate.from_floats(after.as_floats())
    assert math.hypot(after.x - own.x, after.y - own.y) <= MAX_STEP_S * 1.01
    assert after.error >= min(own.error, MIN_ERROR)


def test_senseless_round_trips_are_ignored():
    own = Coordinate(x=0.1)
    for rtt_s in (0.0, -1.0, math.nan, math.inf, MAX_S * 2):
        assert moved(own, Coordinate(), rtt_s, random.Random(1)) is own


@given(coordinates, coordinates, coordinates)
def test_prediction_is_a_metric(a, b, c):
    assert a.rtt_s(b) == pytest.approx(b.rtt_s(a))
    assert a.rtt_s(c) <= a.rtt_s(b) + b.rtt_s(c) + 1e-9


@pytest.mark.parametrize(
    "values",
    [(11.0, 0, 0, 0), (0, -11.0, 0, 0), (0, 0, -0.1, 0), (0, 0, 0, 1.1), (math.nan, 0, 0, 0), (0, 0, math.inf, 0)],
)
def test_claims_out_of_bounds_are_refused(values):
    with pytest.raises(RemoteProtocolError):
        Coordinate.from_floats(values)


def test_claims_to_be_certain_count_for_no_more_than_the_floor():
    own, rng = Coordinate(error=0.3), random.Random(1)
    certain, fair = (Coordinate(x=0.1, error=error) for error in (0.0, MIN_REMOTE_ERROR))
    assert moved(own, certain, 0.05, rng) == moved(own, fair, 0.05, rng)


def test_one_wild_sample_neither_moves_nor_frightens_a_settled_peer():
    own, rng = Coordinate(x=0.05, height=0.005, error=0.1), random.Random(1)
    for other, rtt_s in ((Coordinate(x=9.0, error=0.0), 0.02), (Coordinate(error=0.0), 9.0)):
        after = moved(own, other, rtt_s, rng)
        assert math.hypot(after.x - own.x, after.y - own.y) < 0.01
        assert after.error <= 0.11
