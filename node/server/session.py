"""Drives one inference session at a server: control stream in, data in, jobs to the compute thread, rows out.

All decisions are protocol/session.py's. This file moves bytes: a reader for the client's control stream, a reader for
whatever stream the previous hop has attached, a writer to the next hop, a writer of results to the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from ...protocol.errors import ConfigError, ProtocolError, SwarmError
from ...protocol.ids import PeerId
from ...protocol.messages import (
    SESSION_PROTOCOL,
    TO_PREVIOUS,
    Attach,
    Attached,
    Data,
    Draining,
    Failed,
    Fork,
    HopFailed,
    LogGone,
    NeedReplay,
    Probe,
    Report,
    Rewire,
    Truncate,
)
from ...protocol.multiaddr import Multiaddr
from ...protocol.session import Forked, Job, SessionMachine
from ...protocol.session_log import LogBudget
from ...protocol.wire import Message
from ..framing import FrameStream
from ..host import Host
from ..transport.base import Priority
from .outcome import BadRows, KVGone, Outcome

if TYPE_CHECKING:
    from .compute import Seat, Worker

logger = logging.getLogger(__name__)

MAX_JOBS: Final = 16
"""Jobs a session may have waiting: what comes faster stays in the stream's window, so the sender waits."""
HOP_TIMEOUT_S: Final = 1.0
"""A next hop that cannot be reached in this time is reported to the client, which may know better."""
REPORT_S: Final = 0.5
"""At most so often the client hears what its rows took here."""
LONGEST_S: Final = 3600.0
IDLE_S: Final = 600.0
"""A session nobody used for this long is freed: its client hangs."""


