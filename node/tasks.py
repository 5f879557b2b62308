"""The one place that owns tasks which outlive their caller, and the one place where `except Exception` is
right.

A background task that dies must neither take the node with it nor vanish: the supervisor logs the crash
with the task's name, counts it, and carries on. At exit everything still running is cancelled and awaited,
so no task of ours is left when `async with` ends. Work whose failure the caller must see belongs in
asyncio.TaskGroup instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final

from ..protocol.errors import LocalProtocolError

logger = logging.getLogger(__name__)

MAX_TASKS: Final = 65536
"""Tasks of one supervisor. Streams and connections have lower limits of their own; this one stops a bug."""


class Supervisor:
    """Owns background tasks: `async with Supervisor("host") as tasks: tasks.start(work(), "work")`."""

    def __init__(self, name: str, *, max_tasks: int = MAX_TASKS) -> None:
        self.name = name
        self.crashes = 0
        """Tasks that ended with an exception so far."""
        self._max_tasks = max_tasks
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order of start, so that ends repeat, too
        self._open = False

    async def __aenter__(self) -> Supervisor:
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def has_room(self) -> bool:
        """start() would succeed: open, and not full."""
        return self._open and len(self._tasks) < self._max_tasks

    def start(
        self,
        work: Coroutine[Any, Any, None],
        name: str,
        *,
        on_crash: Callable[[Exception], None] | None = None,
    ) -> asyncio.Task[None]:
        """Run `work` in the background under `name`; `on_crash` hears of an exception after it was logged.

        The returned task may be cancelled or awaited; awaiting it never raises the work's own exception.
        Raises LocalProtocolError when the supervisor is not open or is full.
        """
        if not self.has_room:
            work.close()
            state = "full" if self._open else "not open"
            raise LocalProtocolError(f"cannot start {name!r}: supervisor {self.name!r} is {state}")
        task = asyncio.get_running_loop().create_task(self._guard(work, name, on_crash), name=f"{self.name}:{name}")
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        # a task cancelled before its first step would leave `work` un-awaited
        task.add_done_callback(lambda _: work.close())
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)

    async def _guard(
        self, work: Coroutine[Any, Any, None], name: str, on_crash: Callable[[Exception], None] | None
    ) -> None:
        try:
            await work
        except Exception as exc:
            self.crashes += 1
            logger.exception("background task %s:%s crashed", self.name, name)
            if on_crash is not None:
                on_crash(exc)

    async def aclose(self) -> None:
        """Cancel everything and wait for it; nothing can be started afterwards. Safe to call twice."""
        self._open = False
        current = asyncio.current_task()
        while waiting := [task for task in self._tasks if task is not current]:
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
