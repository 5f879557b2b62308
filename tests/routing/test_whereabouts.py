"""Learning where we are from round trips: whom it listens to, how often, and what it forgets."""

from random import Random

import pytest
from sim.network import key_of
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.routing import whereabouts as module
from swarmnode.routing.coordinates import Coordinate
from swarmnode.routing.whereabouts import COUNTS_EVERY_S, REMEMBERED_S, Whereabouts

THERE = (0.05, 0.0, 0.001, 0.2)


def peer(number):
    return key_of(number).peer_id


def test_place_is_unknown_until_round_trips_agree():
    ours = Whereabouts(Random(1))
    assert ours.coordinate is None
    assert Coordinate.from_floats(ours.told()).error == 1.0
    for number in range(40):
        place = Random(number)
        x, y = place.uniform(-0.05, 0.05), place.uniform(-0.05, 0.05)
        rtt_s = Coordinate(x=x, y=y).rtt_s(Coordinate(x=0.02, y=-0.01))
        ours.heard(peer(number), (x, y, 1e-5, 0.1), rtt_s, number)
    assert ours.samples == 40
    assert ours.coordinate.error < 0.3
    for place in ((0.05, 0.05), (-0.05, 0.0)):
        real = Coordinate(x=0.02, y=-0.01).rtt_s(Coordinate(x=place[0], y=place[1]))
        assert ours.coordinate.rtt_s(Coordinate(x=place[0], y=place[1])) == pytest.approx(real, rel=0.3)


@pytest.mark.parametrize("claim", [(11.0, 0.0, 0.0, 0.5), (0.0, 0.0, -1.0, 0.5), (0.0, 0.0, 0.0, 1.5)])
def test_a_place_out_of_bounds_is_the_peers_fault(claim):
    ours = Whereabouts(Random(1))
    with pytest.raises(RemoteProtocolError, match="out of bounds"):
        ours.heard(peer(1), claim, 0.1, 0.0)
    assert (len(ours), ours.samples) == (0, 0)


def test_who_does_not_say_where_it_is_teaches_nothing():
    ours = Whereabouts(Random(1))
    ours.heard(peer(1), None, 0.1, 0.0)
    ours.measure(lambda _: 0.1, 10.0)
    assert (len(ours), ours.samples) == (0, 0)


def test_who_answers_often_counts_as_often_as_others():
    ours = Whereabouts(Random(1))
    for number in range(20):
        ours.heard(peer(1), THERE, 0.1, 0.05 * number)
    assert ours.samples == 1
    ours.heard(peer(1), THERE, 0.1, COUNTS_EVERY_S)
    assert ours.samples == 2


def test_one_slow_answer_does_not_move_us():
    first, second = Whereabouts(Random(1)), Whereabouts(Random(1))
    for number, slow in enumerate((0.1, 0.1, 3.0, 0.1)):
        first.heard(peer(1), THERE, slow, COUNTS_EVERY_S * number)
        second.heard(peer(1), THERE, 0.1, COUNTS_EVERY_S * number)
    assert first.coordinate == second.coordinate


def test_later_round_trips_count_in_turn():
    ours = Whereabouts(Random(1))
    for number in range(3):
        ours.heard(peer(number), THERE, 0.1, float(number))
    asked = []

    def rtt_of(one):
        asked.append(one)
        return None if one == peer(2) else 0.1

    for step in range(4):
        ours.measure(rtt_of, 10.0 + step)
    assert ours.samples == 3 + 4, "the first two by turns, each after two seconds"
    assert set(asked) == {peer(0), peer(1), peer(2)}


def test_neighbours_are_bounded_and_forgotten(monkeypatch):
    monkeypatch.setattr(module, "MAX_NEIGHBOURS", 3)
    ours = Whereabouts(Random(1))
    for number in range(5):
        ours.heard(peer(number), THERE, 0.1, float(number))
    assert len(ours) == 3
    before = ours.samples
    ours.measure(lambda one: 0.1 if one in (peer(0), peer(1)) else None, 100.0)
    assert ours.samples == before, "the first two are gone"
    ours.measure(lambda _: 0.1, 4.0 + REMEMBERED_S + 1)
    assert len(ours) == 0


def settled(count):
    """Somebody at (0.02, -0.01) who has met each of some neighbours a few times."""
    ours = Whereabouts(Random(1))
    here, places = Coordinate(x=0.02, y=-0.01), {}
    for number in range(count):
        place = Random(number)
        places[number] = (place.uniform(-0.05, 0.05), place.uniform(-0.05, 0.05), 1e-5, 0.1)
    for turn in range(40 * count):
        number = turn % count
        rtt_s = here.rtt_s(Coordinate.from_floats(places[number]))
        ours.heard(peer(number), places[number], rtt_s, 2.0 * turn)
    return ours


def test_whose_claims_never_fit_is_not_followed():
    ours = settled(10)
    place, samples = ours.coordinate, ours.samples
    for turn in range(100):
        ours.heard(peer(99), (9.0, 9.0, 0.0, 0.0), 0.05, 1000.0 + 2 * turn)
    assert ours.samples <= samples + 2
    assert ours.coordinate.error <= 1.5 * place.error
    assert ours.coordinate.rtt_s(place) < 0.02


def test_who_mends_its_ways_counts_again():
    ours = settled(10)
    for turn in range(30):
        ours.heard(peer(99), (9.0, 9.0, 0.0, 0.0), 0.05, 1000.0 + 2 * turn)
    samples = ours.samples
    for turn in range(30):
        ours.heard(peer(99), THERE, 0.04, 2000.0 + 2 * turn)
    assert ours.samples > samples + 15


def test_few_witnesses_or_being_wrong_ourselves_condemns_nobody():
    few = settled(module.MIN_WITNESSES - 2)
    samples = few.samples
    few.heard(peer(99), (9.0, 9.0, 0.0, 0.0), 0.05, 1000.0)
    assert few.samples == samples + 1
    ours = settled(10)
    samples = ours.samples
    for turn in range(50):  # as if we had moved to another continent
        ours.heard(peer(turn % 10), (5.0, 5.0, 1e-5, 0.1), 0.02, 1000.0 + 2 * turn)
    assert ours.samples > samples + 40
