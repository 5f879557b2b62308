"""The estimate of a link's rate: from full moments only, smoothed, and what follows from it."""

import pytest
from swarmnode.protocol.link_rate import MIN_SAMPLE_S, SLOW_BYTES_S, LinkRate


def drive(rate, bytes_s, *, start=0.0, sent=0, step=0.02, turns=100):
    """A link that stays full and carries bytes_s away."""
    for turn in range(turns):
        now = start + turn * step
        rate.resumed(now, sent + round(turn * step * bytes_s), full=True)
    return now, sent + round((turns - 1) * step * bytes_s)


@pytest.mark.parametrize(("bytes_s", "slow"), [(SLOW_BYTES_S * 0.99, True), (SLOW_BYTES_S * 1.01, False)])
def test_a_full_link_is_measured(bytes_s, slow):
    rate = LinkRate()
    drive(rate, bytes_s)
    assert rate.bytes_s == pytest.approx(bytes_s, rel=1e-3)
    assert rate.is_slow is slow


def test_a_link_that_was_never_full_is_not_called_slow():
    rate = LinkRate()
    for turn in range(100):
        rate.resumed(turn, turn * 1000, full=False)
    assert (rate.bytes_s, rate.is_slow) == (0.0, False)


def test_idle_time_does_not_count():
    rate = LinkRate()
    rate.resumed(0.0, 0, full=True)
    rate.resumed(1.0, 1000, full=False)
    rate.resumed(100.0, 2000, full=True)
    assert rate.bytes_s == 0.0
    rate.resumed(100.0 + 2 * MIN_SAMPLE_S, 2000 + 10_000_000, full=True)
    assert rate.bytes_s == pytest.approx(10_000_000 / (2 * MIN_SAMPLE_S))


def test_a_link_that_changes_is_followed():
    rate = LinkRate()
    now, sent = drive(rate, 100e6)
    assert not rate.is_slow
    drive(rate, 1e6, start=now, sent=sent)
    assert rate.is_slow
    assert rate.bytes_s == pytest.approx(1e6, rel=0.05)
