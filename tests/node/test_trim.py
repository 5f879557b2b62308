"""Which connections go when there are too many."""

import asyncio

import pytest
from swarmnode.node.trim import RETRY_S, Candidate, Stranger, Trimmer, giving_way, idle


def candidate(name, *, peer=None, opened_at=0.0, used_at=0.0, streams=0, protected=False):
    return Candidate(
        connection=name,
        peer=peer or name,
        opened_at=opened_at,
        used_at=used_at,
        streams=streams,
        protected=protected,
    )


def names(candidates, **options):
    return [found.connection for found in idle(candidates, **{"now": 100.0, "grace_s": 20.0, **options})]


def test_only_the_idle_unprotected_and_grown_up_in_order_of_last_use():
    assert names(
        [
            candidate("late", used_at=50),
            candidate("busy", streams=1),
            candidate("kept", protected=True),
            candidate("new", opened_at=80.1),
            candidate("old enough", opened_at=80, used_at=80),
            candidate("early", used_at=1),
        ]
    ) == ["early", "late", "old enough"]


def test_a_peers_second_connections_go_first_and_its_last_in_its_turn():
    found = names(
        [
            candidate("a1", peer="a", used_at=70),
            candidate("a2", peer="a", used_at=60),
            candidate("b1", peer="b", used_at=90),
            candidate("b2", peer="b", streams=1),
            candidate("c", used_at=1),
        ]
    )
    assert found == ["a2", "b1", "c", "a1"]


def test_protection_can_be_passed_over_for_spares():
    assert names([candidate("kept", protected=True)], keep_protected=False) == ["kept"]


def strangers(*groups):
    return [Stranger(f"{group}{number}", group, 9.0 + number) for number, group in enumerate(groups)]


def test_the_largest_group_gives_way_to_a_smaller_one_at_once():
    assert giving_way(strangers("b", "a", "a", "a"), group="c", now=3.0) == "a1"
    assert giving_way(strangers("b", "a", "a", "a"), group="b", now=3.0) == "a1"


def test_a_group_does_not_push_itself_out_nor_an_equal_one():
    assert giving_way(strangers("a", "a", "a"), group="a", now=3.0) is None
    assert giving_way(strangers("b", "b", "a", "a", "a"), group="b", now=3.0) is None


def test_whoever_is_due_gives_way():
    assert giving_way(strangers("a", "a"), group="a", now=8.9) is None
    assert giving_way(strangers("a", "a"), group="a", now=9.0) == "a0"
    assert giving_way([], group="a", now=9.0) is None


@pytest.mark.virtual
async def test_trimming_goes_from_over_the_high_mark_to_the_low_one_and_retries(clock):
    there = {number: candidate(number, used_at=float(number)) for number in range(10)}
    closed = []

    def close(number):
        closed.append(number)
        del there[number]

    trimmer = Trimmer(
        lambda: list(there.values()),
        close,
        now=clock.now,
        high_water=10,
        low_water=7,
        grace_s=clock.now() + 2 * RETRY_S,
    )
    trimmer.check(len(there))
    assert closed == []
    there[10] = candidate(10, used_at=10.0)
    trimmer.check(len(there))
    await asyncio.sleep(RETRY_S - 0.1)
    assert closed == []  # all in their grace
    await asyncio.sleep(1.5 * RETRY_S)
    assert closed == [0, 1, 2, 3]
    trimmer.aclose()
