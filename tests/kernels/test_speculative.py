"""Guessing: what is looked up, how much is sent, and that neither ever decides the text."""

from __future__ import annotations

import random
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.kernels.kvcache import ROLLBACK
from swarmnode.kernels.speculative import (
    MAX_DRAFT,
    MAX_INDEXED,
    MAX_MATCH,
    MIN_MATCH,
    MODEL,
    SHADOW_EVERY,
    Ngrams,
    Pace,
    Speculator,
)

TEXT = [7, 8, 9, 10, 11, 12, 13, 14]


def plain_match(history: list[int]) -> tuple[int, int] | None:
    """By the definition: the longest end of the text that stood before, where it stood last."""
    for length in range(MAX_MATCH, MIN_MATCH - 1, -1):
        if length >= len(history):
            continue
        for at in range(len(history) - 1, length - 1, -1):
            if history[at - length : at] == history[-length:]:
                return at, length
    return None


@settings(max_examples=300, deadline=None)
@given(history=st.lists(st.integers(0, 3), max_size=40), cut=st.integers(0, 40))
def test_matches_are_the_longest_and_last_whatever_was_known_before(history, cut):
    ngrams = Ngrams()
    for size in range(len(history) + 1):
        assert ngrams.match(history[:size]) == plain_match(history[:size])
    shorter = history[: min(cut, len(history))]
    assert ngrams.match(shorter) == plain_match(shorter)
    fresh = [*shorter, 9, 9]
    assert ngrams.match(fresh) == plain_match(fresh)


def test_a_copy_runs_on_into_itself():
    ngrams = Ngrams()
    history = [*TEXT, 1, 2, 3, 1, 2, 3, 1, 2]
    at, length = ngrams.match(history)
    assert length >= 5
    assert ngrams.copy(at, 10) == [3, 1, 2, 3, 1, 2, 3, 1, 2, 3]


