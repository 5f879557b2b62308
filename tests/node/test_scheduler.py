"""The compute scheduler: order within lanes, batches, fairness, all as plain data."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from swarmnode.node.server.scheduler import BATCH_ROWS, DECODE_ROWS, MAX_DECODE_TURNS, Item, Scheduler


def item(lane, work, rows=1, group=(0, 9)):
    return Item(lane, group, rows, work)


def test_decode_steps_of_many_lanes_share_a_batch():
    scheduler = Scheduler()
    for lane in range(5):
        scheduler.add(item(lane, lane))
    assert [i.work for i in scheduler.next_batch()] == [0, 1, 2, 3, 4]
    assert scheduler.next_batch() == []


def test_other_blocks_do_not_share_a_batch():
    scheduler = Scheduler()
    scheduler.add(item(0, "a", group=(0, 9)))
    scheduler.add(item(1, "b", group=(0, 4)))
    scheduler.add(item(2, "c", group=(0, 9)))
    assert [i.work for i in scheduler.next_batch()] == ["a", "c"]
    assert [i.work for i in scheduler.next_batch()] == ["b"]


def test_a_prefill_chunk_waits_for_a_few_decode_batches_only():
    scheduler = Scheduler()
    scheduler.add(item("prompt", "chunk", rows=DECODE_ROWS + 1))
    turns = 0
    while True:
        scheduler.add(item("chat", "step"))
        if scheduler.next_batch()[0].work == "chunk":
            break
        turns += 1
    assert turns == MAX_DECODE_TURNS


def test_a_batch_is_bounded():
    scheduler = Scheduler()
    for lane in range(2 * BATCH_ROWS):
        scheduler.add(item(lane, lane))
    assert sum(i.rows for i in scheduler.next_batch()) == BATCH_ROWS


def test_a_removed_lane_is_gone():
    scheduler = Scheduler()
    scheduler.add(item(0, "x"))
    scheduler.add(item(0, "y"))
    assert [i.work for i in scheduler.remove(0)] == ["x", "y"]
    assert (len(scheduler), scheduler.rows, scheduler.next_batch()) == (0, 0, [])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(0, 1)), max_size=60))
def test_every_item_runs_once_and_in_its_lanes_order(entries):
    scheduler = Scheduler()
    for number, (lane, rows, group) in enumerate(entries):
        scheduler.add(item(lane, number, rows, group))
    seen: dict[int, list[int]] = {}
    while batch := scheduler.next_batch():
        assert len({i.group for i in batch}) == 1
        assert len({i.lane for i in batch}) == len(batch)
        for i in batch:
            seen.setdefault(i.lane, []).append(i.work)
    assert sorted(itertools.chain(*seen.values())) == list(range(len(entries)))
    assert all(works == sorted(works) for works in seen.values())
    assert scheduler.rows == 0
