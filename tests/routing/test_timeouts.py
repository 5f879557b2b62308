from __future__ import annotations

import pytest
from swarmnode.protocol.ids import PeerId
from swarmnode.routing import timeouts
from swarmnode.routing.timeouts import Timeouts


def peer(number):
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


def test_before_anybody_answered():
    limits = Timeouts().limits(peer(1))
    assert limits.hedge_s == limits.soft_s == timeouts.INITIAL_S
    assert limits.hard_s == timeouts.HARD_FACTOR * timeouts.INITIAL_S


def test_loopback_comes_to_the_floors():
    waits = Timeouts()
    for number in range(20):
        waits.observe(peer(number % 5), 0.002)
    for limits in (waits.limits(peer(1)), waits.limits(peer(99))):
        assert limits.hedge_s == timeouts.HEDGE_FLOOR_S
        assert limits.soft_s == timeouts.FLOOR_S
        assert limits.hard_s == timeouts.HARD_FLOOR_S


def test_a_slow_link_raises_its_own_limit_only():
    waits = Timeouts()
    for _ in range(20):
        waits.observe(peer(1), 0.01)
        waits.observe(peer(2), 0.8)
    assert waits.limits(peer(1)).soft_s == timeouts.FLOOR_S
    assert 0.8 < waits.limits(peer(2)).soft_s < 1.0
    for _ in range(20):
        waits.observe(peer(2), 60.0)
    assert waits.limits(peer(2)).soft_s == timeouts.CEILING_S
    assert waits.limits(peer(2)).hard_s == timeouts.HARD_CEILING_S


def test_strangers_get_quantiles_of_the_last_first_answers():
    waits = Timeouts()
    waits.observe(peer(0), 0.3)
    assert waits.limits(peer(999)).soft_s == 0.6, "one sample says little: twice as long"
    for number in range(1, 101):
        waits.observe(peer(number), 0.2 + number / 1000)
    limits = waits.limits(peer(999))
    assert limits.hedge_s == pytest.approx(0.2 + timeouts.HEDGE_QUANTILE / 10, abs=0.003)
    assert limits.soft_s == pytest.approx(0.2 + timeouts.SOFT_QUANTILE / 10, abs=0.003)
    assert limits.hedge_s < limits.soft_s < limits.late_s < limits.hard_s
    for number in range(101, 101 + timeouts.WINDOW):
        waits.observe(peer(number), 1.0)
    assert waits.limits(peer(999)).hedge_s == 1.0, "old answers are forgotten"


def test_memory_is_bounded():
    waits = Timeouts()
    for number in range(timeouts.CAPACITY + 10):
        waits.observe(peer(number), 0.5)
    assert len(waits._peers) == timeouts.CAPACITY
