"""The compute thread of one device: takes jobs of all sessions, runs them through the span in batches.

The event loop never waits for it and it never waits for the loop: jobs come in under a lock, outcomes go back with
call_soon_threadsafe. What a job needs in torch (decode or embed its rows, the blocks, encode or sample) happens here,
on this thread alone, so KV caches need no locks; freeing a session's cache is just another thing the thread does.

Rows that begin a session in the way another began are not computed again: their pages and results are there already
(kernels/prefixes.py).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import torch

from ...kernels import codecs
from ...kernels.head import Embedding, Head
from ...kernels.kvcache import KVPool, LaneCache, NeedReplay
from ...kernels.prefixes import Start, seed_of
from ...kernels.sampling import sample
from ...kernels.span import Piece, Span
from ...protocol import token_rows
from ...protocol.errors import LocalProtocolError, RemoteProtocolError, SwarmError
from ...protocol.messages import Kind, Open, Output, Want
from ...protocol.sampling import Choice, SamplingParams
from ...protocol.session import Job
from ...protocol.tensors import Codec, codec_at
from .outcome import BadRows, KVGone, Outcome, Timings
from .scheduler import Item, Scheduler

MAX_WAITING_ROWS: Final = 1 << 16
"""Rows all sessions together may have waiting; sessions bound themselves far below this."""


@dataclass(slots=True)
class Seat:
    """A session's place at the device: its lanes' KV caches and how its rows come in and go out."""

    start: int
    end: int
    codec: Codec
    cuts: frozenset[int]
    embed: bool
    output: Output
    is_tail: bool
    sampling: SamplingParams
    caches: list[LaneCache]
    user: bytes = b""
    """Who opened it: users share the device evenly."""
    seed: bytes = b""
    """Seats of equal seeds share what they have in common; empty: with nobody."""
    closed: bool = False

    def codec_at(self, border: int) -> Codec:
        """What hidden states travel in at this border."""
        return codec_at(border, self.codec, self.cuts)


@dataclass(slots=True)
class _Work:
    seat: Seat
    job: Job
    done: Callable[[Outcome], None]
    start: Start = field(default_factory=Start)
    rows: torch.Tensor | None = None  # [rows to compute, hidden]
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class _Move:
    """Something to do with a seat's caches between jobs."""

    run: Callable[[], None]


