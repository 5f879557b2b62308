"""The virtual clock itself, and the loop markers."""

import asyncio

import pytest
from helpers.virtual import EPOCH, Deadlock, LoopClock, VirtualLoop


@pytest.mark.virtual
async def test_hours_pass_at_once(clock):
    start = clock.now()
    await asyncio.sleep(3600)
    assert clock.now() - start == pytest.approx(3600)
    assert clock.wall() == pytest.approx(EPOCH + 3600)
    assert LoopClock(skew_s=-5).wall() == pytest.approx(clock.wall() - 5)


@pytest.mark.virtual
async def test_timers_fire_in_order():
    order = []

    async def note(delay):
        await asyncio.sleep(delay)
        order.append(delay)

    async with asyncio.TaskGroup() as group:
        for delay in (3, 1, 2):
            group.create_task(note(delay))
    assert order == [1, 2, 3]


@pytest.mark.virtual
async def test_threads_are_waited_for_while_the_clock_stands_still(clock):
    async def impatient():
        await asyncio.sleep(1000)
        return "timer"

    assert await asyncio.to_thread(lambda: "thread") == "thread"
    assert clock.now() == 0


def test_waiting_for_nothing_is_an_error():
    with pytest.raises(Deadlock), asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(asyncio.Event().wait())


@pytest.mark.loops
async def test_loops_marker(request):
    module = type(asyncio.get_running_loop()).__module__
    assert module.split(".")[0] in request.node.name
