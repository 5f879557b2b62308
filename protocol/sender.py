"""What goes to the next hop, and in which order: the part that a client and a server of a chain have in common.

Sending is reading each lane's log from its cursor; a replay moves the cursor back. A lane that was forked begins as
the first rows of another one, and so it is sent as long as it can be: when the other lane's cursor is just there, one
Fork goes out in place of all these rows. Else (the other lane has gone on, was cut or forked over since) its own log,
which holds them too, is read like any other's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .messages import MAX_POSITION
from .session_log import Entry, OutputLog


@dataclass(slots=True)
class SendingLane:
    """A lane as the hop before sees it."""

    epoch: int = 0
    cursor: int = 0
    """Next position to send to the next hop."""
    acked: int = 0
    """Positions whose results the client has."""
    truncate_to: int | None = None
    """A truncation the next hop has not been told of."""
    origin: tuple[int, int] | None = None
    """(lane, rows): the first so many rows are those of that lane."""
    log: OutputLog = field(default_factory=OutputLog)


class Cut(NamedTuple):
    """Tell the next hop to forget a lane's rows from `position` on."""

    lane: int
    position: int


class Copy(NamedTuple):
    """Tell the next hop that lane `lane` is now the first `position` rows of `source`."""

    lane: int
    source: int
    position: int
    epoch: int = 0
    """Of the fork, if more has happened to the lane since."""


class Rows(NamedTuple):
    """Send these rows."""

    lane: int
    entry: Entry


class Sender:
    """Decides what to send next. Shares its lanes with a session's machine, which says what has become of them."""

    def __init__(self, lanes: Sequence[SendingLane]) -> None:
        self._lanes = lanes
        self._forks: deque[Copy] = deque()
        self._waiting: set[int] = set()
        """Lanes whose Fork has not gone out."""

    def forked(self, source: int, target: int, position: int, epoch: int) -> None:
        """The first `position` rows of `source` are now all that `target` has; `epoch` goes with them."""
        lane = self._lanes[target]
        lane.truncate_to, lane.origin = None, (source, position)
        if lane.cursor:  # it was not cut before: this is a replay, and the next hop has the rows
            return
        if self._lanes[source].cursor == position:
            lane.cursor = position
            self._waiting.discard(target)
            self._forks.append(Copy(target, source, position, epoch))
        else:
            self._waiting.add(target)

    def rewound(self, index: int, position: int) -> None:
        """A lane was cut to `position`: what was forked from more of it stands on its own from now on."""
        lane = self._lanes[index]
        lane.cursor = min(lane.cursor, position)
        if lane.origin is not None and position < lane.origin[1]:
            lane.origin = (lane.origin[0], position) if position else None
        if lane.origin is None:
            self._waiting.discard(index)
        elif not lane.cursor:
            self._waiting.add(index)
        if any(copy.lane == index and copy.position > position for copy in self._forks):
            lane.truncate_to = position
        for child, other in enumerate(self._lanes):
            if other.origin is not None and other.origin[0] == index and other.origin[1] > position:
                other.origin = None
                self._send_as_rows(child)

    def restart(self, positions: Sequence[int]) -> None:
        """Another next hop: send each lane from this position on."""
        self._forks.clear()
        for lane, position in zip(self._lanes, positions, strict=False):
            lane.cursor = position
        self._waiting = {index for index, lane in enumerate(self._lanes) if lane.origin is not None and not lane.cursor}

    def next(self) -> Cut | Copy | Rows | None:
        """What to send now, taken out; None when there is nothing."""
        if self._forks:
            return self._forks.popleft()
        for index, lane in enumerate(self._lanes):
            if lane.origin is not None and index in self._waiting:
                source, length = lane.origin
                sent = self._lanes[source].cursor
                if sent < length:
                    continue  # its turn will come
                if sent == length:
                    self._waiting.discard(index)
                    lane.cursor = length
                    return Copy(index, source, length)
                self._send_as_rows(index)
            if lane.truncate_to is not None:
                position, lane.truncate_to = lane.truncate_to, None
                return Cut(index, position)
            entry = lane.log.read(lane.cursor, lane.acked, self._limit(index, lane.cursor))
            if entry is not None:
                lane.cursor = entry.end
                return Rows(index, entry)
        return None

    def _send_as_rows(self, index: int) -> None:
        """A lane whose Fork cannot go out any more. What the next hop still has of it is from before the fork."""
        if index in self._waiting:
            self._waiting.remove(index)
            self._lanes[index].truncate_to = 0

    def _limit(self, index: int, cursor: int) -> int:
        """Up to where a lane may be sent before a Fork has to go out."""
        limit = MAX_POSITION
        for child in self._waiting:
            origin = self._lanes[child].origin
            if origin is not None and origin[0] == index and origin[1] >= cursor:
                limit = min(limit, origin[1])
        return limit
