"""Traces of connections as files: one per connection, JSON lines, bounded in size and number.

Off unless a folder is given. Then connections are made of recording parts (protocol/recorder.py), and what they
tell goes through here to a file that protocol/replay.py can replay. Files are written by a thread of their own in
pieces of FLUSH_BYTES, so that a slow disk never holds up the loop; one that falls too far behind ends the traces,
not the node. Links whose peer never proved an identity have a small share of their own, so that a flood of them
does not push out traces of real peers.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from ...protocol.errors import ConfigError
from ...protocol.ids import PeerId
from ...protocol.noise import StaticKey
from ...protocol.recorder import RecordingConnection
from ...protocol.trace import TraceEvent, clean, encode, header
from ..clock import Clock

logger = logging.getLogger(__name__)

MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""A trace ends when its file is this large, for its beginning is what makes it replayable."""
MAX_FILES: Final = 64
"""Traces of peers kept in the folder; the oldest goes first."""
MAX_STRANGER_FILES: Final = 16
"""The same of links that ended before the peer had proven an identity."""
FLUSH_BYTES: Final = 64 * 1024
"""Text gathered before it is written."""
MAX_PENDING_BYTES: Final = 32 * 1024 * 1024
"""Text of all traces that waits for the disk; over it traces are cut."""
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_APPEND: Final = os.O_WRONLY | os.O_APPEND


class Trace:
    """One connection's trace. Give its `event` to the connection's life and its `emit` to its recorder."""

    def __init__(self, folder: TraceFolder, *, title: str, number: int, outbound: bool) -> None:
        self._folder = folder
        self._number = number
        self._side = "out" if outbound else "in"
        self._lines = [header(title=title, client=outbound, wall=folder.clock.wall(), time=folder.clock.now())]
        self._gathered = len(self._lines[0]) + 1
        self._written = 0
        self._path: Path | None = None
        self._known = outbound
        self._done = False

    def event(self, event: TraceEvent) -> None:
        """Add an event."""
        if self._done:
            return
        line = encode(event)
        if self._written + self._gathered + len(line) > MAX_FILE_BYTES:
            self._cut(f"the file is {MAX_FILE_BYTES} bytes large")
            return
        self._lines.append(line)
        self._gathered += len(line) + 1
        if self._gathered >= FLUSH_BYTES and self._known:
            self._flush()

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Add an event of now."""
        self.event(TraceEvent(self._folder.clock.now(), name, data))

    def connection(self, static: StaticKey, **options: Any) -> RecordingConnection:
        """A connection that records itself here."""
        return RecordingConnection(static, emit=self.emit, **options)

    def authenticated(self, peer: str) -> None:
        """The peer has proven its identity: the trace is worth its place among those of peers."""
        self._known = True
        self._side += f"-{peer[-8:]}"

    def close(self) -> None:
        """The connection has ended. Safe to call twice."""
        if not self._done:
            self._done = True
            self._flush()

    def _cut(self, reason: str) -> None:
        self._lines.append(encode(TraceEvent(self._folder.clock.now(), "trace:truncated", {"reason": clean(reason)})))
        self.close()

    def _flush(self) -> None:
        text = "".join(f"{line}\n" for line in self._lines)
        new = self._path is None
        if self._path is None:
            self._path = self._folder.path(self._number, self._side, known=self._known)
        self._lines.clear()
        self._written += len(text)
        self._gathered = 0
        if not self._folder.write(self._path, text, new=new):
            self._done = True


class TraceFolder:
    """Where traces go. Raises ConfigError when the folder cannot be made."""

    def __init__(self, folder: Path, clock: Clock, me: PeerId) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise ConfigError(f"cannot write traces to {folder}: {exc.strerror}; name another folder") from exc
        self.clock = clock
        self._folder = folder
        self._me = me
        self._made = 0
        self._pending = 0
        self._broken = False
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, address: object, *, outbound: bool) -> Trace:
        """A trace for a new connection."""
        self._made += 1
        way = "to" if outbound else "from"
        trace = Trace(self, title=f"{self._me} {way} {address}", number=self._made, outbound=outbound)
        trace.emit("connectivity:connection_started", {"address": clean(str(address)), "outbound": outbound})
        return trace

    def path(self, number: int, side: str, *, known: bool) -> Path:
        """The file of a trace."""
        family = "trace" if known else "stranger"
        return self._folder / f"{family}-{self._me.short}-{os.getpid()}-{number:06d}-{side}.jsonl"

    def write(self, path: Path, text: str, *, new: bool) -> bool:
        """Hand a piece to the writing thread. False: the disk is too slow, or broken."""
        if self._broken or self._pending + len(text) > MAX_PENDING_BYTES:
            return False
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "traces")
        self._pending += len(text)
        future = asyncio.get_running_loop().run_in_executor(self._pool, _write, path, text, new)
        future.add_done_callback(lambda done: self._written(len(text), done))
        return True

    def _written(self, size: int, done: asyncio.Future[None]) -> None:
        self._pending -= size
        exc = None if done.cancelled() else done.exception()
        if exc is not None and not self._broken:
            self._broken = True
            logger.warning("no more traces: cannot write to %s: %s", self._folder, exc)

    async def aclose(self) -> None:
        """Wait until everything is on its way to the disk."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.get_running_loop().run_in_executor(None, pool.shutdown)


def _write(path: Path, text: str, new: bool) -> None:
    """Append to a trace; in the writing thread. One that was removed meanwhile, for being old, stays removed."""
    if new:
        _make_room(path)
    try:
        descriptor = os.open(path, _CREATE if new else _APPEND, 0o600)
    except FileNotFoundError:
        if new:
            raise
        return
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def _make_room(path: Path) -> None:
    family = path.name.partition("-")[0]
    most = MAX_FILES if family == "trace" else MAX_STRANGER_FILES
    files = sorted(path.parent.glob(f"{family}-*.jsonl"), key=_changed)
    for old in files[: max(0, len(files) - most + 1)]:
        old.unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
