from __future__ import annotations

from random import Random

import pytest
from swarmnode.routing import bans
from swarmnode.routing.bans import BackOff


def test_back_off_doubles_up_to_the_cap_and_ends():
    back_off = BackOff(Random(1))
    now, waits = 0.0, []
    for _ in range(10):
        until = back_off.failed("peer", now)
        waits.append(until - now)
        assert back_off.avoided("peer", until - 0.01)
        assert not back_off.avoided("peer", until)
        now = until
    for index, wait in enumerate(waits):
        plain = min(bans.CAP_S, bans.BASE_S * 2**index)
        assert (1 - bans.JITTER) * plain <= wait <= (1 + bans.JITTER) * plain
    assert back_off.failures("peer") == 10


def test_failures_while_avoided_count_once():
    back_off = BackOff(Random(1))
    until = back_off.failed("peer", 0.0)
    assert [back_off.failed("peer", 0.1) for _ in range(5)] == [until] * 5
    assert back_off.failures("peer") == 1


def test_success_forgets():
    back_off = BackOff(Random(1))
    back_off.failed("peer", 0.0)
    back_off.succeeded("peer")
    back_off.succeeded("stranger")
    assert not back_off.avoided("peer", 0.0)
    assert back_off.failures("peer") == 0


def test_an_old_streak_is_over():
    back_off = BackOff(Random(1))
    for now in (0.0, 10.0, 30.0):
        back_off.failed("peer", now)
    assert back_off.failures("peer") == 3
    back_off.failed("peer", 31.0 + bans.FORGET_S)
    assert back_off.failures("peer") == 1


def test_memory_is_bounded_and_the_oldest_goes():
    back_off = BackOff(Random(1), capacity=3)
    for name in "abcd":
        back_off.failed(name, 0.0)
    assert len(back_off) == 3
    assert not back_off.avoided("a", 0.0)
    assert back_off.avoided("d", 0.0)


@pytest.mark.parametrize("name", [("peer", ("addr",)), b"bytes", 3])
def test_any_hashable_names_a_thing(name):
    back_off = BackOff(Random(1))
    back_off.failed(name, 0.0)
    assert back_off.avoided(name, 1.0)
