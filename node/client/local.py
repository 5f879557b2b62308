"""Embedding, LM head and sampling on this machine, for a client that has the model's files.

They run on one thread of their own: the head of Gemma 3 270M alone reads 168 MB a token, and the event loop must not
wait for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from ...kernels import codecs
from ...kernels.engine import DTYPES, load_embedding, load_head
from ...kernels.sampling import choose_rows, continuations
from ...protocol.errors import RemoteProtocolError
from ...protocol.sampling import Choice, SamplingParams
from ...protocol.tensors import Codec, payload_size
from ..models import Model

T = TypeVar("T")


class LocalEnds:
    """The two ends of a model that are not blocks. Make one with `load`; `close` ends its thread."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model-ends")

    @classmethod
    async def load(cls, model: Model, dtype: str) -> LocalEnds:
        """Read embedding and head from the checkpoint. Raises CorruptCheckpoint, UnsupportedModel."""
        ends = cls(model, DTYPES[dtype])
        await ends._run(ends._load)
        return ends

    def _load(self) -> None:
        checkpoint = self._model.checkpoint
        assert checkpoint is not None
        self._embedding = load_embedding(checkpoint, dtype=self._dtype, device="cpu")
        self._head = load_head(checkpoint, dtype=self._dtype, device="cpu")

    async def _run(self, work: Callable[[], T]) -> T:
        def guarded() -> T:
            with torch.inference_mode():
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    async def embed(self, ids: Sequence[int], codec: Codec) -> bytes:
        """Hidden states of token ids, encoded for the wire."""
        return await self._run(lambda: codecs.encode(self._embedding(torch.tensor(ids, dtype=torch.int64)), codec))

    async def choose(
        self,
        payload: bytes,
        codec: Codec,
        params: SamplingParams,
        history: Sequence[int],
        guesses: Sequence[int],
        top: int = 0,
    ) -> list[Choice]:
        """The tokens after `history` and each right guess: the rows of `payload` stand behind these."""
        return await self._run(
            lambda: choose_rows(_last(self._logits(payload, codec), guesses), params, history, guesses, top)
        )

    async def continuations(
        self, payload: bytes, codec: Codec, params: SamplingParams, history: Sequence[int], count: int
    ) -> list[tuple[int, float]]:
        """The likeliest tokens after `history`: the last row of `payload` stands behind it."""
        return await self._run(lambda: continuations(self._logits(payload, codec)[-1], params, history, count))

    async def logits(self, payload: bytes, codec: Codec) -> torch.Tensor:
        """float32 logits [rows, vocab]."""
        return await self._run(lambda: self._logits(payload, codec))

    def _logits(self, payload: bytes, codec: Codec) -> torch.Tensor:
        hidden = self._model.config.hidden_size
        rows = len(payload) // payload_size(codec, 1, hidden)
        return self._head.logits(codecs.decode(payload, codec, rows, hidden, self._dtype))

    def close(self) -> None:
        """End the thread, after what it is doing. Blocks for that long."""
        self._thread.shutdown()


async def choose_from_logits(
    payload: bytes, vocab: int, params: SamplingParams, history: Sequence[int], guesses: Sequence[int], top: int = 0
) -> list[Choice]:
    """The same from logits a server sent: for choices that look at the history, which only we know."""
    return await asyncio.to_thread(
        lambda: choose_rows(_last(as_logits(payload, vocab), guesses), params, history, guesses, top)
    )


async def continuations_from_logits(
    payload: bytes, vocab: int, params: SamplingParams, history: Sequence[int], count: int
) -> list[tuple[int, float]]:
    """The likeliest tokens from logits a server sent."""
    return await asyncio.to_thread(lambda: continuations(as_logits(payload, vocab)[-1], params, history, count))


def _last(logits: torch.Tensor, guesses: Sequence[int]) -> torch.Tensor:
    """The row behind the last token that is known, and one behind each guess."""
    if logits.shape[0] <= len(guesses):
        raise RemoteProtocolError(f"{logits.shape[0]} rows came back for {len(guesses) + 1}")
    return logits[-len(guesses) - 1 :]


def as_logits(payload: bytes, vocab: int) -> torch.Tensor:
    """float32 logits [rows, vocab] from the bytes a server sent. Raises RemoteProtocolError unless whole rows."""
    if not payload or len(payload) % (4 * vocab):
        raise RemoteProtocolError(f"{len(payload)} bytes are no rows of {vocab} logits")
    return torch.from_numpy(np.frombuffer(payload, np.float32).copy()).reshape(-1, vocab)


def as_hidden(payload: bytes, codec: Codec, hidden: int, dtype: str) -> torch.Tensor:
    """Hidden states [rows, hidden] from the wire."""
    rows = len(payload) // payload_size(codec, 1, hidden)
    return codecs.decode(payload, codec, rows, hidden, DTYPES[dtype])


def from_hidden(hidden: torch.Tensor, codec: Codec) -> bytes:
    """Hidden states [rows, hidden] for the wire."""
    return codecs.encode(hidden, codec)
