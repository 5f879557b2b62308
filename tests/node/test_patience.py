"""How long a client waits before it asks what is wrong."""

import pytest
from swarmnode.node.client.patience import FACTOR, LAN_S, MOST_S, RECENT, WAN_S, Patience


def taught(*steps: tuple[int, float]) -> Patience:
    """One that has seen steps of (rows, seconds)."""
    patience = Patience()
    for rows, seconds in steps:
        patience.began(0.0, rows)
        patience.ended(seconds)
    return patience


def waiting(patience: Patience, rows: int, rtt_s: float = 0.0) -> float:
    patience.began(0.0, rows)
    return patience.deadline_s(rtt_s)


def test_without_experience_it_waits_long():
    assert waiting(taught(), 1) == MOST_S
    assert waiting(taught((1, 0.01)), 1) == MOST_S


def test_a_multiple_of_the_slowest_recent_step_within_bounds():
    assert waiting(taught((1, 0.1), (1, 0.2)), 1) == pytest.approx(FACTOR * 0.2)
    assert waiting(taught((1, 0.001), (1, 0.002)), 1) == LAN_S
    assert waiting(taught((1, 0.001), (1, 0.002)), 1, rtt_s=0.1) == pytest.approx(0.2 + WAN_S)
    assert waiting(taught((1, 9.0), (1, 9.0)), 1) == MOST_S
    assert waiting(taught((1, 1.0), *[(1, 0.1)] * RECENT), 1) == pytest.approx(FACTOR * 0.1)


def test_a_prefill_says_nothing_about_decoding():
    """Or a hung server would be noticed seconds late for as long as the prefill is remembered."""
    patience = taught((300, 2.0), (1, 0.05), (1, 0.05))
    assert waiting(patience, 1) == pytest.approx(FACTOR * 0.05)
    patience.ended(0.05)
    assert waiting(patience, 300) == MOST_S


def test_frames_fed_before_a_result_are_one_step():
    patience = taught((256, 1.0), (256, 1.0))
    patience.began(0.0, 128)
    assert waiting(patience, 128) == pytest.approx(FACTOR * 1.0)


def test_steps_of_another_size_are_no_stranger_than_their_rows():
    """Guessed tokens travel with a step: four rows take at most four times what one takes, and at least as long."""
    patience = taught((1, 0.1), (1, 0.1), (8, 0.3), (8, 0.3))
    assert waiting(patience, 3) == pytest.approx(FACTOR * 0.2)
    patience = taught((8, 0.3), (8, 0.3))
    assert waiting(patience, 1) == pytest.approx(FACTOR * 0.3)