def test_only_the_end_of_a_long_history_is_indexed():
    ngrams = Ngrams()
    history = [*TEXT, *([0, 1] * (MAX_INDEXED // 2)), *TEXT[:3]]
    assert ngrams.match(history) is None
    assert len(ngrams._follower) <= MAX_INDEXED * (MAX_MATCH - MIN_MATCH + 1)
    history += [3, *TEXT[:3]]
    assert ngrams.copy(ngrams.match(history)[0], 1) == [3]


def drive(text: list[int], prompt: int, speculator: Speculator, cost=lambda rows: 1.0) -> float:
    """Generate a text that is given beforehand, as a chain would. Returns what that took."""
    history, seconds = text[:prompt], 0.0
    while len(history) < len(text):
        room = len(text) - len(history) - 1
        guess = speculator.propose(history, room)
        sent = (guess.tokens or [])[: guess.count]
        assert len(sent) == guess.count <= min(room, MAX_DRAFT)
        chosen = []
        for guessed in (*sent, None):
            chosen.append(text[len(history)])
            history.append(chosen[-1])
            if chosen[-1] != guessed:
                break
        seconds += cost(1 + len(sent))
        speculator.observe(chosen, cost(1 + len(sent)))
    assert history == text
    return seconds


def test_repetition_goes_many_tokens_a_step():
    speculator = Speculator()
    drive(TEXT * 50, 20, speculator)
    assert speculator.traversals < 380 / 12
    assert speculator.accepted == 380 - speculator.traversals


def test_what_never_repeats_is_never_guessed():
    speculator = Speculator()
    text = random.Random(1).sample(range(100_000), 500)
    assert drive(text, 100, speculator) == 400
    assert speculator.drafted == 0


def test_guesses_that_are_wrong_are_soon_not_sent():
    """Pairs repeat, what follows them never does."""
    text = [token for number in range(600) for token in (1, 2, 10 + number)]
    speculator = Speculator()
    assert drive(text, 300, speculator, cost=lambda rows: 1 + 0.3 * (rows - 1)) < 1.02 * 1500
    assert 0 < speculator.drafted < 30


def test_guessing_stops_where_rows_cost_more_than_steps():
    speculator = Speculator()
    assert drive(TEXT * 50, 20, speculator, cost=lambda rows: 1.5 * rows - 0.5) < 1.05 * 380
    assert speculator.drafted < 20
    assert drive(TEXT * 50, 20, Speculator(), cost=lambda rows: 1 + 0.1 * (rows - 1)) < 380 / 3


def test_guessing_returns_when_the_text_begins_to_repeat():
    """What is not sent is judged all the same."""
    noise = [token for number in range(150) for token in (1, 2, 10 + number)]
    speculator = Speculator()
    drive(noise, 30, speculator, cost=lambda rows: 1 + 0.3 * (rows - 1))
    before = speculator.traversals
    drive(noise + [1, 2, 3, 4] * 60, len(noise), speculator, cost=lambda rows: 1 + 0.05 * (rows - 1))
    assert speculator.traversals - before < 80


def test_rows_grow_step_by_step():
    """One step of 32 rows could take 32 times as long: nobody knows before it is tried."""
    pace = Pace()
    assert pace.choose(MAX_MATCH, MAX_DRAFT) == (0, 1.0)  # no step has been seen
    pace.judge(MAX_MATCH, 100, wrong=False)
    rows = 1
    for expected in (1, 3, 7, 15, 31):
        pace.took(rows, 1.0)
        count, gain = pace.choose(MAX_MATCH, MAX_DRAFT)
        assert count == expected
        assert gain > 1
        rows = count + 1
    assert pace.choose(MAX_MATCH, 5)[0] == 5
    assert pace.choose(MAX_MATCH, 0)[0] == 0


def test_one_stall_is_not_the_price_of_its_rows():
    pace = Pace()
    pace.judge(MAX_MATCH, 10, wrong=False)
    for rows in (1, 2, 4, 1, 2, 4):
        pace.took(rows, 1.0)
    pace.took(4, 30.0)
    assert pace.choose(MAX_MATCH, MAX_DRAFT)[0] >= 3


def test_a_price_once_paid_is_forgiven():
    pace = Pace()
    pace.judge(MAX_MATCH, 10, wrong=False)
    pace.took(1, 1.0)
    pace.took(2, 50.0)
    assert pace.choose(MAX_MATCH, MAX_DRAFT)[0] == 0
    for _ in range(800):
        pace.took(1, 1.0)
    assert pace.choose(MAX_MATCH, MAX_DRAFT)[0] > 0


def test_a_draft_model_is_asked_while_it_pays_and_now_and_then_after():
    asked = 0
    speculator = Speculator(ngrams=False, model=True)
    for step in range(200):
        guess = speculator.propose([1, step], 40)
        if guess.kind == MODEL:
            asked += 1
            assert guess.tokens is None
            speculator.drafted_by_model([5] * max(1, guess.count), 0.01)
        speculator.observe([6], 1.0 + 0.1 * guess.count)
    assert 200 / SHADOW_EVERY - 2 < asked < 200 / SHADOW_EVERY + 12
    assert speculator.drafted < 12


def test_a_draft_model_that_is_slow_is_not_used():
    speculator = Speculator(ngrams=False, model=True)
    for step in range(100):
        guess = speculator.propose([1, step], 40)
        count = guess.count
        if guess.kind == MODEL:
            speculator.drafted_by_model([5] * max(1, count), 2.0 * max(1, count))
        speculator.observe([5] * count + [5], 1.0)
    assert speculator.drafted <= 2


def test_rollback_stays_inside_what_windowed_layers_keep():
    assert MAX_DRAFT <= ROLLBACK


def test_guessing_needs_no_torch():
    code = "import sys, swarmnode.kernels.speculative; print({'torch', 'numpy', 'asyncio'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
