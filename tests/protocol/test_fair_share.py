"""A shared rate: exact in sum, fair between keys, kind to who asks for little."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol.fair_share import CREDIT, MAX_KEYS, MIN_BURST, FairShare

RATE = 1_000_000.0
PIECE = 10_000


def run(share, greedy, seconds, modest=(), piece=PIECE):
    """Simulate: each greedy (key, parallel) asks again whenever a turn came; (key, every_s) asks that often.

    Returns bytes by key, and the longest wait of each modest key.
    """
    now, carried, waits, owner = 0.0, {}, {}, {}
    clocks = {key: 0.0 for key, _ in modest}

    def ask(key):
        turn = share.ask(key, piece, now)
        if turn is None:
            carried[key] = carried.get(key, 0) + piece
            return True
        owner[id(turn)] = (key, now, turn)
        return False

    def refill(key):
        while ask(key):
            pass

    for key, parallel in greedy:
        for _ in range(parallel):
            refill(key)
    while now < seconds:
        steps = [share.wait_s() or 0.0, *(clocks[key] - now for key in clocks)]
        now += max(1e-6, min(steps))
        for key, every in modest:
            if clocks[key] <= now:
                clocks[key] += every
                ask(key)
        for turn in share.due(now):
            key, since, _ = owner.pop(id(turn))
            carried[key] = carried.get(key, 0) + piece
            if key in clocks:
                waits[key] = max(waits.get(key, 0.0), now - since)
            else:
                refill(key)
    return carried, waits


def test_the_sum_is_the_rate():
    carried, _ = run(FairShare(RATE, 0.0), [("a", 3), ("b", 1)], 10.0)
    assert RATE * 10 <= sum(carried.values()) <= RATE * 10 + MIN_BURST + 2 * PIECE


def test_equal_parts_however_many_turns_one_asks_for():
    carried, _ = run(FairShare(RATE, 0.0), [("flood", 200), ("a", 1), ("b", 2)], 10.0)
    assert max(carried.values()) - min(carried.values()) <= MIN_BURST + CREDIT + 2 * PIECE


def test_who_asks_for_little_hardly_waits():
    greedy = [(f"flood {n}", 20) for n in range(16)]
    carried, waits = run(FairShare(RATE, 0.0), greedy, 10.0, modest=[("honest", 0.5)])
    assert carried["honest"] == 20 * PIECE  # all it asked for, though floods want everything
    assert waits["honest"] <= 17 * PIECE / RATE  # one turn of everybody else at most


def test_who_stays_below_its_part_waits_for_one_turn():
    """Nine tenths of an equal part, in the company of floods: served as if alone."""
    every = 17 * PIECE / RATE / 0.9
    carried, waits = run(
        FairShare(RATE, 0.0), [(f"flood {n}", 20) for n in range(16)], 30.0, modest=[("honest", every)]
    )
    assert carried["honest"] >= int(30 / every) * PIECE
    late = run(FairShare(RATE, 0.0), [(f"flood {n}", 20) for n in range(16)], 90.0, modest=[("honest", every)])
    assert late[1]["honest"] == waits["honest"]  # no worse in the long run than at first
    assert waits["honest"] <= 17 * PIECE / RATE


def test_no_rate_no_waiting():
    share = FairShare(0, 0.0)
    assert all(share.ask("a", 1 << 40, 0.0) is None for _ in range(100))
    assert share.wait_s() is None


def test_what_is_cancelled_does_not_go():
    share = FairShare(RATE, 0.0)
    while (turn := share.ask("a", MIN_BURST, 0.0)) is None:
        pass
    other = share.ask("b", PIECE, 0.0)
    turn.cancelled = True
    assert len(share) == 1
    assert share.due(1.0) == [other]
    assert share.wait_s() is None


def test_memory_is_bounded():
    for pause in (0.0, PIECE / RATE, 1.0):
        share = FairShare(RATE, 0.0)
        for number in range(3 * MAX_KEYS):
            share.ask(number, PIECE, number * pause)
            assert len(share._ends) <= MAX_KEYS


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70_000), st.floats(0, 0.1)), max_size=200))
def test_never_more_than_the_rate(asked):
    """Whatever is asked when: by any time, no more has gone than the bucket and the rate allow, and one piece."""
    share, now, gone = FairShare(RATE, 0.0), 0.0, 0
    for key, size, pause in asked:
        now += pause
        gone += sum(turn.size for turn in share.due(now))
        gone += size if share.ask(key, size, now) is None else 0
        assert gone <= MIN_BURST + RATE * now + 70_000
    for _ in range(len(asked)):
        if (wait := share.wait_s()) is None:
            break
        now += wait
        share.due(now + 1e-9)
    assert len(share) == 0


@pytest.mark.parametrize("rate", [1000.0, 1e7])
def test_nobody_is_forgotten(rate):
    share = FairShare(rate, 0.0)
    waiting = {id(turn) for turn in [share.ask(n % 5, 50_000, 0.0) for n in range(100)] if turn is not None}
    assert len(share) == len(waiting) > 0
    now = 0.0
    while (wait := share.wait_s()) is not None:
        now += wait + 1e-6
        waiting -= {id(turn) for turn in share.due(now)}
    assert not waiting
    assert now == pytest.approx(5_000_000 / rate, rel=0.1)
