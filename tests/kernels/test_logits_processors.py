"""Every sampling control against transformers' logits processors: the same tokens may be drawn, as likely."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from swarmnode.kernels import sampling
from swarmnode.kernels.sampling import choose, choose_rows, sample
from swarmnode.protocol.sampling import SamplingParams
from transformers.generation import logits_process as oracle

torch.set_num_threads(1)

VOCAB = 97
ALL = SamplingParams(
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.02,
    repetition_penalty=1.3,
    logit_bias={3: 5.0, 8: -4.0},
)
EACH = [
    SamplingParams(temperature=1.7),
    SamplingParams(temperature=1.0, top_k=12),
    SamplingParams(temperature=1.0, top_k=VOCAB + 5),
    SamplingParams(temperature=1.0, top_p=0.6),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=1.0, repetition_penalty=1.4),
    SamplingParams(temperature=1.0, repetition_penalty=0.6),
    SamplingParams(temperature=1.0, logit_bias={0: 3.0, 5: -100.0, VOCAB - 1: 0.5}),
    ALL,
]


def processors(params: SamplingParams) -> oracle.LogitsProcessorList:
    """As transformers' generate puts them together."""
    made = oracle.LogitsProcessorList()
    if params.logit_bias:
        made.append(oracle.SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1:
        made.append(oracle.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    made.append(oracle.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        made.append(oracle.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        made.append(oracle.TopPLogitsWarper(params.top_p))
    if params.min_p:
        made.append(oracle.MinPLogitsWarper(params.min_p))
    return made


def ours(logits: torch.Tensor, params: SamplingParams, history: list[int]) -> np.ndarray:
    """Probabilities [vocab] we draw from."""
    raw = logits.numpy()
    ids, weights = sampling._filter(sampling._adjust(raw, params, history) if params.adjusts else raw, params)
    probabilities = np.zeros(len(raw))
    probabilities[np.arange(len(raw)) if ids is None else ids] = weights.astype(np.float64) / weights.sum()
    return probabilities


def theirs(logits: torch.Tensor, params: SamplingParams, history: list[int]) -> np.ndarray:
    scores = processors(params)(torch.tensor([history]), logits[None].clone())
    return torch.softmax(scores[0].double(), -1).numpy()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30))
@pytest.mark.parametrize("params", EACH)
def test_the_same_tokens_as_likely(params, seed, history):
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    expected = theirs(logits, params, history)
    assert abs(ours(logits, params, history) - expected).max() < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    penalty=st.floats(0.5, 2),
)
def test_any_controls_together(seed, temperature, top_k, top_p, min_p, penalty):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    got, expected = ours(logits, params, [1, 2, 3, 2]), theirs(logits, params, [1, 2, 3, 2])
    assume(((got > 0) == (expected > 0)).all() or not at_a_border(expected, got))
    assert abs(got - expected).max() < 1e-6


def at_a_border(expected: np.ndarray, got: np.ndarray) -> bool:
    """They differ by one token only: float32 sums on the other side of a border."""
    return ((got > 0) != (expected > 0)).sum() == 1


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(st.integers(0, VOCAB - 1), max_size=30),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    last=st.integers(0, 40),
)
def test_frequency_and_presence_by_their_published_formula(history, frequency, presence, last):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, as the OpenAI API defines them."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(len(history)))
    params = SamplingParams(
        temperature=1.0, frequency_penalty=frequency, presence_penalty=presence, penalty_last_n=last
    )
    counts = torch.zeros(VOCAB)
    for token in history[-last:] if last else history:
        counts[token] += 1
    expected = torch.softmax(logits - counts * frequency - (counts > 0) * presence, 0)
    assert abs(ours(logits, params, history) - expected.numpy()).max() < 1e-6


def test_greedy_obeys_what_changes_logits():
    logits = torch.tensor([4.0, 3.0, -1.0, 3.5])
    assert sample(logits, SamplingParams(logit_bias={1: 1.5}), [], 0)[0] == 1
    assert sample(logits, SamplingParams(logit_bias=[(0, -100), (3, -100)]), [], 0)[0] == 1
    assert sample(logits, SamplingParams(logit_bias={77: 100.0}), [], 0)[0] == 0  # not in this vocabulary
    assert logits.tolist() == [4.0, 3.0, -1.0, 3.5]


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4))
    expected = torch.log_softmax(logits.double(), 0)
    for params in (SamplingParams(), ALL):
        choice = choose(logits, params, [1, 2], 2, top=5)
        assert choice.logprob == pytest.approx(expected[choice.token].item(), abs=1e-5)
        values, ids = expected.topk(5)
        assert [token for token, _ in choice.top] == ids.tolist()
        assert [value for _, value in choice.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert choose(logits, SamplingParams(), [], 0).top == ()
    assert [token for token, _ in choose(torch.zeros(9), SamplingParams(), [], 0, top=3).top] == [0, 1, 2]
    assert len(choose(logits, SamplingParams(), [], 0, top=VOCAB + 3).top) == VOCAB


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 1000), wrong=st.integers(0, 6), count=st.integers(0, 6))
@pytest.mark.parametrize("params", [SamplingParams(), ALL, SamplingParams(temperature=1.0, frequency_penalty=1.0)])
def test_rows_are_chosen_as_one_by_one(params, seed, wrong, count):
    """However many guesses were sent and whichever was wrong first, choices are those made without."""
    rows = 3 * torch.randn(count + 1, VOCAB, generator=torch.Generator().manual_seed(seed))
    history, alone = [5, 6, 7], []
    for row in rows:
        alone.append(choose(row, params, [*history, *(c.token for c in alone)], 3 + len(alone)))
    guesses = [choice.token for choice in alone[:-1]]
    if wrong < count:
        guesses[wrong] = (guesses[wrong] + 1) % VOCAB
    assert choose_rows(rows, params, history, guesses) == alone[: min(wrong, count) + 1]


def test_sequences_of_one_prompt_draw_differently_and_the_first_as_alone():
    params = SamplingParams(temperature=1.0, seed=7, choices=3)
    assert params.for_lane(0) is params
    assert [params.for_lane(lane).seed for lane in range(7)] == [7, 8, 9, 7, 8, 9, 7]
    assert SamplingParams(seed=2**63 - 1, choices=2).for_lane(1).seed == 0
