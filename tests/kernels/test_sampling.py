"""Sampling: pure, seeded by position, filters against a plain reference, ties, frequencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.kernels import sampling
from swarmnode.kernels.sampling import sample, uniform
from swarmnode.protocol.errors import ServerFailed
from swarmnode.protocol.sampling import SamplingParams

torch.set_num_threads(1)


def reference_set(logits: list[float], params: SamplingParams) -> set[int]:
    """The tokens that may be drawn, by the textbook: sort everything, walk down."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k:
        order = order[: params.top_k]
    weights = [math.exp((logits[token] - logits[order[0]]) / params.temperature) for token in order]
    total, running, kept = sum(weights), 0.0, []
    for token, weight in zip(order, weights, strict=True):
        if running >= params.top_p * total and params.top_p < 1:
            break
        running += weight
        if weight >= params.min_p * weights[0]:
            kept.append(token)
    return set(kept)


GOLDEN = [0.36100132277779085, 0.24202951694325447, 0.609354112710269, 0.6519806259111252]


def test_uniform_golden_values():
    """The same on every machine, for ever: a new tail must draw what the dead one would have."""
    assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**63 - 1, 2**40)] == GOLDEN
    draws = [uniform(7, position) for position in range(4000)]
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02
    assert min(draws) >= 0 < max(draws) < 1


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.tensor([1.0, 5.0, 5.0, -2.0])
    token, logprob = sample(logits, SamplingParams(), [], 0)
    assert token == 1
    assert logprob == pytest.approx(torch.log_softmax(logits, 0)[1].item(), abs=1e-6)
    assert sample(logits.bfloat16(), SamplingParams(), [], 0)[0] == 1


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=16), min_size=1, max_size=40),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    position=st.integers(0, 2**40),
)
def test_draws_stay_inside_the_reference_set(logits, temperature, top_k, top_p, min_p, position):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=3)
    token, logprob = sample(torch.tensor(logits), params, [], position)
    # the reference sums in another order: a border within rounding may fall either side
    loose = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=min(1, top_p * (1 + 1e-9)), min_p=min_p * (1 - 1e-9)
    )
    assert token in reference_set(logits, loose)
    assert logprob <= 1e-6
    assert sample(torch.tensor(logits), params, [], position) == (token, logprob)


def test_frequencies_follow_the_filtered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 2.0, -30.0])
    params = SamplingParams(temperature=0.7, top_k=4, top_p=0.95, min_p=0.05, seed=11)
    kept = sorted(reference_set(logits.tolist(), params))
    expected = torch.softmax(logits[kept] / 0.7, 0)
    counts = dict.fromkeys(kept, 0)
    for position in range(3000):
        counts[sample(logits, params, [], position)[0]] += 1
    for token, share in zip(kept, expected.tolist(), strict=True):
        assert counts[token] / 3000 == pytest.approx(share, abs=0.03)


def test_top_k_takes_lower_ids_of_equals():
    params = SamplingParams(temperature=1.0, top_k=3)
    drawn = {sample(torch.zeros(10), params, [], position)[0] for position in range(200)}
    assert drawn == {0, 1, 2}


def test_tiny_top_p_and_top_k_one_are_greedy():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(1))
    greedy = sample(logits, SamplingParams(), [], 0)
    for params in (
        SamplingParams(temperature=9, top_p=1e-9),
        SamplingParams(temperature=9, top_k=1),
        SamplingParams(temperature=9, min_p=1.0),
        SamplingParams(temperature=1e-3, seed=5),
    ):
        assert sample(logits, params, [], 17) == greedy


def test_the_draw_depends_on_seed_and_position_only():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=1.0, seed=5)
    forward = [sample(logits, params, list(range(p)), p)[0] for p in range(30)]
    backward = [sample(logits, params, [], p)[0] for p in reversed(range(30))]
    assert forward == backward[::-1]
    assert forward != [sample(logits, SamplingParams(temperature=1.0, seed=6), [], p)[0] for p in range(30)]


def test_penalties_by_hand():
    logits = torch.tensor([4.0, 3.0, -1.0, 3.5])
    assert sample(logits, SamplingParams(repetition_penalty=2.0), [0], 1)[0] == 3
    assert sample(logits, SamplingParams(repetition_penalty=2.0), [0, 3], 2)[0] == 1
    assert sample(logits, SamplingParams(presence_penalty=0.9), [0, 0], 2)[0] == 3
    assert sample(logits, SamplingParams(frequency_penalty=0.3), [0, 0], 2)[0] == 3
    assert sample(logits, SamplingParams(frequency_penalty=0.3), [0], 1)[0] == 0
    assert sample(logits, SamplingParams(repetition_penalty=2.0, penalty_last_n=1), [0, 2], 2)[0] == 0
    assert sample(logits, SamplingParams(repetition_penalty=2.0), [], 0)[0] == 0
    assert sample(logits, SamplingParams(repetition_penalty=2.0), [99, -1], 2)[0] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonsense_logits_are_a_failed_server(bad):
    logits = torch.zeros(8)
    logits[3] = bad
    with pytest.raises(ServerFailed, match="not finite"):
        sample(logits, SamplingParams(temperature=1.0), [], 0)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2000), zeros=st.floats(0, 1), draw=st.floats(0, 1, exclude_max=True))
def test_inverting_in_two_levels_finds_the_place_of_one_running_sum(size, zeros, draw):
    generator = np.random.default_rng(size)
    weights = generator.random(size, np.float32) * (generator.random(size) >= zeros)
    weights[generator.integers(size)] = 1.0
    place = sampling._invert(weights, draw)
    running = np.cumsum(weights, dtype=np.float64)
    slack = 1e-9 * running[-1]
    assert weights[place] > 0
    assert running[place] >= draw * running[-1] - slack
    assert running[place] - weights[place] <= draw * running[-1] + slack


def test_the_last_rounding_never_draws_a_masked_token():
    weights = np.zeros(1500, np.float32)
    weights[7] = 0.1
    assert sampling._invert(weights, 1.0) == 7


def test_masked_tokens_are_never_drawn():
    logits = torch.full((8,), -float("inf"))
    logits[5] = 0.0
    assert sample(logits, SamplingParams(temperature=3.0), [], 0) == (5, 0.0)
