from __future__ import annotations

from random import Random

from swarmnode.protocol.ids import PeerId
from swarmnode.routing import lost as losts
from swarmnode.routing.lost import Lost
from swarmnode.routing.table import Contact


def contact(number):
    return Contact(PeerId(b"\x12\x20" + number.to_bytes(32, "big")))


def test_now_and_then_one_of_the_lost_is_named_until_it_speaks():
    lost = Lost(Random(1), 0.0)
    assert lost.due(100.0) is None
    lost.note(contact(1), 100.0)
    named = [now for now in range(101, 201) if lost.due(float(now))]
    assert 7 <= len(named) <= 14, "about every ten seconds"
    assert lost.found(contact(1).peer)
    assert not lost.found(contact(1).peer)
    assert lost.due(300.0) is None


def test_the_dead_are_forgotten_and_the_list_is_bounded():
    lost = Lost(Random(1), 0.0)
    for number in range(losts.CAPACITY + 5):
        lost.note(contact(number), float(number))
    assert len(lost) == losts.CAPACITY
    assert lost.due(losts.KEEP_S + losts.CAPACITY / 2) is not None
    assert len(lost) < losts.CAPACITY
    assert lost.due(3 * losts.KEEP_S) is None
    assert len(lost) == 0
