"""The compute thread: jobs and moves of lanes in their order, memory given back."""

import random

import pytest
from helpers.workers import Desk, payload
from swarmnode.protocol.errors import LocalProtocolError

TEXT = [(7 * n + n * n // 5) % 64 for n in range(300)]
SLIDING = {"sliding_window": 40, "sliding_blocks": (True, False, True)}


@pytest.fixture(params=[{}, SLIDING], ids=["full", "sliding"])
async def desk(request):
    async with Desk(**request.param) as desk:
        yield desk


async def test_a_fork_goes_on_from_where_its_origin_was(desk):
    text = TEXT[:150]
    expected = await desk.alone(text)
    width = len(expected) // len(text)
    other = [*text[:130], 1, 2, 3]
    seat = desk.open(lanes=2)
    jobs = [desk.tokens(seat, text[:100], 0), desk.tokens(seat, text[100:130], 100)]
    desk.worker.fork(seat, 0, 1)
    jobs.append(desk.tokens(seat, text[130:], 130))
    forked = desk.tokens(seat, other[130:], 130, lane=1)
    assert b"".join([payload(await job) for job in jobs]) == expected
    assert payload(await forked) == (await desk.alone(other))[130 * width :]


async def test_a_fork_waits_for_what_was_submitted_before_and_not_for_what_comes_after(desk):
    """The origin has gone far beyond, and the target held something else, when all is awaited at once."""
    seat = desk.open(lanes=2)
    desk.tokens(seat, TEXT[200:290], 0, lane=1)
    desk.tokens(seat, TEXT[:70], 0)
    desk.worker.fork(seat, 0, 1)
    last = [desk.tokens(seat, [token], 70 + n) for n, token in enumerate(TEXT[70:90])][-1]
    forked = desk.tokens(seat, TEXT[70:90], 70, lane=1)
    assert payload(await forked)[-512:] == payload(await last)
    assert [cache.length for cache in seat.caches] == [90, 90]


async def test_a_fork_takes_no_memory_until_one_writes():
    async with Desk() as desk:
        seat = desk.open(lanes=4, max_length=256)
        await desk.rows(seat, TEXT[:192], 0)
        before = desk.pool.used_bytes
        for lane in (1, 2, 3):
            desk.worker.fork(seat, 0, lane)
        await desk.settle()
        assert desk.pool.used_bytes == before
        await desk.rows(seat, [1], 192, lane=2)
        assert desk.pool.used_bytes == before + 3 * desk.pool.page_bytes


async def test_a_dropped_lane_gives_its_memory_back_and_can_be_used_again(desk):
    seat = desk.open(lanes=2)
    expected = await desk.rows(seat, TEXT[:90], 0)
    desk.tokens(seat, TEXT[100:200], 0, lane=1)
    desk.worker.drop(seat, 1)
    await desk.settle()
    assert (seat.caches[1].length, seat.caches[1].held_bytes) == (0, 0)
    assert await desk.rows(seat, TEXT[:90], 0, lane=1) == expected
    desk.worker.drop(seat, 0)
    desk.worker.fork(seat, 1, 0)
    assert await desk.rows(seat, TEXT[90:95], 90) == await desk.rows(seat, TEXT[90:95], 90, lane=1)


async def test_moves_of_a_released_seat_are_forgotten(desk):
    seat = desk.open(lanes=2)
    jobs = [desk.tokens(seat, TEXT[:64], 0) for _ in range(3)]
    desk.worker.fork(seat, 0, 1)
    desk.worker.release(seat)
    desk.worker.fork(seat, 0, 1)
    desk.worker.drop(seat, 0)
    await desk.settle()
    assert (desk.pool.used_bytes, desk.pool.promised_bytes, desk.pool.lanes) == (0, 0, 0)
    assert len(desk.worker._scheduler) == 0
    for job in jobs:
        job.cancel()


async def test_lanes_that_are_not_there_are_named(desk):
    seat = desk.open(lanes=2)
    for bad in (-1, 2):
        with pytest.raises(LocalProtocolError, match=f"lane {bad}"):
            desk.worker.fork(seat, 0, bad)
        with pytest.raises(LocalProtocolError, match=f"lane {bad}"):
            desk.worker.fork(seat, bad, 0)
        with pytest.raises(LocalProtocolError, match=f"lane {bad}"):
            desk.worker.drop(seat, bad)
    desk.worker.fork(seat, 1, 1)


@pytest.mark.parametrize("seed", range(3))
async def test_random_forks_drops_and_steps_equal_solo_runs(seed, desk):
    """A beam search without its reason: lanes are forked over one another at random, all at once on the thread."""
    rng = random.Random(seed)
    seat, texts = desk.open(lanes=4), [[] for _ in range(4)]
    waiting = []
    for _ in range(60):
        lane, other = rng.sample(range(4), 2)
        match rng.randrange(6):
            case 0 | 1:
                desk.worker.fork(seat, lane, other)
                texts[other] = list(texts[lane])
            case 2 if rng.random() < 0.3:
                desk.worker.drop(seat, lane)
                texts[lane] = []
            case 3 if texts[lane]:
                del texts[lane][rng.randint(max(0, len(texts[lane]) - 20), len(texts[lane])) :]
            case _:
                more = [rng.randrange(64) for _ in range(rng.choice((1, 1, 3, 20)))]
                job = desk.tokens(seat, more, len(texts[lane]), lane)
                texts[lane] += more
                waiting.append((list(texts[lane]), len(more), job))
    outcomes = [payload(await job) for *_, job in waiting]
    longest = {}
    for text, count, _ in waiting:
        key = tuple(text)
        if key not in longest:
            longest[key] = await whole(desk, text)
        assert outcomes.pop(0) == longest[key][-512 * count :]


async def whole(desk, text):
    seat = desk.open()
    out = await desk.rows(seat, text, 0)
    desk.worker.release(seat)
    return out


async def test_a_release_frees_everything_at_once(desk):
    seats = [desk.open(lanes=2, max_length=300) for _ in range(8)]
    jobs = [desk.tokens(seat, TEXT[:200], 0, lane) for seat in seats for lane in (0, 1)]
    await jobs[0]
    for seat in seats:
        desk.worker.release(seat)
    assert len(desk.worker._scheduler) == 0
    done = sum(job.done() for job in jobs)
    await desk.settle()
    assert (desk.pool.used_bytes, desk.pool.promised_bytes, desk.pool.lanes) == (0, 0, 0)
    assert sum(job.done() for job in jobs) == done
    for job in jobs:
        job.cancel()
