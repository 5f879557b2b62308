"""The conformance suite of byte streams: what node/transport/base.py promises, checked on any pair of ends.

Each check takes (near, far), the two ends of a fresh stream. CHECKS lists them all, for parametrize.
"""

import asyncio
import random

import pytest
from swarmnode.node.transport.base import Priority, StreamReset
from swarmnode.protocol.errors import LocalProtocolError

BIG = 5_000_003
"""More than any window."""
CHECKS = []


def check(function):
    CHECKS.append(pytest.param(function, id=function.__name__))
    return function


async def ticks(count=50):
    for _ in range(count):
        await asyncio.sleep(0)


async def far_side(far):
    """A byte each way, so that the far end exists and nothing is in flight."""
    await far.write(b"!")


@check
async def bytes_arrive_in_order_whatever_the_sizes(near, far):
    rng = random.Random(1)
    messages = [rng.randbytes(size) for size in (1, 2, 65_507, 65_508, 300_000, 1, 0, 70_000)]

    async def send():
        for message in messages:
            await near.write(message[: len(message) // 2], memoryview(message)[len(message) // 2 :])
        await near.close_write()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        for message in messages:
            assert await far.read_exactly(len(message)) == message
        assert await far.read(1) == b""


@check
async def messages_larger_than_the_window(near, far):
    data = random.Random(2).randbytes(BIG)
    async with asyncio.TaskGroup() as group:
        group.create_task(near.write(data))
        assert await far.read_exactly(BIG) == data


@check
async def full_duplex_without_deadlock(near, far):
    async def side(stream, seed):
        mine, other = (random.Random(n).randbytes(BIG) for n in (seed, 7 - seed))
        async with asyncio.TaskGroup() as group:
            group.create_task(stream.write(mine))
            assert await stream.read_exactly(BIG) == other

    async with asyncio.TaskGroup() as group:
        group.create_task(side(near, 3))
        group.create_task(side(far, 4))


@check
async def read_gives_what_is_there(near, far):
    await near.write(b"abcdef")
    got = await far.read(4)
    assert 1 <= len(got) <= 4
    while len(got) < 6:
        got += await far.read(100)
    assert got == b"abcdef"
    assert await far.read(0) == b""
    assert await far.read_exactly(0) == b""


@check
async def end_of_file_is_not_an_error_for_read_and_is_one_for_read_exactly(near, far):
    await near.write(b"abc")
    await near.close_write()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await far.read_exactly(4)
    assert caught.value.partial == b"abc"
    assert await far.read(10) == b""
    assert await far.read(10) == b""


@check
async def half_closed_streams_still_flow_the_other_way(near, far):
    await near.write(b"question")
    await near.close_write()
    assert await far.read_exactly(8) == b"question"
    assert await far.read(1) == b""
    await far.write(b"answer")
    await far.close_write()
    assert await near.read_exactly(6) == b"answer"
    assert await near.read(1) == b""


@check
async def writers_wait_for_slow_readers(near, far):
    writing = asyncio.get_running_loop().create_task(near.write(bytes(BIG)))
    done, _ = await asyncio.wait((writing,), timeout=0.2)
    assert not done
    await far.read_exactly(BIG)
    await writing


@check
async def buffers_may_be_reused_after_write(near, far):
    buffer = bytearray(b"first")
    await near.write(buffer)
    buffer[:] = b"xxxxx"
    assert await far.read_exactly(5) == b"first"


@check
async def any_contiguous_buffer_can_be_written(near, far):
    numbers = memoryview(bytes(range(16))).cast("I", shape=[2, 2])
    await near.write(b"a", bytearray(b"b"), numbers)
    await near.write()
    assert await far.read_exactly(18) == b"ab" + bytes(range(16))


@check
async def reset_wakes_and_fails_the_other_side(near, far):
    await near.write(b"x")
    await far.read_exactly(1)
    reading = asyncio.get_running_loop().create_task(far.read(1))
    await ticks()
    near.reset()
    with pytest.raises(StreamReset):
        await reading
    with pytest.raises(StreamReset):
        await far.read(1)
    with pytest.raises(StreamReset):
        await far.write(b"x")
    with pytest.raises(StreamReset):
        await near.read(1)
    with pytest.raises(StreamReset):
        await near.write(b"x")


@check
async def reset_wakes_a_blocked_writer(near, far):
    await near.write(b"x")
    await far.read_exactly(1)
    writing = asyncio.get_running_loop().create_task(near.write(bytes(BIG)))
    await asyncio.wait((writing,), timeout=0.1)
    far.reset()
    with pytest.raises(StreamReset):
        await writing


@check
async def cancelled_reads_lose_nothing(near, far):
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await far.read_exactly(10)
    await near.write(b"0123456789")
    assert await far.read_exactly(10) == b"0123456789"


@check
async def a_write_cancelled_half_way_resets_the_stream(near, far):
    await near.write(b"x")
    await far.read_exactly(1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await near.write(bytes(BIG))
    with pytest.raises(StreamReset):
        await far.read_exactly(BIG)


@check
async def a_write_cancelled_before_anything_was_sent_is_withdrawn(near, far):
    filler = asyncio.get_running_loop().create_task(near.write(bytes(BIG)))
    await asyncio.wait((filler,), timeout=0.1)
    filler.cancel()
    await asyncio.wait((filler,))
    with pytest.raises((StreamReset, LocalProtocolError)):
        await near.write(b"x")


@check
async def writing_after_close_is_our_own_mistake(near, far):
    await near.close_write()
    with pytest.raises(LocalProtocolError):
        await near.write(b"x")
    await near.close_write()
    await near.close()
    await near.close()


@check
async def one_reader_at_a_time(near, far):
    reading = asyncio.get_running_loop().create_task(far.read(1))
    await ticks()
    with pytest.raises(LocalProtocolError, match="another task"):
        await far.read(1)
    await near.write(b"x")
    assert await reading == b"x"


@check
async def closing_ends_both_directions_gently(near, far):
    await near.write(b"last words")
    await near.close()
    assert await far.read_exactly(10) == b"last words"
    assert await far.read(1) == b""
    await far.write(b"nobody listens")
    await far.close()


@check
async def priorities_can_be_set(near, far):
    for priority in Priority:
        near.set_priority(priority)
        await near.write(bytes(100_000))
        await far.read_exactly(100_000)
