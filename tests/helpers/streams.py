"""The conformance suite of byte streams, first part: what arrives, in what pieces, and how a stream ends.

Each check takes a World (helpers/kinds.py) and opens the streams it needs; it leaves none blocked. What
node/transport/base.py promises is checked here and in helpers/stream_trouble.py, and nothing that only one
implementation could keep.
"""

import asyncio
import random

import pytest
from helpers.kinds import NEGOTIATION
from swarmnode.node.transport.base import Priority, StreamReset
from swarmnode.protocol.errors import LocalProtocolError

BIG = 5_000_003
"""More than any window."""
BASICS = []


def check(function):
    """One of the suite."""
    BASICS.append(function)
    return function


def spawn(work):
    """A task for work that the check waits for itself."""
    return asyncio.get_running_loop().create_task(work)


async def blocked(world, task):
    """Let everything that can happen happen; the task must still be waiting then."""
    await world.settle()
    assert not task.done(), "it should wait"


async def read_all(stream, step=70_000):
    """Everything to the end of the stream."""
    got = bytearray()
    while data := await stream.read(step):
        assert 1 <= len(data) <= step
        got += data
    return bytes(got)


async def send_all(stream, data):
    """`data`, and the end."""
    await stream.write(data)
    await stream.close_write()


# What arrives


@check
async def bytes_arrive_in_order_whatever_the_sizes(world):
    near, far = await world.open()
    rng = random.Random(1)
    sizes = (
        1,
        2,
        65_507,
        65_508,
        300_000,
        1,
        0,
        70_000,
        *range(20),
        *(2**n + d for n in range(4, 18) for d in (-1, 0, 1)),
    )
    messages = [rng.randbytes(size) for size in sizes]

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
async def messages_larger_than_the_window(world):
    near, far = await world.open()
    data = random.Random(2).randbytes(BIG)
    async with asyncio.TaskGroup() as group:
        group.create_task(near.write(data))
        assert await far.read_exactly(BIG) == data


@check
async def full_duplex_without_deadlock(world):
    near, far = await world.open()

    async def side(stream, seed):
        mine, other = (random.Random(n).randbytes(BIG) for n in (seed, 7 - seed))
        async with asyncio.TaskGroup() as group:
            group.create_task(stream.write(mine))
            assert await stream.read_exactly(BIG) == other

    async with asyncio.TaskGroup() as group:
        group.create_task(side(near, 3))
        group.create_task(side(far, 4))


@check
async def many_small_writes_are_one_text(world):
    near, far = await world.open()
    text = random.Random(3).randbytes(3000)

    async def send():
        for at in range(len(text)):
            await near.write(text[at : at + 1])

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        assert await far.read_exactly(2999) == text[:2999]
        assert await far.read_exactly(1) == text[2999:]


@check
async def a_write_of_a_thousand_parts(world):
    near, far = await world.open()
    parts = [bytes([n % 256]) * (n % 7) for n in range(1000)]
    await near.write(*parts)
    assert await far.read_exactly(sum(map(len, parts))) == b"".join(parts)


@check
async def ping_pong(world):
    near, far = await world.open()
    rng = random.Random(4)
    for _ in range(60):
        ball = rng.randbytes(rng.choice((1, 32, 5000, 66_000)))
        for source, target in ((near, far), (far, near)):
            async with asyncio.TaskGroup() as group:
                group.create_task(source.write(ball))
                assert await target.read_exactly(len(ball)) == ball


@check
async def read_gives_what_is_there_and_no_more_than_asked(world):
    near, far = await world.open()
    await near.write(b"abcdef")
    got = await far.read(4)
    assert 1 <= len(got) <= 4
    while len(got) < 6:
        got += await far.read(100)
    assert got == b"abcdef"
    await near.write(bytes(1000))
    await world.settle()
    for limit in (1, 2, 10, 500):
        assert 1 <= len(await far.read(limit)) <= limit


@check
async def nothing_asked_is_nothing_waited_for(world):
    near, far = await world.open()
    assert await far.read(0) == await far.read_exactly(0) == b""
    await near.write(b"x")
    await world.settle()
    assert await far.read(0) == await far.read_exactly(0) == b""
    assert await far.read(5) == b"x"


