"""The two ends of a chain: token ids -> what the first hop takes, and its results -> choices of tokens.

Torch-free: a client without the model's files sends token ids and gets token ids back. With the files, embedding, head
and sampling run here (local.py).
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from ...protocol import token_rows
from ...protocol.messages import Output, Result, Want
from ...protocol.sampling import Choice, SamplingParams
from ...protocol.tensors import Codec
from .chain import ChainSession

if TYPE_CHECKING:
    from .local import LocalEnds

FORWARD_ROWS: Final = 64
"""Tokens per chunk when every row's result is wanted: logits of a large vocabulary take 1 MB a row."""


class Ends:
    """What turns token ids into the chain's input and its results into the next tokens."""

    def __init__(self, codec: Codec, output: Output, vocab: int, local: LocalEnds | None) -> None:
        self._codec = codec
        self._vocab = vocab
        self._output = output
        self._local = local

    @property
    def max_guesses(self) -> int:
        """Guesses whose rows a result can answer all at once."""
        return FORWARD_ROWS - 1

    async def rows(self, ids: Sequence[int]) -> bytes:
        """The payload for these ids."""
        if self._local is None:
            return struct.pack(f"<{len(ids)}I", *ids)
        return await self._local.embed(ids, self._codec)

    async def choose(
        self,
        result: Result,
        payload: bytes,
        params: SamplingParams,
        history: Sequence[int],
        guesses: Sequence[int],
        top: int = 0,
    ) -> list[Choice]:
        """The tokens after `history`, as many as the guesses let be known; see sampling.choose_rows."""
        if self._output == Output.TOKEN:
            if not payload:
                return [Choice(result.token, result.logprob)]
            return _confirmed(token_rows.decode(payload, self._vocab), guesses)
        if self._local is not None:
            return await self._local.choose(payload, self._codec, params, history, guesses, top)
        from .local import choose_from_logits  # torch is loaded here, not before

        return await choose_from_logits(payload, self._vocab, params, history, guesses, top)

    async def continuations(
        self, payload: bytes, params: SamplingParams, history: Sequence[int], count: int
    ) -> list[tuple[int, float]]:
        """The likeliest tokens after `history` and their log probabilities. Not where the tail samples."""
        if self._local is not None:
            return await self._local.continuations(payload, self._codec, params, history, count)
        from .local import continuations_from_logits  # torch is loaded here, not before

        return await continuations_from_logits(payload, self._vocab, params, history, count)

    async def forward(self, chain: ChainSession, ids: Sequence[int]) -> AsyncIterator[bytes]:
        """Results of a whole sequence, a chunk each, in order."""
        parts = list(chunks(ids, FORWARD_ROWS))
        for part in parts:
            chain.feed(await self.rows(part), len(part), Want.ALL)
        for _ in parts:
            yield (await chain.result())[1]


def _confirmed(choices: Sequence[Choice], guesses: Sequence[int]) -> list[Choice]:
    """The choice behind each right guess, up to the first that is wrong; sampled tokens of all rows came back."""
    behind = choices[-len(guesses) - 1 :]
    right = 0
    while right < len(guesses) and behind[right].token == guesses[right]:
        right += 1
    return list(behind[: right + 1])


def chunks(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive parts of at most `size`."""
    return (ids[at : at + size] for at in range(0, len(ids), size))
