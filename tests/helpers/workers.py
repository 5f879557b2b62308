"""A compute thread by itself: token ids in, rows or logits out, with no network and no session machine around it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from helpers.tiny_models import RandomCheckpoint, make_config
from swarmnode.kernels.engine import load_embedding, load_head, load_span
from swarmnode.kernels.kvcache import KVPool
from swarmnode.node.server.compute import Seat, Worker
from swarmnode.node.server.outcome import Outcome, Timings
from swarmnode.protocol.messages import Kind, Open, Output, Want
from swarmnode.protocol.session import Job
from swarmnode.protocol.tensors import Codec

_numbers = itertools.count(1)


class Desk:
    """A worker over a random tiny model. `async with`."""

    def __init__(
        self, *, budget=1 << 24, dtype=torch.float32, blocks=3, kv_dtype=None, share_prefixes="all", **config
    ) -> None:
        self.config = make_config(num_blocks=blocks, **config)
        checkpoint = RandomCheckpoint(self.config)
        self.dtype = dtype
        self._ends = load_embedding(checkpoint, dtype=dtype), load_head(checkpoint, dtype=dtype)
        self._share_prefixes = share_prefixes
        self._span = load_span(checkpoint, 0, blocks, dtype=dtype)
        self.pool = KVPool(budget, self.config, 0, blocks, kv_dtype or dtype)

    async def __aenter__(self) -> Desk:
        torch.set_num_threads(1)
        self.worker = Worker(self._span, self.pool, *self._ends, Timings(), self._share_prefixes)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.worker.stop)

    def open(self, *, start=0, end=None, user=b"", codec=Codec.FP32, **more) -> Seat:
        """A session, by default over all blocks, of token ids, that returns hidden states."""
        end = self.config.num_blocks if end is None else end
        values = {"cuts": (), "lanes": 1, "max_length": 1024, "epoch": 0, "embed": start == 0, **more}
        request = Open(session=bytes(16), digest=bytes(32), start=start, end=end, codec=int(codec), **values)
        return self.worker.open(request, user)

    def feed(self, seat: Seat, payload: bytes, count: int, position: int, lane=0, want=Want.ALL) -> asyncio.Future:
        """Queue rows; the future is the outcome."""
        kind = Kind.TOKENS if seat.embed else Kind.HIDDEN
        done = asyncio.get_running_loop().create_future()
        job = Job(
            lane=lane,
            position=position,
            count=count,
            number=next(_numbers),
            payload_kind=int(kind),
            want=int(want),
            payload=payload,
        )
        self.worker.submit(seat, job, done.set_result)
        return done

    def tokens(self, seat: Seat, ids: Sequence[int], position: int, lane=0, want=Want.ALL) -> asyncio.Future:
        """Queue token ids."""
        return self.feed(seat, np.array(ids, np.uint32).tobytes(), len(ids), position, lane, want)

    async def rows(self, seat: Seat, ids: Sequence[int], position: int, lane=0) -> bytes:
        """The payload that comes of them."""
        return payload(await self.tokens(seat, ids, position, lane))

    async def alone(self, ids: Sequence[int], **more) -> bytes:
        """What a session of its own gives for a whole text, token by token."""
        seat = self.open(**more)
        parts = [await self.rows(seat, [token], position) for position, token in enumerate(ids)]
        self.worker.release(seat)
        return b"".join(parts)

    @property
    def computed(self) -> int:
        """Rows that went through the blocks so far."""
        return self.worker.timings.rows

    async def settle(self) -> None:
        """Wait until the thread has done what it was told so far."""
        await self._drained()
        seat = self.open(max_length=1)
        await self.rows(seat, [0], 0)  # the last thing drained may still be at work
        self.worker.release(seat)
        await self._drained()

    async def _drained(self) -> None:
        while self._busy():  # noqa: ASYNC110 - a thread is waited for
            await asyncio.sleep(0)

    def _busy(self) -> bool:
        with self.worker._condition:
            return bool(self.worker._to_free or len(self.worker._scheduler))


def payload(outcome: Outcome) -> bytes:
    """The rows of an outcome that is no error."""
    assert outcome.error is None, outcome.error
    return outcome.payload


__all__ = ["Desk", "Output", "Want", "payload"]
