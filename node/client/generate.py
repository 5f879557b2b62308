"""Text generation over a chain: prefill in chunks, one traversal per token, pieces of text out.

Torch-free: a client without the model's files sends token ids and gets token ids back, and needs only the tokenizer.
With the files, embedding, head and sampling run here (local.py).
"""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ...protocol.messages import Output, Result, Want
from ...protocol.sampling import SamplingParams
from ...protocol.tensors import Codec
from ..clock import Clock
from .chain import ChainSession

if TYPE_CHECKING:
    from ...kernels.tokenizer import TextStream, Tokenizer
    from .local import LocalEnds

PREFILL_ROWS: Final = 128
"""Tokens per prefill chunk: while one stage computes a chunk, the one before computes the next."""
FORWARD_ROWS: Final = 64
"""Tokens per chunk when every row's result is wanted: logits of a large vocabulary take 1 MB a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one step adds."""

    text: str
    """New text; may be empty while a character or a possible stop string is incomplete."""
    token_id: int
    logprob: float
    """Natural log probability of the token under the raw logits."""
    finish_reason: str | None = None
    """On the last piece: `stop` (end token or stop string) or `length`."""


@dataclass(slots=True, kw_only=True)
class GenerationStats:
    """How a generation went."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float = 0.0
    """From the call to the first token."""
    decode_s: float = 0.0
    """From the first token to the last."""
    longest_gap_s: float = 0.0
    """Longest wait between two tokens: what a user would notice of a failure."""
    repairs: int = 0
    wire: str = ""
    route: tuple[str, ...] = ()
    """`peer[start:end]` of each hop, as the chain stood at the end."""
    gaps_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Decoding rate, the first token not counted."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def stall_s(self) -> float:
        """Longest gap less the median one."""
        return self.longest_gap_s - sorted(self.gaps_s)[len(self.gaps_s) // 2] if self.gaps_s else 0.0


class Ends:
    """What turns token ids into the chain's input and its results into the next token."""

    def __init__(
        self, codec: Codec, output: Output, params: SamplingParams, vocab: int, local: LocalEnds | None
    ) -> None:
        self._codec = codec
        self._vocab = vocab
        self._output = output
        self._params = params
        self._local = local

    async def rows(self, ids: Sequence[int]) -> bytes:
        """The payload for these ids."""
        if self._local is None:
            return struct.pack(f"<{len(ids)}I", *ids)
        return await self._local.embed(ids, self._codec)

    async def token(self, result: Result, payload: bytes, history: Sequence[int]) -> tuple[int, float]:
        """The next token and its log probability."""
        if self._output == Output.TOKEN:
            return result.token, result.logprob
        if self._local is not None:
            return await self._local.sample(payload, self._codec, self._params, history)
        from .local import sample_logits  # torch is loaded here, not before

        return await sample_logits(payload, self._vocab, self._params, history)

    async def forward(self, chain: ChainSession, ids: Sequence[int]) -> AsyncIterator[bytes]:
        """Results of a whole sequence, a chunk each, in order."""
        chunks = list(_chunks(ids, FORWARD_ROWS))
        for chunk in chunks:
            chain.feed(await self.rows(chunk), len(chunk), Want.ALL)
        for _ in chunks:
            yield (await chain.result())[1]


class Generation:
    """One running generation. Iterate over `pieces`; `stats` is complete when that ends."""

    def __init__(
        self,
        chain: ChainSession,
        ends: Ends,
        tokenizer: Tokenizer,
        clock: Clock,
        *,
        eos: Sequence[int],
        stops: Sequence[str],
        max_new_tokens: int,
        stats: GenerationStats,
    ) -> None:
        self._chain = chain
        self._ends = ends
        self._tokenizer = tokenizer
        self._clock = clock
        self._eos = frozenset(eos)
        self._stops = stops
        self._max_new_tokens = max_new_tokens
        self.stats = stats

    async def pieces(self, prompt: Sequence[int], began: float) -> AsyncGenerator[Piece, None]:
        """Generate after `prompt`. The caller closes the chain."""
        from ...kernels.tokenizer import TextStream

        stream = TextStream(self._tokenizer, prompt, self._stops)
        history = list(prompt)
        await self._prefill(prompt)
        last = began
        while True:
            token, logprob = await self._next_token(history)
            last = self._note(last, first=self.stats.new_tokens == 0)
            piece = self._piece(stream, token, logprob)
            history.append(token)
            if piece.finish_reason is None:
                self._chain.feed(await self._ends.rows([token]), 1, Want.LAST)
            yield piece
            if piece.finish_reason is not None:
                return

    async def _prefill(self, prompt: Sequence[int]) -> None:
        """Feed the prompt in chunks; only the last row's result is wanted."""
        chunks = list(_chunks(prompt, PREFILL_ROWS))
        for number, chunk in enumerate(chunks):
            want = Want.LAST if number + 1 == len(chunks) else Want.NOTHING
            self._chain.feed(await self._ends.rows(chunk), len(chunk), want)

    async def _next_token(self, history: Sequence[int]) -> tuple[int, float]:
        result, payload = await self._chain.result()
        return await self._ends.token(result, payload, history)

    def _piece(self, stream: TextStream, token: int, logprob: float) -> Piece:
        self.stats.new_tokens += 1
        if token in self._eos:
            return Piece(text=stream.finish().text, token_id=token, logprob=logprob, finish_reason="stop")
        piece = stream.push(token)
        if piece.stopped:
            return Piece(text=piece.text, token_id=token, logprob=logprob, finish_reason="stop")
        if self.stats.new_tokens >= self._max_new_tokens:
            text = piece.text + stream.finish().text
            return Piece(text=text, token_id=token, logprob=logprob, finish_reason="length")
        return Piece(text=piece.text, token_id=token, logprob=logprob)

    def _note(self, last: float, *, first: bool) -> float:
        now = self._clock.now()
        if first:
            self.stats.first_token_s = now - last
        else:
            self.stats.gaps_s.append(now - last)
            self.stats.decode_s += now - last
            self.stats.longest_gap_s = max(self.stats.longest_gap_s, now - last)
        return now


def _chunks(ids: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (ids[at : at + size] for at in range(0, len(ids), size))
