"""The conformance suite of byte streams, second part: cancellation, races, death, crowds, and nothing left over.

Where a moment matters, the check goes through them all: an operation is cancelled after 0, 1, 2... turns of the loop.
"""

import asyncio
import contextlib
import random

import pytest
from helpers.hosts import at_rest, held
from helpers.streams import BIG, blocked, fill, read_all, send_all, spawn
from swarmnode.node.transport.base import ConnectionClosed, StreamReset
from swarmnode.protocol.errors import LocalProtocolError

TROUBLE = []
MOMENTS = 12
"""Turns of the loop after which things are cancelled."""
CROWD = 100
RACES = 40


def check(function):
    """One of the suite."""
    TROUBLE.append(function)
    return function


def needs_connection(function):
    """Not for streams that stay inside the process."""
    function.needs_connection = True
    return function


async def cancelled_after(turns, work):
    """Start work, cancel it so many turns of the loop later; what came of it, None if it was cancelled."""
    task = spawn(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    return None if task.cancelled() else task.result()


# Cancellation


@check
async def reads_that_time_out_lose_nothing(world):
    near, far = await world.open()
    for read in (far.read, far.read_exactly):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await read(10)
    await near.write(b"0123456789")
    assert await far.read_exactly(10) == b"0123456789"


@check
async def a_deadline_long_past_or_far_away(world):
    near, far = await world.open()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(-1):
            await far.read(10)
    await near.write(b"here")
    async with asyncio.timeout(3600):
        assert await far.read_exactly(4) == b"here"


@check
async def reads_cancelled_at_any_moment_lose_and_repeat_nothing(world):
    near, far = await world.open()
    text = random.Random(1).randbytes(60_000)
    sending = spawn(send_all(near, text))
    got = bytearray()
    for moment in range(400):
        size = 1 + moment * 7 % 500
        exact = moment // MOMENTS % 2 and len(got) + size <= len(text)
        got += await cancelled_after(moment % MOMENTS, far.read_exactly(size) if exact else far.read(size)) or b""
    await sending
    got += await read_all(far)
    assert got == text


@check
async def writes_cancelled_at_any_moment_are_whole_or_nothing_or_reset(world):
    outcomes = set()
    for moment in range(MOMENTS):
        for size in (1, 100_000, BIG):
            near, far = await world.open()
            reading = spawn(read_all(far))
            outcomes.add(await a_cancelled_write(near, reading, size, moment))
    assert "reset" in outcomes, "no write was cancelled half way: too few moments"


async def a_cancelled_write(near, reading, size, moment):
    """Cancel a write at a moment, then write once more; what the reader then has tells how it went."""
    data = random.Random(size).randbytes(size)
    with contextlib.suppress(StreamReset):
        await cancelled_after(moment, near.write(data))
        await send_all(near, b"after")
    try:
        got = await reading
    except StreamReset:
        return "reset"
    assert got in (b"after", data + b"after")
    return "whole" if len(got) > 5 else "nothing"


@check
async def a_write_cancelled_half_way_resets_the_stream(world):
    near, far = await world.open()
    await near.write(b"x")
    await far.read_exactly(1)
    writing = spawn(near.write(bytes(BIG)))
    await blocked(world, writing)
    writing.cancel()
    await asyncio.wait((writing,))
    for failing in (far.read_exactly(BIG), near.write(b"x"), near.read(1)):
        with pytest.raises(StreamReset):
            await failing


@check
async def a_write_cancelled_before_anything_was_sent_is_withdrawn(world):
    near, far = await world.open()
    sent, writing = await fill(world, near)
    writing.cancel()
    await asyncio.wait((writing,))
    assert await far.read_exactly(sent) == bytes(sent)
    await send_all(near, b"next")
    assert await read_all(far) == b"next"


# Races


@check
async def racy_use_ends_in_data_or_typed_errors(world):
    """Tasks read, write, half-close, close and reset both ends in any order: nothing hangs, nothing unexpected."""
    rng = random.Random(7)
    for _ in range(RACES):
        ends = await world.open()
        async with asyncio.TaskGroup() as group:
            for stream in ends:
                for act in rng.sample(("read", "write", "close_write", "close", "reset"), 3):
                    group.create_task(racer(stream, act, rng.randrange(MOMENTS)))
                group.create_task(racer(stream, "close", 3 * MOMENTS))
        world.finish(ends[1])


async def racer(stream, act, delay):
    for _ in range(delay):
        await asyncio.sleep(0)
    try:
        match act:
            case "read":
                data = await stream.read_exactly(70_000)
                assert set(data) == {1}
            case "write":
                await stream.write(b"\1" * 70_000)
            case "reset":
                stream.reset()
            case _:
                await getattr(stream, act)()
    except (StreamReset, LocalProtocolError, asyncio.IncompleteReadError):
        pass  # closed before, or by the other side meanwhile


@check
async def closing_and_resetting_from_other_tasks_wakes_whoever_waits(world):
    for act in ("close", "reset"):
        for end in (0, 1):
            ends = await world.open()
            reading = [spawn(stream.read_exactly(10)) for stream in ends]
            await blocked(world, reading[0])
            if act == "close":
                await ends[end].close()
                await ends[1 - end].close()
            else:
                ends[end].reset()
            done, waiting = await asyncio.wait(reading, timeout=30)
            assert not waiting
            for task in done:
                assert isinstance(task.exception(), StreamReset | LocalProtocolError | asyncio.IncompleteReadError)


# Death


@check
@needs_connection
async def death_of_the_connection_fails_everything_that_waits(world):
    (near, far), (full, unread) = await world.open(), await world.open()
    waiting = [spawn(near.read(1)), spawn(far.read_exactly(9)), spawn(full.write(bytes(BIG))), spawn(unread.read(BIG))]
    await blocked(world, waiting[0])
    world.sever()
    for task in (*waiting[:3],):
        with pytest.raises(ConnectionClosed):
            await task
    assert set(await waiting[3]) == {0}


@check
@needs_connection
async def nothing_works_on_a_dead_connection_and_nothing_hangs(world):
    near, far = await world.open()
    world.sever()
    with contextlib.suppress(ConnectionClosed):
        await far.read(1)
    for stream in (near, far):
        for use in (
            stream.read(1),
            stream.read_exactly(1),
            stream.write(b"x"),
            stream.write(bytes(BIG)),
            stream.write(),
        ):
            with pytest.raises(ConnectionClosed):
                await use
        stream.reset()
        await stream.close_write()
        await stream.close()
        stream.reset()


@check
@needs_connection
async def a_write_meets_a_connection_that_dies_at_any_moment(world):
    for moment in range(MOMENTS):
        near, far = await world.open()
        await near.write(b"x")
        await far.read_exactly(1)
        writing = spawn(near.write(bytes(BIG)))
        for _ in range(moment):
            await asyncio.sleep(0)
        for wire in world.two._wires.to(world.one.peer_id):
            wire.abort("severed by the test, at the other end")
        with pytest.raises(ConnectionClosed):
            await writing
        with pytest.raises(ConnectionClosed):
            await far.read_exactly(BIG)


@check
@needs_connection
async def what_came_before_the_death_can_be_read_but_no_end(world):
    near, far = await world.open()
    await near.write(b"half a text")
    await world.settle()
    world.sever()
    assert await far.read_exactly(11) == b"half a text"
    with pytest.raises(ConnectionClosed):
        await far.read(1)


@check
@needs_connection
async def after_a_death_there_is_a_new_connection(world):
    near, far = await world.open()
    world.sever()
    with pytest.raises(ConnectionClosed):
        await near.read(1)
    world.finish(far)
    await at_rest(world.one, world.two)
    near, far = await world.open()
    await near.write(b"again")
    assert await far.read_exactly(5) == b"again"


# Crowds


@check
async def many_streams_at_once_keep_their_texts_apart(world):
    first = [await world.open() for _ in range(3)]  # some stay idle all the while
    crowd = [await world.open() for _ in range(CROWD)]
    await asyncio.gather(*(both_ways(ends, number) for number, ends in enumerate(crowd)))
    for near, far in first:
        await near.write(b"still here")
        assert await far.read_exactly(10) == b"still here"


async def both_ways(ends, number):
    """A text of its own in each direction of a stream."""
    texts = [random.Random(2 * number + end).randbytes(number * 200) for end in (0, 1)]
    async with asyncio.TaskGroup() as group:
        for stream, text in zip(ends, texts, strict=True):
            group.create_task(send_all(stream, text))
        heard = [group.create_task(read_all(stream)) for stream in ends]
    assert [task.result() for task in heard] == texts[::-1]


@check
async def ended_streams_leave_nothing_behind(world):
    """However they ended: by both sides' end, close at either, reset at either."""
    for number in range(3 * len(ENDINGS)):
        near, far = await world.open()
        await near.write(bytes(10_000))
        await far.read_exactly(5000)
        for stream, act in zip((near, far), ENDINGS[number % len(ENDINGS)], strict=True):
            if act == "reset":
                stream.reset()
            else:
                await getattr(stream, act)()
        world.finish(far)
        await world.settle()
        await near.close()
    await at_rest(world.one, world.two, within_s=5.0)
    assert held(world.one) == held(world.two) == {}


ENDINGS = [(a, b) for a in ("close", "close_write", "reset") for b in ("close", "close_write", "reset")]
