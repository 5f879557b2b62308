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


# Hedges


def ask_all(lookup, now, **times):
    asked = []
    while isinstance(step := lookup.next(now), Contact):
        lookup.asked(step, **times)
        asked.append(step)
    return asked, step


def test_candidates_that_must_be_in_the_result_are_asked_at_once():
    near = distance(CROWD[29].key, TARGET)
    lookup = Lookup(TARGET, CROWD[:40], width=20, alpha=3, near=near)
    assert ask_all(lookup, 0.0, deadline=9.0)[0] == CROWD[:20]
    lookup = Lookup(TARGET, CROWD[:40], width=40, alpha=3, near=near)
    assert ask_all(lookup, 0.0, deadline=9.0)[0] == CROWD[: lookups.FINAL_ALPHA]


def test_a_silent_peers_place_is_asked_before_it_is_given_up():
    lookup = Lookup(TARGET, CROWD[:12], width=4, alpha=4)
    asked, step = ask_all(lookup, 0.0, deadline=2.0, hedge_at=1.0, late_at=3.0)
    assert (asked, step) == (CROWD[:4], Wait(1.0))
    for one in CROWD[:3]:
        lookup.on_reply(one.peer, [])
    assert lookup.next(0.9) == Wait(1.0)
    assert ask_all(lookup, 1.0, deadline=4.0)[0] == [CROWD[4]], "somebody else, without waiting for the end of it"
    lookup.on_reply(CROWD[4].peer, [])
    assert lookup.next(1.5) == Wait(2.0), "its answer would still be better"
    assert lookup.next(2.5) == Wait(3.0), "one alone may be late"
    assert lookup.next(3.0) == Done()
    assert lookup.closest(4) == [*CROWD[:3], CROWD[4]]


def test_many_silent_at_once_are_dead_not_late():
    lookup = Lookup(TARGET, CROWD[:12], width=6, alpha=6)
    ask_all(lookup, 0.0, deadline=2.0, hedge_at=1.0, late_at=30.0)
    for one in CROWD[:3]:
        lookup.on_reply(one.peer, [])
    more, _ = ask_all(lookup, 1.0, deadline=20.0)
    for one in more:
        lookup.on_reply(one.peer, [])
    for one in ask_all(lookup, 2.0, deadline=20.0)[0]:
        lookup.on_reply(one.peer, [])
    assert lookup.next(2.0) == Done(), "nobody waits until 30"


def test_some_lateness_is_expected_and_costs_no_questions():
    lookup = Lookup(TARGET, CROWD[:40], width=20, alpha=20)
    ask_all(lookup, 0.0, deadline=2.0, hedge_at=1.0)
    for one in CROWD[: 20 - int(20 * lookups.LATE_SHARE)]:
        lookup.on_reply(one.peer, [])
    assert lookup.next(1.5) == Wait(2.0)


# Liars


def test_a_teller_of_dead_peers_is_heard_last():
    liar, honest = CROWD[50], CROWD[51]
    lookup = Lookup(TARGET, [liar, honest], width=3, alpha=2)
    drain(lookup, 0.0, 9.0)
    lookup.on_reply(liar.peer, CROWD[:20])
    junk = []
    for _ in range(lookups.DOUBT_FAILURES):
        (asked,), _ = drain(lookup, 0.0, 9.0)
        junk.append(asked)
        lookup.on_failure(asked)
    assert junk == CROWD[: lookups.DOUBT_FAILURES]
    lookup.on_reply(honest.peer, CROWD[30:32])
    assert drain(lookup, 0.0, 9.0)[0] == CROWD[30:32], "farther, but from a better source"
    for one in CROWD[30:32]:
        lookup.on_reply(one.peer, [CROWD[8]])
    assert drain(lookup, 0.0, 9.0)[0] == [CROWD[8]], "somebody else vouches for it"


def test_junk_is_asked_when_nothing_else_is_left():
    lookup = Lookup(TARGET, [CROWD[50]], width=2, alpha=1)
    drain(lookup, 0.0, 9.0)
    lookup.on_reply(CROWD[50].peer, CROWD[:8])
    asked = []
    while isinstance(step := lookup.next(0.0), Contact):
        lookup.asked(step, 9.0)
        asked.append(step)
        if step == CROWD[7]:
            lookup.on_reply(step.peer, [])
        else:
            lookup.on_failure(step)
    assert asked == CROWD[:8], "after most of a swarm died its last members are still found"
    assert lookup.closest(2) == [CROWD[7], CROWD[50]]


def test_a_silent_peer_is_asked_where_others_say_it_is():
    liar, honest = CROWD[50], CROWD[51]
    victim = CROWD[0]
    wrong, right = (Contact(victim.peer, (Multiaddr.parse(f"/memory/{number}"),)) for number in (1, 2))
    lookup = Lookup(TARGET, [liar, honest], width=2, alpha=2)
    drain(lookup, 0.0, 9.0)
    lookup.on_reply(liar.peer, [wrong])
    assert ask_all(lookup, 0.0, deadline=2.0, hedge_at=1.0)[0] == [wrong]
    lookup.on_reply(honest.peer, [right])
    assert lookup.next(0.5) == Wait(1.0)
    assert ask_all(lookup, 1.0, deadline=9.0)[0] == [right]
    lookup.on_failure(wrong)
    assert lookup.next(1.0) == Wait(9.0), "what fails now is the old question"
    lookup.on_reply(victim.peer, [])
    assert lookup.next(1.0) == Done()
    assert lookup.closest(1) == [right]