class ServerSession:
    """One session. `run` returns when it is over; `close` ends it from outside."""

    def __init__(
        self,
        machine: SessionMachine,
        control: FrameStream,
        worker: Worker,
        seat: Seat,
        host: Host,
        evict: Callable[[Sequence[object]], None],
        logs: LogBudget,
    ) -> None:
        self.machine = machine
        self.max_payload = 0
        """Largest payload a data stream of this session may carry."""
        self._control = control
        self._worker = worker
        self._seat = seat
        self._host = host
        self._logs = logs
        self._evict = evict
        self._slots = asyncio.Semaphore(MAX_JOBS)
        self._results: deque[tuple[Message, bytes]] = deque()
        self._have_results = asyncio.Event()
        self._have_rows = asyncio.Event()
        self._prev_changed = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._next_hop: asyncio.Task[None] | None = None
        self._idle: asyncio.Timeout | None = None
        self._reported = -REPORT_S

    @property
    def key(self) -> tuple[bytes, int]:
        """How a previous hop names this session: one peer may serve two spans of a chain."""
        return self.machine.id, self.machine.start

    async def run(self) -> None:
        """Serve until the client closes or vanishes. Frees everything on the way out."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._write_results())
                self._start_next_hop()
                await self._read_control()
                raise _Over
        except* _Over:
            pass
        except* OSError as group:
            logger.debug("session %s: client gone: %s", self.machine.id.hex()[:8], group.exceptions[0])
        finally:
            self._worker.release(self._seat)
            self._logs.release(self)
            self._control.reset()

    async def _read_control(self) -> None:
        """Follow the opener's control stream to its end. A breach of protocol, or silence, ends the session."""
        try:
            async with asyncio.timeout(IDLE_S) as self._idle:
                while (frame := await self._control.receive()) is not None and await self._obey(*frame):
                    self._used()
        except (ProtocolError, TimeoutError) as exc:
            await self._fail(str(exc) or f"nobody used it for {IDLE_S:.0f} s")
        finally:
            self._idle = None

    async def _obey(self, message: Message, payload: bytes) -> bool:
        """One message of the opener; False ends the session. Its data come here when it is the previous hop."""
        match message:
            case Data():
                await self._take_data(self.machine.opener, message, payload)
            case Truncate():
                self._take_truncate(self.machine.opener, message)
            case Fork():
                self._take_fork(self.machine.opener, message)
            case Rewire():
                self._rewire(message)
            case Probe(nonce=nonce):
                self._send_client(self.machine.progress(nonce))
            case _:
                return False
        return True

    async def pump(self, frames: FrameStream) -> None:
        """Read an attached data stream until it ends or another previous hop takes over."""
        source = frames.stream.remote.raw
        await frames.send(Attached(received=self.machine.received))
        try:
            while self.machine.prev == source and (frame := await frames.receive()) is not None:
                message, payload = frame
                if self.machine.prev != source:
                    return
                if isinstance(message, Data):
                    await self._take_data(source, message, payload)
                elif isinstance(message, Truncate):
                    self._take_truncate(source, message)
                elif isinstance(message, Fork):
                    self._take_fork(source, message)
        except ProtocolError as exc:
            # Say whose fault it is, and keep the stream: were it reset, the previous hop would blame us.
            self._send_client(HopFailed(peer=source, epoch=self.machine.epoch, reason=_clip(exc)))
            await self._until_prev(lambda prev: prev != source)

    async def until_prev_is(self, peer: bytes) -> None:
        """Wait for the rewire that makes `peer` the previous hop: its stream may be faster than the client's word."""
        await self._until_prev(lambda prev: prev == peer)

    async def _until_prev(self, wanted: Callable[[bytes], bool]) -> None:
        while not wanted(self.machine.prev):
            self._prev_changed.clear()
            await self._prev_changed.wait()

    async def _take_data(self, source: bytes, data: Data, payload: bytes) -> None:
        await self._slots.acquire()
        self._used()
        job = None
        try:
            job = self.machine.on_data(source, data, payload)
        finally:
            if job is None:
                self._slots.release()
        if job is not None:
            came = asyncio.get_running_loop().time()
            self._worker.submit(self._seat, job, lambda outcome: self._computed(job, outcome, came))

    def _take_truncate(self, source: bytes, truncate: Truncate) -> None:
        self._used()
        if self.machine.on_truncate(source, truncate) == 0:
            self._worker.drop(self._seat, truncate.lane)
        self._have_rows.set()

    def _take_fork(self, source: bytes, fork: Fork) -> None:
        self._used()
        match self.machine.on_fork(source, fork):
            case Forked.DONE:
                self._worker.fork(self._seat, fork.source, fork.lane)
                self._evict(self._logs.charge(self, self.machine.log_bytes))
            case Forked.LOST:
                self._send_client(NeedReplay(epoch=self.machine.reached, lane=fork.lane, position=0))
        self._have_rows.set()

    def _used(self) -> None:
        if self._idle is not None and not self._idle.expired():
            self._idle.reschedule(asyncio.get_running_loop().time() + IDLE_S)

    def _report(self, job: Job, outcome: Outcome, came: float) -> None:
        """Tell the client what rows take here, so that it plans with what is true."""
        now = asyncio.get_running_loop().time()
        if now - self._reported < REPORT_S:
            return
        self._reported = now
        rtt_s = self._host.rtt(PeerId(self.machine.next)) if self.machine.next else None
        queue_s = min(max(now - came - outcome.seconds, 0.0), LONGEST_S)
        self._send_client(
            Report(
                rows=job.count,
                queue_s=queue_s,
                compute_s=min(outcome.seconds, LONGEST_S),
                hop_s=min((rtt_s or 0.0) / 2, LONGEST_S),
            )
        )

    def _computed(self, job: Job, outcome: Outcome, came: float) -> None:
        """On the loop: a job is done. Errors of one job end its session; the client repairs or reports."""
        self._slots.release()
        if outcome.error is not None:
            self.machine.on_failed(job)
            self._report_failure(job, outcome.error)
            return
        result = self.machine.on_computed(job, outcome.payload)
        self._report(job, outcome, came)
        if result is None:
            self._have_rows.set()
            self._evict(self._logs.charge(self, self.machine.log_bytes))
            return
        self._send_client(
            type(result)(
                epoch=result.epoch,
                lane=result.lane,
                position=result.position,
                count=result.count,
                want=result.want,
                token=outcome.token if result.want else -1,
                logprob=outcome.logprob if result.want else 0.0,
                compute_s=min(outcome.seconds, 3600.0),
            ),
            outcome.payload if result.want else b"",
        )

    def _report_failure(self, job: Job, error: Exception) -> None:
        if isinstance(error, KVGone):
            position = min(self.machine.received[job.lane], job.position)
            self._send_client(NeedReplay(epoch=self.machine.reached, lane=job.lane, position=position))
        elif isinstance(error, BadRows | ProtocolError) and self.machine.prev != self.machine.opener:
            self._send_client(HopFailed(peer=self.machine.prev, epoch=self.machine.epoch, reason=_clip(error)))
        else:
            self._send_client(Failed(reason=_clip(error)))

    def drop_log(self) -> None:
        """The node's log budget is spent: give up the rows already sent."""
        self.machine.drop_log()

    def _rewire(self, rewire: Rewire) -> None:
        complete = self.machine.on_rewire(rewire)
        if rewire.set_prev:
            self._prev_changed.set()
        if rewire.set_next:
            self._start_next_hop()
        self._have_rows.set()
        if not complete:
            self._send_client(LogGone(epoch=self.machine.reached))

    def _start_next_hop(self) -> None:
        """(Re)start the writer: the old one may be stuck on a peer that no longer answers."""
        assert self._tasks is not None
        if self._next_hop is not None:
            self._next_hop.cancel()
        if self.machine.is_tail:
            self._next_hop = None
        else:
            feed = self._write_rows(self._control) if self.machine.relay else self._feed_next_hop()
            self._next_hop = self._tasks.create_task(feed)

    async def _feed_next_hop(self) -> None:
        """Send rows to the next hop as they come. A broken hop is the client's to repair; this task just ends."""
        peer = PeerId(self.machine.next)
        try:
            async with asyncio.timeout(HOP_TIMEOUT_S):
                addresses = [Multiaddr.parse(text) for text in self.machine.next_addresses]
                stream = await self._host.open_stream(peer, SESSION_PROTOCOL, addrs=addresses)
            frames = FrameStream(stream, TO_PREVIOUS)
            frames.set_priority(Priority.DECODE)
            try:
                await frames.send(Attach(session=self.machine.id, start=self.machine.end))
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._watch_next_hop(frames))
                    both.create_task(self._write_rows(frames))
            finally:
                frames.reset()
        except* (OSError, SwarmError) as group:
            self._report_hop(peer, group)

    async def _write_rows(self, frames: FrameStream) -> None:
        while True:
            while (outgoing := self.machine.next_outgoing()) is not None:
                await frames.send(outgoing.message, outgoing.payload)
            self._have_rows.clear()
            await self._have_rows.wait()

    async def _watch_next_hop(self, frames: FrameStream) -> None:
        """Hear at once when the next hop dies, also while there is nothing to send."""
        while (frame := await frames.receive()) is not None:
            message, _ = frame
            if isinstance(message, Attached):
                if not self.machine.on_attached(message.received):
                    self._send_client(LogGone(epoch=self.machine.reached))
                self._have_rows.set()
        raise ConnectionResetError("the next hop ended the stream")

    def _report_hop(self, peer: PeerId, group: BaseExceptionGroup[BaseException]) -> None:
        cause: BaseException = group
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        logger.info("session %s: next hop %s failed: %s", self.machine.id.hex()[:8], peer.short, cause)
        self._send_client(HopFailed(peer=peer.raw, epoch=self.machine.epoch, reason=_clip(cause)))

    def _send_client(self, message: Message, payload: bytes = b"") -> None:
        self._results.append((message, payload))
        self._have_results.set()

    async def _write_results(self) -> None:
        while True:
            while self._results:
                message, payload = self._results.popleft()
                await self._control.send(message, payload)
                if isinstance(message, Failed):
                    raise _Over
            self._have_results.clear()
            await self._have_results.wait()

    def drain(self, grace_s: float) -> None:
        """Tell the client to move on within `grace_s`."""
        self._send_client(Draining(grace_s=grace_s))

    async def _fail(self, reason: str) -> None:
        try:
            await self._control.send(Failed(reason=reason[:500]))
        except OSError as exc:
            logger.debug("cannot tell the client of session %s: %s", self.machine.id.hex()[:8], exc)


class _Over(Exception):
    """The session has ended in good order: takes the task group down."""


def _clip(cause: BaseException) -> str:
    if isinstance(cause, TimeoutError | ConfigError) and not str(cause):
        return type(cause).__name__
    return (str(cause) or type(cause).__name__)[:500]
