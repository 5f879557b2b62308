"""A virtual clock: an event loop that jumps to its next timer as soon as nothing is left to do.

Hours of keepalives, timeouts and latency pass in milliseconds, and always in the same order. When nothing
is left to do and no timer is set, the test waits for something that can never come: that raises Deadlock at
once. Only in-memory I/O belongs here. Work given to run_in_executor is waited for in real time, the clock
standing still.
"""

import asyncio
import selectors

from swarmnode.node.clock import Clock

EPOCH = 1_800_000_000.0
"""The date at which every virtual test starts."""
EXECUTOR_PATIENCE_S = 10.0


class Deadlock(RuntimeError):
    """Every task waits and no timer is set."""


class _Selector(selectors.DefaultSelector):
    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.outside = 0

    def select(self, timeout=None):
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.outside:
            ready = super().select(EXECUTOR_PATIENCE_S)
            if ready:
                return ready
            raise Deadlock(f"work in an executor took over {EXECUTOR_PATIENCE_S} s")
        if timeout is None:
            raise Deadlock("every task waits, and no timer is set that could wake one")
        self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module's docstring."""

    def __init__(self):
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self):
        return self._virtual.now

    def run_in_executor(self, executor, func, *args):
        future = super().run_in_executor(executor, func, *args)
        self.went_out()
        future.add_done_callback(lambda _: self.came_back())
        return future

    def went_out(self):
        """Work was given to a thread: time stands still until came_back()."""
        self._virtual.outside += 1

    def came_back(self, count=1):
        """The outcome of `count` pieces of work is here, or nobody waits for it any more."""
        self._virtual.outside -= count

    async def shutdown_default_executor(self):
        self.went_out()
        try:
            await super().shutdown_default_executor()
        finally:
            self.came_back()


class LoopClock(Clock):
    """The clocks of the running loop: `now()` is its time, `wall()` starts at EPOCH plus `skew_s`."""

    def __init__(self, skew_s=0.0):
        self.skew_s = skew_s

    def now(self):
        return asyncio.get_running_loop().time()

    def wall(self):
        return EPOCH + self.skew_s + self.now()