class Worker:
    """Owns the thread. All methods are called from the event loop, except those starting with `_run`."""

    def __init__(
        self,
        span: Span,
        pool: KVPool,
        embedding: Embedding | None,
        head: Head | None,
        timings: Timings,
        share_prefixes: str = "all",
    ) -> None:
        self.span = span
        self.pool = pool
        self.embedding = embedding
        self.head = head
        self.timings = timings
        self._share_prefixes = share_prefixes
        self._loop = asyncio.get_running_loop()
        self._scheduler: Scheduler[_Work | _Move] = Scheduler()
        self._condition = threading.Condition()
        self._to_free: list[LaneCache] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"compute-{span.start}:{span.end}", daemon=True)
        self._thread.start()

    @property
    def queue_s(self) -> float:
        """Estimated time a new job would wait."""
        blocks = self.span.end - self.span.start
        return min(3600.0, self._scheduler.rows * self.timings.decode_s * blocks)

    def open(self, request: Open, user: bytes = b"") -> Seat:
        """Promise a session room for all it may need. Raises ServerBusy when the KV budget has none."""
        caches: list[LaneCache] = []
        try:
            caches.extend(
                self.pool.open_lane(request.start, request.end, max_length=request.max_length)
                for _ in range(request.lanes)
            )
        except SwarmError:
            for cache in caches:
                cache.free()
            raise
        return Seat(
            start=request.start,
            end=request.end,
            codec=Codec(request.codec),
            cuts=frozenset(request.cuts),
            embed=request.embed,
            output=Output(request.output),
            is_tail=not request.next,
            sampling=SamplingParams.from_wire(request.sampling) if request.sampling else SamplingParams(),
            caches=caches,
            user=user,
            seed=self._seed(request, user),
        )

    def _seed(self, request: Open, user: bytes) -> bytes:
        """What decides about a session's rows beside those that come in."""
        if self._share_prefixes == "none":
            return b""
        cuts = sorted(cut for cut in set(request.cuts) if request.start <= cut < request.end)
        codec = request.codec if cuts else None
        owner = user if self._share_prefixes == "user" else b""
        return seed_of(request.start, request.end, request.embed, cuts, codec, owner)

    def submit(self, seat: Seat, job: Job, done: Callable[[Outcome], None]) -> None:
        """Queue a job; `done` is called on the loop with its outcome, unless the seat was released meanwhile."""
        work: _Work | _Move = _Work(seat, job, done)
        item = Item((id(seat), job.lane), (seat.start, seat.end), job.count, work, seat.user)
        with self._condition:
            self._scheduler.add(item)
            self._condition.notify()

    def fork(self, seat: Seat, source: int, target: int) -> None:
        """Make lane `target` what the jobs submitted so far make of lane `source`; those submitted later go after it.

        What `target` held is forgotten. Pages are shared until one of the two writes, so it takes no time and, for what
        they have in common, no memory. Raises LocalProtocolError for lanes the seat has not.
        """
        if source == target:
            return
        copy = partial(_cache(seat, target).copy, _cache(seat, source))
        self._move(seat, (source, target), copy)

    def drop(self, seat: Seat, lane: int) -> None:
        """Empty a lane once the jobs submitted so far are done and give its memory back.

        The lane stays promised: it can be fed from position 0 or forked into again.
        """
        self._move(seat, (lane, None), _cache(seat, lane).reset)

    def _move(self, seat: Seat, lanes: tuple[int, int | None], run: Callable[[], None]) -> None:
        first, second = ((None if lane is None else (id(seat), lane)) for lane in lanes)
        work: _Work | _Move = _Move(run)
        with self._condition:
            if not seat.closed:
                self._scheduler.add(Item(first, (seat.start, seat.end), 0, work, seat.user, second))
                self._condition.notify()

    def release(self, seat: Seat) -> None:
        """The session has ended: drop its jobs and give its memory back. Safe to call twice."""
        with self._condition:
            if seat.closed:
                return
            seat.closed = True
            for lane in range(len(seat.caches)):
                self._scheduler.remove((id(seat), lane))
            self._to_free.extend(seat.caches)
            self._condition.notify()

    def stop(self) -> None:
        """End the thread after its current pass and wait for it (a pass takes milliseconds)."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while (batch := self._run_wait()) is not None:
                for item in batch:
                    if isinstance(item.work, _Move):
                        item.work.run()
                if work := [item.work for item in batch if isinstance(item.work, _Work)]:
                    self._run_batch(work)

    def _run_wait(self) -> list[Item[_Work | _Move]] | None:
        """Block until there is something to do; None when the thread is to end."""
        with self._condition:
            while not self._stopping:
                while self._to_free:
                    self._to_free.pop().free()
                if batch := self._scheduler.next_batch():
                    return batch
                self._condition.wait()
        return None

    def _run_batch(self, batch: Sequence[_Work]) -> None:
        began = time.perf_counter()
        ready = [work for work in batch if self._run_prepare(work)]
        if fresh := [work for work in ready if work.start.count < work.job.count]:
            self._run_blocks(fresh)
        for work in ready:
            self._run_finish(work)
        seconds = time.perf_counter() - began
        for work in batch:
            outcome = work.outcome or Outcome()
            timed = Outcome(outcome.payload, outcome.token, outcome.logprob, seconds, outcome.error)
            self._loop.call_soon_threadsafe(_deliver, work, timed)

    def _run_prepare(self, work: _Work) -> bool:
        """Cache cut, room reserved, rows in. A fault of one job is that job's outcome, not its neighbours'."""
        seat, job = work.seat, work.job
        try:
            cache = seat.caches[job.lane]
            if job.position == 0 and cache.length:
                cache.reset()  # a replay from the start: also windowed blocks can do that
            cache.truncate(job.position)
            work.start = self.pool.prefixes.begin(cache, seat.seed, job.count, job.payload)
            if work.start.count < job.count:
                work.rows = self._run_rows(seat, job, work.start.count)
        except NeedReplay as exc:
            work.outcome = Outcome(error=KVGone(str(exc)))
            return False
        except SwarmError as exc:
            work.outcome = Outcome(error=exc)
            return False
        return True

    def _run_rows(self, seat: Seat, job: Job, first: int) -> torch.Tensor:
        """A job's rows from `first` on, [rows, hidden] in the compute dtype."""
        config, count = self.span.config, job.count - first
        payload = memoryview(job.payload)[len(job.payload) // job.count * first :]
        if job.payload_kind == Kind.HIDDEN:
            codec = seat.codec_at(seat.start)
            rows = codecs.decode(payload, codec, count, config.hidden_size, self.span.dtype)
            if not torch.isfinite(rows).all():
                raise BadRows("hidden states from the previous hop are not finite")
            return rows
        assert self.embedding is not None
        ids = np.frombuffer(payload, np.uint32).astype(np.int64)
        if int(ids.max()) >= config.vocab_size:
            raise RemoteProtocolError(f"token id {int(ids.max())} is not in the vocabulary of {config.vocab_size}")
        rows = self.embedding(torch.from_numpy(ids))
        return codecs.round_trip(rows, seat.codec) if seat.start in seat.cuts else rows

    def _run_blocks(self, fresh: Sequence[_Work]) -> None:
        """Compute the rows that are not known; each job's then stand in its `rows`."""
        seat, pieces, rows = fresh[0].seat, [], []
        for work in fresh:
            assert work.rows is not None
            rows.append(work.rows)
            position = work.job.position + work.start.count
            cache = work.seat.caches[work.job.lane]
            pieces.append(Piece(cache, position, work.rows.shape[0], work.seat.cuts, work.seat.codec))
        count = sum(part.shape[0] for part in rows)
        began = time.perf_counter()
        out = self.span.run(torch.cat(rows) if len(rows) > 1 else rows[0], pieces, seat.start, seat.end)
        self.timings.learn(count, seat.end - seat.start, time.perf_counter() - began)
        for work, piece, part in zip(fresh, pieces, torch.split(out, [piece.count for piece in pieces]), strict=True):
            work.rows = part
            self.pool.prefixes.end(piece.cache, work.start, part)

    def _run_finish(self, work: _Work) -> None:
        parts = work.start.rows + ([] if work.rows is None else [work.rows])
        try:
            work.outcome = self._run_output(work.seat, work.job, torch.cat(parts) if len(parts) > 1 else parts[0])
        except SwarmError as exc:
            work.outcome = Outcome(error=exc)

    def _run_output(self, seat: Seat, job: Job, rows: torch.Tensor) -> Outcome:
        """What leaves this hop for these rows."""
        if not seat.is_tail:
            return Outcome(codecs.encode(rows, seat.codec_at(seat.end)))
        if job.want == Want.NOTHING:
            return Outcome()
        rows = rows[-1:] if job.want == Want.LAST else rows
        if seat.output == Output.HIDDEN:
            return Outcome(codecs.encode(rows, seat.codec_at(seat.end)))
        assert self.head is not None
        if seat.end in seat.cuts:
            rows = codecs.round_trip(rows, seat.codec)
        logits = self.head.logits(rows)
        if seat.output == Output.LOGITS:
            return Outcome(logits.float().numpy().tobytes())
        params, known = seat.sampling.for_lane(job.lane), job.position + job.count - rows.shape[0] + 1
        choices = [Choice(*sample(row, params, (), known + index)) for index, row in enumerate(logits)]
        if job.want == Want.ALL:
            return Outcome(token_rows.encode(choices))
        return Outcome(token=choices[-1].token, logprob=min(0.0, choices[-1].logprob))


def _cache(seat: Seat, lane: int) -> LaneCache:
    if not 0 <= lane < len(seat.caches):
        raise LocalProtocolError(f"lane {lane} of a seat with {len(seat.caches)}")
    return seat.caches[lane]


def _deliver(work: _Work, outcome: Outcome) -> None:
    """On the loop: hand the outcome over, unless its session is gone."""
    if not work.seat.closed:
        work.done(outcome)
