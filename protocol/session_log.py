"""What a server keeps of its own output, so that a neighbour that dies can be replaced without asking the client.

Each lane of each session has an OutputLog: the rows the server sent (or is about to send) to the next hop, indexed by
token position. Sending is reading the log from a cursor, so a replay is nothing special: the cursor goes back, and
rows that were produced one by one come out joined into prefill-sized chunks. All logs of a node share one byte budget;
when it is spent, the log of the session that was idle longest goes, and that session's client must replay from tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from .errors import LocalProtocolError
from .messages import MAX_POSITION, Want

DEFAULT_BUDGET: Final = 256 * 1024 * 1024
REPLAY_ROWS: Final = 128
"""Rows a replay joins into one frame: the prefill chunk, so that it overlaps down the chain."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows [position, position + count) as they go on the wire."""

    position: int
    count: int
    want: int
    payload: bytes

    @property
    def end(self) -> int:
        """Position after the last row."""
        return self.position + self.count


class OutputLog:
    """Rows [start, end) of one lane, without gaps. `start` is 0 until the front is dropped to save memory."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._starts: list[int] = []
        self.start = 0
        self.size_bytes = 0

    @property
    def end(self) -> int:
        """Position after the last row held."""
        return self._entries[-1].end if self._entries else self.start

    def append(self, entry: Entry) -> None:
        """Add rows right behind the last ones. Raises LocalProtocolError for a gap or overlap."""
        if entry.position != self.end:
            raise LocalProtocolError(f"log ends at {self.end}, cannot append rows from {entry.position}")
        self._entries.append(entry)
        self._starts.append(entry.position)
        self.size_bytes += len(entry.payload)

    def cut(self, position: int) -> None:
        """Forget rows from `position` on; an entry that spans it keeps its front."""
        while self._entries and self._entries[-1].end > position:
            entry = self._entries.pop()
            self._starts.pop()
            self.size_bytes -= len(entry.payload)
            if entry.position < position:
                self.append(_part(entry, entry.position, position))
        self.start = min(self.start, position)

    def drop_before(self, position: int) -> None:
        """Give up whole entries before `position`, the memory's worth of rows the next hop has already been sent."""
        keep = bisect_right(self._starts, position) - 1
        if position >= self.end:
            keep = len(self._entries)
        if keep <= 0:
            return
        self.size_bytes -= sum(len(entry.payload) for entry in self._entries[:keep])
        self.start = self._entries[keep - 1].end
        del self._entries[:keep], self._starts[:keep]

    def read(self, position: int, acked: int, limit: int = MAX_POSITION) -> Entry | None:
        """The next frame from `position` on: the very entry, or rows before `acked` joined up to REPLAY_ROWS.

        It ends at `limit` at the latest. None if there is nothing from there on, or not any more: then the client is
        about to replay.
        """
        if not self.start <= position < min(self.end, limit):
            return None
        index = bisect_right(self._starts, position) - 1
        first = self._entries[index]
        if position >= acked:
            return _part(first, position, min(first.end, limit))
        return self._joined(index, position, min(position + REPLAY_ROWS, acked, self.end, limit))

    def fork(self, position: int) -> OutputLog:
        """A log of the rows before `position`, which may come later. It shares their bytes, and counts them again."""
        other = OutputLog()
        other._entries, other._starts = self._entries[:], self._starts[:]
        other.start, other.size_bytes = self.start, self.size_bytes
        other.cut(position)
        return other

    def _joined(self, index: int, position: int, end: int) -> Entry:
        """Rows [position, end), whose results nobody waits for any more."""
        parts = []
        for entry in self._entries[index:]:
            if entry.position >= end:
                break
            parts.append(_part(entry, max(position, entry.position), min(end, entry.end)).payload)
        return Entry(position, end - position, int(Want.NOTHING), b"".join(parts))


def _part(entry: Entry, start: int, end: int) -> Entry:
    """Rows [start, end) of an entry. Rows are self-contained in every codec, so this is a slice of bytes."""
    if (start, end) == (entry.position, entry.end):
        return entry
    row = len(entry.payload) // entry.count
    offset = (start - entry.position) * row
    return Entry(start, end - start, entry.want, entry.payload[offset : offset + (end - start) * row])


class LogBudget:
    """One byte budget for all sessions' logs of a node; the longest idle session loses its log first."""

    def __init__(self, limit_bytes: int = DEFAULT_BUDGET) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._sizes: dict[object, int] = {}  # in order of last use

    def charge(self, owner: object, size_bytes: int) -> list[object]:
        """Say that `owner` now holds `size_bytes`. Returns the owners that must drop their logs, never `owner`."""
        self.used_bytes += size_bytes - self._sizes.pop(owner, 0)
        self._sizes[owner] = size_bytes
        victims = []
        for other in list(self._sizes):
            if self.used_bytes <= self.limit_bytes or other is owner:
                break
            self.release(other)
            victims.append(other)
        return victims

    def release(self, owner: object) -> None:
        """Forget an owner: its session has ended or its log was dropped."""
        self.used_bytes -= self._sizes.pop(owner, 0)