def at(one, subnet):
    return Contact(one.peer, (Multiaddr.parse(f"/ip4/9.9.{subnet}.1/tcp/1"),))


def test_a_subnet_counts_once_while_there_are_others():
    crowded = [at(one, 1) for one in CROWD[:10]]
    others = [at(one, 2 + number) for number, one in enumerate(CROWD[10:13])]
    lookup = Lookup(TARGET, [*crowded, *others], width=3, per_subnet=1, alpha=9)
    assert drain(lookup, 0.0, 9.0)[0] == [crowded[0], *others[:2]]
    for one in (crowded[0], *others[:2]):
        lookup.on_reply(one.peer, [], one.addrs[0])
    assert lookup.next(0.0) == Done()
    assert lookup.closest(2) == [crowded[0], others[0]]
    few = Lookup(TARGET, crowded, width=3, per_subnet=1, alpha=9)
    assert drain(few, 0.0, 9.0)[0] == crowded[:3], "a swarm in one subnet is a swarm"


def test_what_counts_is_where_a_peer_was_met():
    claimed = [at(one, number) for number, one in enumerate(CROWD[:4])]
    lookup = Lookup(TARGET, claimed, width=2, per_subnet=1, alpha=9)
    real = Multiaddr.parse("/ip4/9.9.99.1/tcp/1")
    asked, _ = drain(lookup, 0.0, 9.0)
    while asked:
        lookup.on_reply(asked.pop(0).peer, [], real)
        asked += drain(lookup, 0.0, 9.0)[0]
    assert len(lookup.closest(4)) == 4
    assert lookup.next(0.0) == Done()


def test_everybody_in_the_region_must_answer():
    region = distance(CROWD[19].key, TARGET)
    spread = [at(one, number) for number, one in enumerate(CROWD[:40])]
    lookup = Lookup(TARGET, spread, width=5, per_subnet=1, alpha=100, region=region)
    asked, _ = drain(lookup, 0.0, 9.0)
    assert asked == spread[:20]
    for one in asked[:-1]:
        lookup.on_reply(one.peer, [], one.addrs[0])
    assert lookup.next(0.0) == Wait(9.0), "although 19 have answered and 5 were wanted"
    lookup.on_reply(asked[-1].peer, [], asked[-1].addrs[0])
    assert lookup.next(0.0) == Done()
    assert lookup.crowd() == 20
    assert lookup.closest(5) == spread[:20]


def test_a_region_is_bounded():
    spread = [at(one, number) for number, one in enumerate(CROWD[:120])]
    lookup = Lookup(TARGET, spread, width=5, per_subnet=1, alpha=1000, region=1 << 256)
    assert drain(lookup, 0.0, 9.0)[0] == spread[: lookups.MAX_REGION]


def drive(lookup, answers):
    """Ask until the end; who is not in `answers` names nobody. Returns whom it asked."""
    everybody = []
    while True:
        asked, step = drain(lookup, 0.0, 9.0)
        everybody += asked
        for one in asked:
            lookup.on_reply(one.peer, answers.get(one.peer, []))
        if step == Done():
            return everybody


def test_a_path_captured_by_liars_takes_no_other_with_it():
    """The liar names only accomplices, who lie nearer to the target than anybody honest."""
    liar, honest = CROWD[60], CROWD[61]
    accomplices, good = CROWD[:10], CROWD[20:30]
    answers = {one.peer: accomplices for one in (liar, *accomplices)} | {one.peer: good for one in (honest, *good)}
    one_path = Lookup(TARGET, [liar, honest], width=5, alpha=1)
    assert not set(drive(one_path, answers)) & set(good)
    two_paths = Lookup(TARGET, [liar, honest], width=5, alpha=8, paths=2)
    asked = drive(two_paths, answers)
    assert set(asked) == {liar, honest, *accomplices[:5], *good[:5]}
    assert len(asked) == len(set(asked)), "nobody is asked on two paths"
    assert set(two_paths.closest(10)) == {*accomplices[:5], *good[:5]}


def test_what_one_path_asked_another_need_not():
    first, second = CROWD[60], CROWD[61]
    shared, farther = CROWD[0], CROWD[5]
    lookup = Lookup(TARGET, [first, second], width=1, alpha=8, paths=2)
    asked = drive(lookup, {first.peer: [shared], second.peer: [shared, farther]})
    assert set(asked) == {first, second, shared}
    assert lookup.closest(1) == [shared]


def test_paths_are_bounded():
    lookup = Lookup(TARGET, CROWD[:100], width=1, paths=1000, alpha=1)
    assert len(drain(lookup, 0.0, 9.0)[0]) <= 2 * lookups.MAX_PATHS


def test_peers_already_known_need_not_be_named_but_every_second_answer_names_them():
    first, second = CROWD[50], CROWD[51]
    lookup = Lookup(TARGET, [first, second], width=30, alpha=1)
    drain(lookup, 0.0, 9.0)
    lookup.on_reply(first.peer, CROWD[:5])
    lists = []
    while isinstance(step := lookup.next(0.0), Contact):
        lists.append(set(lookup.known(step.peer, 99)))
        lookup.asked(step, 9.0)
        lookup.on_reply(step.peer, [])
        if len(lists) == 4:
            break
    with_all = [known >= set(CROWD[:5]) for known in lists]
    assert with_all in ([True, False, True, False], [False, True, False, True])
    assert all(known >= {first, second} for known in lists), "our own contacts were not hearsay"
    assert len(lookup.known(CROWD[4].peer, 2)) == 2
