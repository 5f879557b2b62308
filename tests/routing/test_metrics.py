"""Measurements: means that follow, ages that count, and a table that cannot grow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.routing.announce import PREFILL_TOKENS
from swarmnode.routing.coordinates import Coordinate
from swarmnode.routing.metrics import (
    FAILURE_HALF_LIFE_S,
    HALF_LIFE_S,
    STALE_S,
    UNKNOWN_RTT_S,
    Ewma,
    Metrics,
)
from worlds import peer

A, B = peer(1), peer(2)


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=30), st.floats(0, 1e4))
def test_a_mean_stays_among_its_samples(samples, gap):
    mean = Ewma(samples[0], 1.0, 0.0)
    for number, sample in enumerate(samples[1:], 1):
        mean = mean.updated(sample, number * gap)
    assert min(samples) * 0.999 <= mean.value <= max(samples) * 1.001


def test_a_mean_follows_a_change_within_a_few_samples():
    mean = Ewma(1.0, 1.0, 0.0)
    for second in range(50):
        mean = mean.updated(1.0, second)
    for second in range(50, 65):
        mean = mean.updated(5.0, second)
    assert 4.8 < mean.value <= 5.0


def test_a_sample_after_a_long_silence_replaces_the_mean():
    mean = Ewma(1.0, 5.0, 0.0).updated(9.0, 20 * HALF_LIFE_S)
    assert mean.value == pytest.approx(9.0, rel=1e-4)


def test_learned_times_fade_towards_what_is_announced():
    mean = Ewma(1.0, 4.0, 0.0)
    assert mean.against(2.0, 0.0) == pytest.approx(1.2)
    assert mean.against(2.0, 2 * HALF_LIFE_S) == pytest.approx(1.5)
    assert mean.against(2.0, 100 * HALF_LIFE_S) == pytest.approx(2.0)


def test_round_trip_is_measured_then_predicted_then_assumed():
    metrics = Metrics()
    place = Coordinate(x=0.03, height=0.01, error=0.1)
    assert metrics.rtt_s(A, place, 0.0) == UNKNOWN_RTT_S
    metrics.coordinate = Coordinate(height=0.01, error=0.1)
    assert metrics.rtt_s(A, place, 0.0) == pytest.approx(0.05)
    metrics.observe_rtt(A, 0.2, 0.0)
    assert metrics.rtt_s(A, place, STALE_S - 1) == pytest.approx(0.2)
    assert metrics.rtt_s(A, place, STALE_S + 1) == pytest.approx(0.05)
    assert metrics.rtt_s(A, None, STALE_S + 1) == UNKNOWN_RTT_S


def test_jitter_is_the_mean_deviation():
    metrics = Metrics()
    metrics.observe_rtt(A, 0.1, 0.0)
    assert metrics.peer(A).jitter is None
    for second in range(1, 40):
        metrics.observe_rtt(A, 0.1 + 0.02 * (second % 2), float(second))
    assert metrics.peer(A).jitter.value == pytest.approx(0.01, rel=0.2)


def test_steps_teach_decode_or_prefill():
    metrics = Metrics()
    metrics.observe_step(A, blocks=4, tokens=1, seconds=0.008, now=0.0)
    metrics.observe_step(A, blocks=4, tokens=2 * PREFILL_TOKENS, seconds=0.8, now=0.0)
    metrics.observe_step(A, blocks=4, tokens=20, seconds=99.0, now=0.0)
    assert metrics.peer(A).decode.value == pytest.approx(0.002)
    assert metrics.peer(A).prefill.value == pytest.approx(0.1)


def test_bandwidth_and_senseless_transfers():
    metrics = Metrics()
    metrics.observe_transfer(A, 0, 1.0, 0.0)
    metrics.observe_transfer(A, 100, 0.0, 0.0)
    assert metrics.peer(A) is None
    metrics.observe_transfer(A, 5_000_000, 0.5, 0.0)
    assert metrics.peer(A).bandwidth.value == pytest.approx(1e7)


def test_failures_are_remembered_and_forgiven():
    metrics = Metrics()
    assert metrics.failure_rate(A, 0.0) == 0.0
    metrics.observe_outcome(A, failed=True, now=0.0)
    once = metrics.failure_rate(A, 0.0)
    metrics.observe_outcome(A, failed=True, now=1.0)
    assert 0.4 < once < metrics.failure_rate(A, 1.0) < 1.0
    for second in range(2, 12):
        metrics.observe_outcome(A, failed=False, now=float(second))
    assert metrics.failure_rate(A, 12.0) < 0.2
    metrics.observe_outcome(B, failed=True, now=0.0)
    assert metrics.failure_rate(B, 10 * FAILURE_HALF_LIFE_S) < 0.01


def test_special_hops_are_the_newest_truth_and_expire():
    metrics = Metrics()
    metrics.observe_relayed(A, B, 0.0)
    assert metrics.special_hops(1.0) == {(A, B): None}
    metrics.observe_hop(A, B, 0.01, 2.0)
    assert metrics.special_hops(3.0) == {(A, B): pytest.approx(0.01)}
    metrics.observe_relayed(A, B, 4.0)
    assert metrics.special_hops(5.0) == {(A, B): None}
    assert metrics.special_hops(5.0 + STALE_S) == {}


def test_tables_are_bounded_and_drop_the_stalest(monkeypatch):
    monkeypatch.setattr("swarmnode.routing.metrics.MAX_PEERS", 3)
    monkeypatch.setattr("swarmnode.routing.metrics.MAX_HOPS", 2)
    metrics = Metrics()
    for number in range(3):
        metrics.observe_rtt(peer(number), 0.1, 0.0)
    metrics.observe_rtt(peer(0), 0.1, 1.0)
    metrics.observe_rtt(peer(9), 0.1, 2.0)
    assert [metrics.peer(peer(n)) is not None for n in (0, 1, 2, 9)] == [True, False, True, True]
    for number in range(5):
        metrics.observe_hop(peer(number), B, 0.1, 0.0)
        metrics.observe_relayed(B, peer(number), 0.0)
    assert len(metrics.special_hops(0.0)) == 4
