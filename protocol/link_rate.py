"""How fast a full link takes our bytes, and what size of frames suits it. Sans-IO.

A link that is full pauses its writer and resumes it when there is room. After a resumption the writer fills it up
again at once; what it could write from one such moment to the next is what the link carried away meanwhile.
On a slow link frames are made small: a frame that has begun cannot be overtaken, and 64 KiB take 10 ms at 50 Mbit/s.
"""

from __future__ import annotations

from typing import Final

SLOW_BYTES_S: Final = 50e6 / 8
"""Below this, frames are small."""
SMALL_FRAME: Final = 16 * 1024
"""Payload of one DATA frame on a slow link; the 30 bytes around it cost it nothing."""
MIN_SAMPLE_S: Final = 0.05
"""A measurement lasts at least this long: single turns of the event loop say little."""
_WEIGHT: Final = 0.5


class LinkRate:
    """The estimate for one link."""

    __slots__ = ("_at", "_sent", "bytes_s")

    def __init__(self) -> None:
        self.bytes_s = 0.0
        """Smoothed rate of the link while it was full; 0: it never was, for long enough."""
        self._at: float | None = None
        self._sent = 0

    @property
    def is_slow(self) -> bool:
        """The link is known to be one for small frames."""
        return 0 < self.bytes_s < SLOW_BYTES_S

    def resumed(self, now: float, sent: int, *, full: bool) -> None:
        """The link had room again; since, `sent` bytes in all have been written, and it is `full` once more or not."""
        if not full:
            self._at = None  # it may be idle from here on, and idle time says nothing
        elif self._at is None:
            self._at, self._sent = now, sent
        elif now - self._at >= MIN_SAMPLE_S:
            sample = (sent - self._sent) / (now - self._at)
            self.bytes_s = sample if not self.bytes_s else self.bytes_s + _WEIGHT * (sample - self.bytes_s)
            self._at, self._sent = now, sent
