"""The two clocks a node reads. Everything that needs the time is given one of these, so tests can give
another.

`now()` measures intervals and deadlines and never jumps; `wall()` is the date, for signed records only:
another machine's wall clock may be 90 seconds off and ours may be set while we run.
"""

from __future__ import annotations

import time


class Clock:
    """The machine's clocks."""

    def now(self) -> float:
        """Seconds on a monotonic clock of unspecified origin; the scale of `loop.time()`."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()