@check
async def negative_sizes_are_our_own_mistake(world):
    near, far = await world.open()
    await near.write(b"abc")
    await world.settle()
    for read in (far.read, far.read_exactly):
        with pytest.raises(LocalProtocolError):
            await read(-1)
    assert await far.read_exactly(3) == b"abc"


@check
async def writing_nothing_sends_nothing(world):
    near, far = await world.open()
    reading = spawn(far.read(10))
    for parts in ((), (b"",), (b"", bytearray(), memoryview(b""))):
        await near.write(*parts)
    await blocked(world, reading)
    await near.write(b"", b"x", b"")
    assert await reading == b"x"


@check
async def buffers_may_be_reused_after_write(world):
    near, far = await world.open()
    buffer = bytearray(b"first")
    await near.write(buffer)
    buffer[:] = b"xxxxx"
    assert await far.read_exactly(5) == b"first"


@check
async def any_contiguous_buffer_can_be_written(world):
    near, far = await world.open()
    numbers = memoryview(bytes(range(16))).cast("I", shape=[2, 2])
    await near.write(b"a", bytearray(b"b"), numbers)
    assert await far.read_exactly(18) == b"ab" + bytes(range(16))


@check
async def priorities_can_be_set(world):
    near, far = await world.open()
    for priority in Priority:
        near.set_priority(priority)
        await near.write(bytes(100_000))
        await far.read_exactly(100_000)


@check
async def one_task_reads_and_one_writes(world):
    near, far = await world.open()
    reading = spawn(far.read(1))
    await blocked(world, reading)
    for read in (far.read, far.read_exactly):
        with pytest.raises(LocalProtocolError, match="another task"):
            await read(1)
    writing = spawn(near.write(bytes(BIG)))
    assert await reading == b"\0"
    await blocked(world, writing)
    with pytest.raises(LocalProtocolError, match="another task"):
        await near.write(b"x")
    assert await far.read_exactly(BIG - 1) == bytes(BIG - 1)
    await writing


# Backpressure


async def fill(world, near):
    """Write until the window is spent to the last byte: how many bytes that took, and the write that now waits."""
    await world.settle()
    sent = world.window - NEGOTIATION
    await near.write(bytes(sent))
    while True:
        writing = spawn(near.write(b"\0"))
        await asyncio.sleep(0)
        if not writing.done():
            await world.settle()
        if not writing.done():
            return sent, writing
        sent += 1


@check
async def a_writer_gets_one_window_ahead_and_not_a_byte_further(world):
    near, far = await world.open()
    sent, writing = await fill(world, near)
    assert sent <= world.window
    await far.read_exactly(sent + 1)
    await writing


@check
async def a_stuck_stream_holds_up_no_other(world):
    stuck, unread = await world.open()
    near, far = await world.open()
    writing = spawn(stuck.write(bytes(BIG)))
    await blocked(world, writing)
    for _ in range(3):
        async with asyncio.TaskGroup() as group:
            group.create_task(near.write(bytes(BIG)))
            await far.read_exactly(BIG)
    assert not writing.done()
    await unread.read_exactly(BIG)
    await writing


# Ends


@check
async def end_of_file_is_not_an_error_for_read_and_is_one_for_read_exactly(world):
    near, far = await world.open()
    await near.write(b"abc")
    await near.close_write()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await far.read_exactly(4)
    assert (caught.value.partial, caught.value.expected) == (b"abc", 4)
    for _ in range(2):
        assert await far.read(10) == b""
        with pytest.raises(asyncio.IncompleteReadError):
            await far.read_exactly(1)
    assert await far.read_exactly(0) == b""


@check
async def the_end_wakes_a_reader(world):
    near, far = await world.open()
    reading = spawn(far.read(1))
    await blocked(world, reading)
    await near.close_write()
    assert await reading == b""


@check
async def half_closed_streams_still_flow_the_other_way(world):
    near, far = await world.open()
    await near.write(b"question")
    await near.close_write()
    assert await far.read_exactly(8) == b"question"
    assert await far.read(1) == b""
    async with asyncio.TaskGroup() as group:
        group.create_task(send_all(far, bytes(BIG)))
        assert len(await read_all(near)) == BIG


