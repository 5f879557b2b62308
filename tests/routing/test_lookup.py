from __future__ import annotations

from random import Random

import pytest
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing import lookup as lookups
from swarmnode.routing.keys import distance
from swarmnode.routing.lookup import Done, Lookup, Wait
from swarmnode.routing.table import Contact

TARGET = bytes(32)


def contact(number, *addrs):
    return Contact(PeerId(b"\x12\x20" + number.to_bytes(32, "big")), tuple(map(Multiaddr.parse, addrs)))


def by_distance(contacts):
    return sorted(contacts, key=lambda one: distance(one.key, TARGET))


CROWD = by_distance(contact(number) for number in range(400))


def drain(lookup, now, deadline):
    """Ask all that may be asked now."""
    asked = []
    while isinstance(step := lookup.next(now), Contact):
        lookup.asked(step, deadline)
        asked.append(step)
    return asked, step


def test_no_seeds_is_done_at_once():
    lookup = Lookup(TARGET, [], width=20)
    assert lookup.next(0.0) == Done()
    assert lookup.closest(20) == []


def test_alpha_are_in_flight_nearest_first():
    lookup = Lookup(TARGET, CROWD[:20], width=20, alpha=3)
    asked, step = drain(lookup, 0.0, 1.0)
    assert asked == CROWD[:3]
    assert step == Wait(1.0)
    lookup.on_reply(asked[1].peer, [])
    assert drain(lookup, 0.1, 1.1)[0] == [CROWD[3]], "an answer frees its slot at once, without rounds"


@pytest.mark.parametrize("seed", range(10))
def test_finds_the_true_nearest_in_a_random_graph(seed):
    """Each peer knows its own neighbourhood and a few far ones; answers come in random order."""
    rng = Random(seed)
    known = {}
    for one in CROWD:
        nearby = sorted(CROWD, key=lambda other, one=one: distance(one.key, other.key))[1:21]
        known[one.peer] = nearby + rng.sample(CROWD, 10)
    lookup = Lookup(TARGET, rng.sample(CROWD, 3), width=20)
    flying = []
    while True:
        flying += drain(lookup, 0.0, 1.0)[0]
        if not flying:
            break
        one = flying.pop(rng.randrange(len(flying)))
        nearest = sorted(known[one.peer], key=lambda other: distance(other.key, TARGET))[:20]
        lookup.on_reply(one.peer, nearest)
    assert lookup.next(0.0) == Done()
    assert lookup.closest(20) == CROWD[:20]


def test_slow_peers_free_their_slot_but_late_answers_count():
    lookup = Lookup(TARGET, CROWD[:3], width=2, alpha=1)
    assert drain(lookup, 0.0, 1.0)[0] == [CROWD[0]]
    assert drain(lookup, 1.0, 2.0)[0] == [CROWD[1]], "overdue: ask the next"
    lookup.on_reply(CROWD[0].peer, [])
    lookup.on_reply(CROWD[1].peer, [])
    assert lookup.next(1.5) == Done()
    assert lookup.closest(2) == CROWD[:2]


def test_the_end_does_not_wait_for_slow_peers_unless_nobody_answered():
    lookup = Lookup(TARGET, CROWD[:2], width=2)
    drain(lookup, 0.0, 1.0)
    assert lookup.next(1.0) == Wait(None), "all slow: only they can tell anything"
    lookup.on_reply(CROWD[1].peer, [])
    assert lookup.next(1.0) == Done()
    assert lookup.closest(2) == [CROWD[1]]


def test_all_failed_is_done():
    lookup = Lookup(TARGET, CROWD[:2], width=2)
    drain(lookup, 0.0, 1.0)
    for one in CROWD[:2]:
        lookup.on_failure(one)
    assert lookup.next(0.5) == Done()
    assert lookup.closest(2) == []


def test_failed_peers_make_room_for_the_next_nearest():
    lookup = Lookup(TARGET, CROWD[:4], width=2, alpha=2)
    drain(lookup, 0.0, 1.0)
    lookup.on_failure(CROWD[0])
    assert drain(lookup, 0.0, 1.0)[0] == [CROWD[2]]


def test_other_addresses_give_a_failed_peer_another_chance_but_not_for_ever():
    victim = contact(7, "/memory/1")
    lookup = Lookup(TARGET, [victim], width=1)
    chances = 0
    for number in range(2, 10):
        asked, _ = drain(lookup, 0.0, 1.0)
        chances += len(asked)
        lookup.on_failure(asked[0] if asked else victim)
        lookup.add([victim])  # nothing new
        assert lookup.next(0.0) == Done()
        lookup.add([contact(7, f"/memory/{number}")])
    assert chances == lookups.MAX_ATTEMPTS


def test_addresses_from_several_tellers_are_merged_within_bounds():
    lookup = Lookup(TARGET, [contact(7, "/memory/1")], width=1)
    lookup.add([contact(7, *(f"/memory/{number}" for number in range(2, 40)))])
    step = lookup.next(0.0)
    assert isinstance(step, Contact)
    assert str(step.addrs[0]) == "/memory/1"
    assert len(step.addrs) == lookups.MAX_ADDRS


def test_excluded_peers_are_never_asked_and_candidates_are_bounded():
    lookup = Lookup(TARGET, CROWD, width=400, alpha=1000, exclude=frozenset((CROWD[0].peer,)))
    asked, _ = drain(lookup, 0.0, 1.0)
    assert asked == CROWD[1 : 1 + lookups.MAX_CANDIDATES]


def test_answers_of_strangers_are_harmless():
    lookup = Lookup(TARGET, CROWD[:1], width=1)
    lookup.on_failure(CROWD[9])
    lookup.on_reply(CROWD[9].peer, [])
    assert lookup.next(0.0) == CROWD[0]
