"""The compute scheduler: order within lanes, batches, fairness, all as plain data."""

from hypothesis import given
from hypothesis import strategies as st
from swarmnode.node.server.scheduler import BATCH_ROWS, DECODE_ROWS, MAX_DECODE_TURNS, Item, Scheduler


def item(lane, work, rows=1, group=(0, 9), user=None, also=None):
    return Item(lane, group, rows, work, user, also)


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


def test_waiting_steps_ride_along_with_a_chunk():
    scheduler = Scheduler()
    for turn in range(MAX_DECODE_TURNS):
        scheduler.add(item("chat", turn))
    scheduler.add(item("chat", "last"))
    scheduler.add(item("elsewhere", "no", group=(4, 9)))
    scheduler.add(item("prompt", "chunk", rows=100))
    batches = [[i.work for i in scheduler.next_batch()] for _ in range(MAX_DECODE_TURNS + 1)]
    assert ["chunk", "last"] in batches or ["chunk", MAX_DECODE_TURNS - 1] in batches
    assert all("no" not in batch for batch in batches if "chunk" in batch)


def test_many_sessions_of_one_user_do_not_crowd_out_another():
    scheduler = Scheduler()
    for lane in range(3 * BATCH_ROWS):
        scheduler.add(item(("many", lane), "many", user="many"))
    scheduler.add(item("one", "one", user="one"))
    assert "one" in [i.work for i in scheduler.next_batch()]


def test_prompts_of_two_users_take_turns():
    scheduler = Scheduler()
    for lane in range(4):
        scheduler.add(item(("many", lane), "many", rows=100, user="many"))
    scheduler.add(item("one", "one", rows=100, user="one"))
    assert [scheduler.next_batch()[0].work for _ in range(3)] == ["many", "one", "many"]


def test_idleness_saves_up_nothing():
    scheduler = Scheduler()
    for number in range(50):
        scheduler.add(item("busy", number, rows=100, user="busy"))
    for _ in range(20):
        scheduler.next_batch()
    for number in range(10):
        scheduler.add(item("back", f"back {number}", rows=100, user="back"))
    works = [scheduler.next_batch()[0].work for _ in range(8)]
    assert sum(isinstance(work, int) for work in works) == 4


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


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(0, 1), st.integers(0, 2)), max_size=60),
    st.lists(st.integers(0, 6), max_size=8),
)
def test_every_item_runs_once_and_in_its_lanes_order(entries, removals):
    """Against the plainest model: a list per lane."""
    scheduler, model = Scheduler(), {}
    for number, (lane, rows, group, user) in enumerate(entries):
        scheduler.add(item(lane, number, rows, group, user))
        model.setdefault(lane, []).append(number)
    for lane in removals:
        assert [i.work for i in scheduler.remove(lane)] == model.pop(lane, [])
        for i in scheduler.next_batch():
            assert model[i.lane].pop(0) == i.work
    while batch := scheduler.next_batch():
        assert len({i.group for i in batch}) == 1
        assert len({i.lane for i in batch}) == len(batch)
        for i in batch:
            assert model[i.lane].pop(0) == i.work
        assert len(scheduler) == sum(map(len, model.values()))
    assert not any(model.values())
    assert (scheduler.rows, scheduler._served, scheduler._waiting) == (0, {}, {})


def test_a_move_waits_for_both_lanes_and_goes_alone():
    scheduler = Scheduler()
    for lane in ("from", "to", "other"):
        scheduler.add(item(lane, f"{lane} 1"))
    scheduler.add(item("from", "move", rows=0, also="to"))
    scheduler.add(item("from", "from 2"))
    scheduler.add(item("to", "to 2"))
    batches = []
    while batch := scheduler.next_batch():
        batches.append([i.work for i in batch])
    assert batches == [["from 1", "to 1", "other 1"], ["move"], ["from 2", "to 2"]]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 0, 1, 30])), max_size=40),
    st.lists(st.integers(0, 3), max_size=2),
)
def test_moves_keep_their_place_in_both_lanes(entries, removals):
    """Whatever is added and removed: nothing waits for ever, and in each lane everything runs in its order."""
    scheduler, model = Scheduler(), {lane: [] for lane in range(4)}
    for number, (lane, also, rows) in enumerate(entries):
        also = also if rows == 0 and also != lane else None
        scheduler.add(item(lane, number, rows, also=also))
        for each in {lane, also} - {None}:
            model[each].append(number)
    for lane in removals:
        gone = [i.work for i in scheduler.remove(lane)]
        assert gone == model[lane]
        model = {lane: [number for number in numbers if number not in gone] for lane, numbers in model.items()}
    while batch := scheduler.next_batch():
        assert len(batch) == 1 or all(i.rows for i in batch)
        for i in batch:
            assert all(model[lane].pop(0) == i.work for lane in i.lanes)
        assert len(scheduler) == len({number for numbers in model.values() for number in numbers})
    assert not any(model.values())
    assert (scheduler.rows, scheduler._served, scheduler._waiting) == (0, {}, {})


@given(
    st.lists(st.integers(1, 90), min_size=2, max_size=4), st.lists(st.sampled_from([1, 3, 8]), min_size=4, max_size=4)
)
def test_users_who_always_wait_get_even_shares(sessions, sizes):
    """However many sessions each has open, and whatever the sizes of their steps."""
    scheduler, served = Scheduler(), dict.fromkeys(range(len(sessions)), 0)
    for user, count in enumerate(sessions):
        for lane in range(max(count, BATCH_ROWS // sizes[user] + 1)):
            scheduler.add(item((user, lane), None, sizes[user], user=user))
    for _ in range(20):
        for i in scheduler.next_batch():
            served[i.user] += i.rows
            scheduler.add(item(i.lane, None, i.rows, user=i.user))
        assert max(served.values()) - min(served.values()) <= 2 * DECODE_ROWS