@check
async def the_far_end_may_be_the_first_to_half_close(world):
    near, far = await world.open()
    await far.write(b"greeting")
    await far.close_write()
    assert await read_all(near) == b"greeting"
    await near.write(b"answer")
    await near.close_write()
    assert await read_all(far) == b"answer"


@check
async def both_half_close_at_once(world):
    near, far = await world.open()
    async with asyncio.TaskGroup() as group:
        for stream in (near, far):
            group.create_task(send_all(stream, b"same"))
        answers = [group.create_task(read_all(stream)) for stream in (near, far)]
    assert [answer.result() for answer in answers] == [b"same", b"same"]


@check
async def closing_while_a_write_waits_sends_all_of_it(world):
    for close in ("close_write", "close"):
        near, far = await world.open()
        data = random.Random(6).randbytes(BIG)
        writing = spawn(near.write(data))
        await blocked(world, writing)
        await getattr(near, close)()
        assert await read_all(far) == data
        await writing
        await far.close()


@check
async def closing_ends_both_directions_gently(world):
    near, far = await world.open()
    await near.write(b"last words")
    await near.close()
    assert await far.read_exactly(10) == b"last words"
    assert await far.read(1) == b""
    await far.write(b"nobody listens")
    await far.close()


@check
async def the_rest_can_be_read_long_after_the_other_side_closed(world):
    near, far = await world.open()
    data = random.Random(5).randbytes(200_000)
    await near.write(data)
    await near.close()
    await far.close_write()
    await world.settle()
    assert await read_all(far, 777) == data


@check
async def writing_after_close_is_our_own_mistake(world):
    near, _ = await world.open()
    await near.close_write()
    with pytest.raises(LocalProtocolError):
        await near.write(b"x")
    await near.close_write()
    await near.close()
    await near.close()
    with pytest.raises(LocalProtocolError):
        await near.write(b"x")


@check
async def nothing_is_read_after_close(world):
    near, far = await world.open()
    await far.write(b"unread")
    await world.settle()
    await near.close()
    await far.write(b"late")
    await world.settle()
    for read in (near.read, near.read_exactly):
        with pytest.raises(LocalProtocolError):
            await read(1)


@check
async def closing_wakes_our_own_reader(world):
    near, _ = await world.open()
    reading = spawn(near.read(1))
    await blocked(world, reading)
    await near.close()
    with pytest.raises(LocalProtocolError):
        await reading


@check
async def one_who_closed_never_blocks_the_other(world):
    near, far = await world.open()
    await near.close()
    try:
        await far.write(bytes(BIG))
    except StreamReset:
        return  # a stream that nobody will end is reset after a while
    await far.close()


one_who_closed_never_blocks_the_other.needs_time = True


@check
async def reset_fails_everything_at_both_ends(world):
    near, far = await world.open()
    await near.write(b"x")
    await far.read_exactly(1)
    await near.write(b"lost")
    reading, waiting = spawn(far.read_exactly(100)), spawn(near.read(1))
    await blocked(world, reading)
    near.reset()
    for failing in (waiting, near.read(1), near.write(b"x"), near.read_exactly(1), near.write()):
        with pytest.raises(StreamReset):
            await failing
    for failing in (reading, far.read(1), far.write(b"x"), far.read_exactly(1), far.write()):
        with pytest.raises(StreamReset):
            await failing
    for stream in (near, far):
        stream.reset()
        await stream.close_write()
        await stream.close()


@check
async def reset_wakes_a_blocked_writer_at_either_end(world):
    for resetting in (0, 1):
        ends = await world.open()
        await ends[1].write(b"!")
        await ends[0].read_exactly(1)
        writing = spawn(ends[0].write(bytes(BIG)))
        await blocked(world, writing)
        ends[resetting].reset()
        with pytest.raises(StreamReset):
            await writing


@check
async def reset_after_the_end_was_read(world):
    near, far = await world.open()
    await near.close_write()
    assert await far.read(1) == b""
    near.reset()
    await world.settle()
    with pytest.raises(StreamReset):
        await far.write(b"x")


@check
async def reset_of_an_ended_stream_changes_nothing(world):
    near, far = await world.open()
    await send_all(near, b"there")
    await send_all(far, b"back")
    assert await read_all(near) == b"back"
    await world.settle()
    near.reset()
    await world.settle()
    assert await read_all(far) == b"there"
