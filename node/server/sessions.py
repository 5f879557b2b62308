"""Takes `/swarmnode/session/1.0.0` streams: opens sessions, attaches data streams to them, refuses politely.

The first frame says what a stream is. Open: the control stream of a new session, served until it ends. Attach: a data
stream of the previous hop of a session we hold; if the client has not yet opened the session here, or not yet told us
that this peer is our new previous hop, the stream waits, because peers may be faster than the client's word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from ...protocol.errors import ProtocolError, ServerBusy
from ...protocol.messages import (
    MAX_ROWS,
    SESSION_PROTOCOL,
    TO_SERVER,
    Attach,
    Open,
    Opened,
    Output,
    RefusalCode,
    Refused,
)
from ...protocol.session import SessionMachine
from ...protocol.session_log import LogBudget
from ...protocol.tensors import Codec, payload_size
from ..framing import FrameStream
from ..host import Host
from ..transport.base import Priority, Stream
from .session import ServerSession

if TYPE_CHECKING:
    from .compute import Seat, Worker

logger = logging.getLogger(__name__)

MAX_SESSIONS: Final = 1024
FIRST_FRAME_S: Final = 10.0
PARK_S: Final = 5.0
"""How long an attached stream waits for its session, or for the client's rewire."""
MAX_PARKED: Final = 256


class Span(Protocol):
    """What the handler needs to know of a served span (node/server/span.py)."""

    start: int
    end: int
    hidden_size: int
    compute_class: bytes
    embeds: bool
    has_head: bool
    draining: bool
    worker: Worker


class Sessions:
    """All sessions of a node. `find` gives the served span of a model digest that covers some blocks."""

    def __init__(self, host: Host, find: Callable[[bytes, int, int], Span | None], logs: LogBudget) -> None:
        self._host = host
        self._find = find
        self._logs = logs
        self._sessions: dict[tuple[bytes, int], ServerSession] = {}
        self._parked = 0
        self._opened = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        host.handle(SESSION_PROTOCOL, self._handle)

    def __len__(self) -> int:
        return len(self._sessions)

    def drain(self, grace_s: float) -> None:
        """Tell every client to move on."""
        for session in self._sessions.values():
            session.drain(grace_s)

    async def until_empty(self) -> None:
        """Wait until no session is open."""
        await self._empty.wait()

    def close(self) -> None:
        """Take no more sessions; the running ones end with their streams."""
        self._host.unhandle(SESSION_PROTOCOL)

    async def _handle(self, stream: Stream) -> None:
        frames = FrameStream(stream, TO_SERVER)
        try:
            async with asyncio.timeout(FIRST_FRAME_S):
                first = await frames.receive()
            match first:
                case (Open() as request, _):
                    await self._open(frames, request)
                case (Attach() as attach, _):
                    await self._attach(frames, attach)
                case _:
                    frames.reset()
        except (OSError, ProtocolError, TimeoutError) as exc:
            logger.debug("session stream of %s ended: %s", stream.remote.short, exc)
            frames.reset()

    async def _open(self, frames: FrameStream, request: Open) -> None:
        span = self._find(request.digest, request.start, request.end)
        refusal = self._refusal(request, span)
        if refusal is not None or span is None:
            await self._refuse(frames, refusal or Refused(code=int(RefusalCode.NO_MODEL), reason="no such model here"))
            return
        try:
            seat = span.worker.open(request, frames.stream.remote.raw)
        except ServerBusy as exc:
            await self._refuse(frames, Refused(code=int(RefusalCode.BUSY), reason=str(exc)[:500], retry_after_s=1.0))
            return
        await self._serve(frames, request, span, seat)

    async def _serve(self, frames: FrameStream, request: Open, span: Span, seat: Seat) -> None:
        machine = SessionMachine(request, frames.stream.remote.raw, span.hidden_size)
        session = ServerSession(machine, frames, span.worker, seat, self._host, _evict, self._logs)
        frames.max_payload = session.max_payload = _max_payload(span)
        frames.set_priority(Priority.DECODE)
        self._sessions[session.key] = session
        self._empty.clear()
        self._opened.set()
        try:
            await frames.send(Opened(compute_class=span.compute_class, log_bytes=self._logs.limit_bytes))
            await session.run()
        finally:
            del self._sessions[session.key]
            if not self._sessions:
                self._empty.set()
            span.worker.release(seat)

    async def _attach(self, frames: FrameStream, attach: Attach) -> None:
        if self._parked >= MAX_PARKED:
            await self._refuse(frames, Refused(code=int(RefusalCode.BUSY), reason="too many streams wait here"))
            return
        self._parked += 1
        try:
            async with asyncio.timeout(PARK_S):
                session = await self._session_of(attach)
                await session.until_prev_is(frames.stream.remote.raw)
        finally:
            self._parked -= 1
        frames.max_payload = session.max_payload
        try:
            await session.pump(frames)
        finally:
            frames.reset()

    async def _session_of(self, attach: Attach) -> ServerSession:
        """The session meant; waits for it, because the previous hop may have opened faster than we have."""
        while (session := self._sessions.get((attach.session, attach.start))) is None:
            self._opened.clear()
            await self._opened.wait()
        return session

    def _refusal(self, request: Open, span: Span | None) -> Refused | None:
        """Why this request cannot be served, if so."""
        problem = _problem(request, span)
        if problem is None and (request.session, request.start) in self._sessions:
            problem = RefusalCode.BAD_REQUEST, "this session is open already"
        if problem is None and len(self._sessions) >= MAX_SESSIONS:
            problem = RefusalCode.BUSY, f"{MAX_SESSIONS} sessions are open"
        return None if problem is None else Refused(code=int(problem[0]), reason=problem[1])

    async def _refuse(self, frames: FrameStream, refusal: Refused) -> None:
        logger.info("refused a session of %s: %s", frames.stream.remote.short, refusal.reason)
        await frames.send(refusal)
        await frames.close()


def _problem(request: Open, span: Span | None) -> tuple[RefusalCode, str] | None:
    if span is None:
        return RefusalCode.NO_SPAN, f"blocks {request.start}:{request.end} of this model are not served here"
    if span.draining:
        return RefusalCode.DRAINING, "this server is leaving"
    if request.compute_class and request.compute_class != span.compute_class:
        return RefusalCode.WRONG_CLASS, f"compute class here is {span.compute_class.hex()}"
    config = span.worker.span.config
    if config.foreign is not None and request.max_length > config.max_positions:
        return RefusalCode.BAD_REQUEST, f"{request.max_length} positions: this model has {config.max_positions}"
    if request.embed and not span.embeds:
        return RefusalCode.NO_SPAN, "this server has no embedding"
    if not request.next and request.output != Output.HIDDEN and not span.has_head:
        return RefusalCode.NO_SPAN, "this server has no LM head"
    try:
        Codec(request.codec)
    except ValueError:
        return RefusalCode.BAD_REQUEST, f"codec {request.codec} is not known here"
    return None


def _max_payload(span: Span) -> int:
    """The largest data frame a session of this model can rightly carry."""
    return payload_size(Codec.FP32, MAX_ROWS, span.hidden_size)


def _evict(victims: Sequence[object]) -> None:
    for victim in victims:
        if isinstance(victim, ServerSession):
            victim.drop_log()
