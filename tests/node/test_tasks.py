"""The supervisor: crashes are logged and counted, nothing outlives it."""

import asyncio
import logging

import pytest
from swarmnode.node.clock import Clock
from swarmnode.node.tasks import Supervisor
from swarmnode.protocol.errors import LocalProtocolError


async def test_a_crash_is_logged_counted_and_heard(caplog):
    async def boom():
        raise ValueError("boom")

    heard = []
    async with Supervisor("test") as tasks:
        with caplog.at_level(logging.ERROR):
            await tasks.start(boom(), "bomb", on_crash=heard.append)
    assert "test:bomb crashed" in caplog.text
    assert (tasks.crashes, [str(exc) for exc in heard]) == (1, ["boom"])


async def test_exit_cancels_everything_even_the_never_started():
    ended = []

    async def wait():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async with Supervisor("test") as tasks:
        tasks.start(wait(), "running")
        await asyncio.sleep(0)
        tasks.start(wait(), "not yet started")
        assert len(tasks) == 2
    assert (len(tasks), ended) == (0, [True])


async def test_it_is_bounded_and_refuses_after_close():
    async def nothing():
        pass

    async with Supervisor("test", max_tasks=1) as tasks:
        tasks.start(nothing(), "one")
        with pytest.raises(LocalProtocolError, match="full"):
            tasks.start(nothing(), "two")
    with pytest.raises(LocalProtocolError, match="not open"):
        tasks.start(nothing(), "late")


async def test_a_task_may_close_its_own_supervisor():
    async with Supervisor("test") as tasks:
        await tasks.start(tasks.aclose(), "closer")
    assert tasks.crashes == 0


def test_clocks_run():
    clock = Clock()
    assert clock.now() <= clock.now()
    assert clock.wall() > 1_700_000_000
