"""What one yamux session has carried: plain integers, counted where frames are made and taken.

Traffic is counted by the class of the stream (Priority) at our end, so that "decode waits behind bulk" can be
seen from outside. Sums over connections are made with add().
"""

from __future__ import annotations

from typing import Final

from .yamux_frames import Priority

CLASSES: Final = tuple(priority.name.lower() for priority in Priority)
"""Names of the classes, in the order of the lists of a Tally."""


class Tally:
    """Counters of one session, or of several added up. Payload bytes, without headers of any layer."""

    __slots__ = (
        "bytes_in",
        "bytes_out",
        "closed",
        "control_in",
        "control_out",
        "frames_in",
        "frames_out",
        "go_aways_in",
        "go_aways_out",
        "opened_here",
        "opened_there",
        "reset_here",
        "reset_there",
        "shed",
        "stale_bytes_in",
        "stale_frames_in",
        "turned_away",
        "windows_grown",
    )

    def __init__(self) -> None:
        self.frames_in = [0] * len(CLASSES)
        """DATA frames received, by class; so the next three."""
        self.frames_out = [0] * len(CLASSES)
        self.bytes_in = [0] * len(CLASSES)
        self.bytes_out = [0] * len(CLASSES)
        self.stale_bytes_in = 0
        """Payload of streams that were gone already: it crossed our reset."""
        self.stale_frames_in = 0
        self.control_in = 0
        """Frames that are not DATA: windows, pings, resets, go-away."""
        self.control_out = 0
        self.opened_here = 0
        """Streams we opened."""
        self.opened_there = 0
        """Streams the peer opened."""
        self.turned_away = 0
        """Streams the peer tried to open and we reset at once."""
        self.closed = 0
        """Streams that ended well, both ways."""
        self.reset_here = 0
        self.reset_there = 0
        self.shed = 0
        """Streams we reset because of the unread bytes they held; see yamux_memory."""
        self.windows_grown = 0
        """Times a receive window was enlarged because the path was faster than it."""
        self.go_aways_in = 0
        self.go_aways_out = 0

    def add(self, other: Tally) -> None:
        """Fold another tally into this one."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                mine[:] = map(int.__add__, mine, theirs)
            else:
                setattr(self, name, mine + theirs)
