from __future__ import annotations

from swarmnode.protocol.ids import PeerId
from swarmnode.routing import timeouts
from swarmnode.routing.timeouts import Timeouts


def peer(number):
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


def test_before_anybody_answered():
    waits = Timeouts()
    assert waits.soft_s(peer(1)) == timeouts.INITIAL_S
    assert waits.hard_s(peer(1)) == timeouts.HARD_FACTOR * timeouts.INITIAL_S


def test_loopback_comes_to_the_floors():
    waits = Timeouts()
    for number in range(20):
        waits.observe(peer(number % 5), 0.002)
    assert waits.soft_s(peer(1)) == timeouts.FLOOR_S
    assert waits.soft_s(peer(99)) == timeouts.FLOOR_S
    assert waits.hard_s(peer(1)) == timeouts.HARD_FLOOR_S


def test_a_slow_link_raises_its_own_limit_only():
    waits = Timeouts()
    for _ in range(20):
        waits.observe(peer(1), 0.01)
        waits.observe(peer(2), 0.8)
    assert waits.soft_s(peer(1)) == timeouts.FLOOR_S
    assert 0.8 < waits.soft_s(peer(2)) < 1.0
    for _ in range(20):
        waits.observe(peer(2), 60.0)
    assert waits.soft_s(peer(2)) == timeouts.CEILING_S
    assert waits.hard_s(peer(2)) == timeouts.HARD_CEILING_S


def test_memory_is_bounded():
    waits = Timeouts()
    for number in range(timeouts.CAPACITY + 10):
        waits.observe(peer(number), 0.5)
    assert len(waits._peers) == timeouts.CAPACITY
