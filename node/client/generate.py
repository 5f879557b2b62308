"""Text generation over a chain: prefill in chunks, a traversal for each step of each sequence, pieces of text out.

A lane of the session carries one sequence. Lanes do not wait for each other: as soon as a lane's step is back its next
one is fed, and while one stage works for one lane the stage before works for another. A step carries the last token
that is known, and guesses of what follows (kernels/speculative.py); those the model confirms are tokens like others,
the rows of the rest are truncated away. Torch-free.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ...kernels.speculative import Pace, Speculator
from ...protocol.messages import Result, Want
from ...protocol.sampling import Choice, SamplingParams
from ..clock import Clock
from .chain import ChainSession
from .ends import Ends, chunks

if TYPE_CHECKING:
    from ...kernels.tokenizer import TextStream
    from .draft import DraftModel

PREFILL_ROWS: Final = 128
"""Tokens per prefill chunk: while one stage computes a chunk, the one before computes the next."""

INLINE_TOKENS: Final = 1024
"""Tokens that are indexed on the loop, in some 5 ms; more are on a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one token adds."""

    text: str
    """New text; may be empty while a character or a possible stop string is incomplete."""
    token_id: int
    logprob: float
    """Natural log probability of the token under the raw logits."""
    finish_reason: str | None = None
    """On the last piece: `stop` (end token or stop string) or `length`."""
    index: int = 0
    """Which sequence it belongs to, where several are written at once."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens here and their log probabilities, if they were asked for."""


@dataclass(slots=True, kw_only=True)
class GenerationStats:
    """How a generation went."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, those that a conversation had computed before."""
    new_tokens: int = 0
    first_token_s: float = 0.0
    """From the call to the first token."""
    decode_s: float = 0.0
    """From the first token to the last."""
    longest_gap_s: float = 0.0
    """Longest wait between two tokens: what a user would notice of a failure."""
    repairs: int = 0
    traversals: int = 0
    """Steps that went through the chain; the prompt counts as one."""
    drafted: int = 0
    """Tokens guessed and sent to be confirmed."""
    accepted: int = 0
    """Guesses that were right."""
    wire: str = ""
    route: tuple[str, ...] = ()
    """`peer[start:end]` of each hop, as the chain stood at the end."""
    gaps_s: list[float] = field(default_factory=list)

    def note_chain(self, repairs: int, wire: str, route: tuple[str, ...]) -> None:
        """How the chain stood at the end."""
        self.repairs, self.wire, self.route = repairs, wire, route

    @property
    def tokens_per_s(self) -> float:
        """Decoding rate, the first token not counted."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def tokens_per_traversal(self) -> float:
        """1 without speculation, up to one more than is guessed with it."""
        return self.new_tokens / self.traversals if self.traversals else 0.0

    @property
    def stall_s(self) -> float:
        """Longest gap less the median one."""
        return self.longest_gap_s - sorted(self.gaps_s)[len(self.gaps_s) // 2] if self.gaps_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is wanted of every sequence of a generation."""

    max_new_tokens: int
    ends: frozenset[int]
    """Token ids a sequence ends with."""
    top: int = 0
    """Likeliest tokens to report beside each one chosen."""
    ngrams: bool = True
    """Guess tokens by looking them up in the text."""


class Writing:
    """One sequence on its lane."""

    def __init__(
        self, lane: int, leader: int, prompt: Sequence[int], params: SamplingParams, stream: TextStream
    ) -> None:
        self.lane = lane
        """Its number among those written at once, too."""
        self.leader = leader
        """The first lane of the same prompt, which computes the prompt for all."""
        self.history = list(prompt)
        """Every token known: all but the last were fed."""
        self.params = params
        self.stream = stream
        self.new_tokens = 0
        self.guesses: list[int] = []
        """Guesses of the step under way."""
        self.due = 0
        """Rows of it whose results are due."""
        self.payload = b""
        """Their results so far."""
        self.fed_at = 0.0
        self.speculator: Speculator | None = None

    def arrived(self, result: Result, payload: bytes) -> bool:
        """A result of the step under way. True when all its rows are back."""
        self.payload += payload
        self.due -= result.count
        return self.due <= 0


class Generation:
    """One running generation. Iterate over `pieces`; `stats` is complete when that ends."""

    def __init__(
        self,
        chain: ChainSession,
        ends: Ends,
        clock: Clock,
        *,
        wishes: Wishes,
        stats: GenerationStats,
        draft: DraftModel | None = None,
    ) -> None:
        self._chain = chain
        self._ends = ends
        self._clock = clock
        self._wishes = wishes
        self._draft = draft
        self._pace = Pace()
        self._begun = False
        self.stats = stats

    async def pieces(self, writings: Sequence[Writing], began: float) -> AsyncGenerator[Piece, None]:
        """Write on after each prompt, a piece per token. The caller closes the chain."""
        try:
            async with contextlib.aclosing(self._write(writings, began)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            if self._draft is not None:
                for writing in writings:
                    await self._draft.free((self, writing.lane))

    async def _write(self, writings: Sequence[Writing], began: float) -> AsyncGenerator[Piece, None]:
        live = {writing.lane: writing for writing in writings}
        for writing in writings:
            if writing.lane == writing.leader:
                await self._prefill(writing)
        last = began
        while live:
            result, payload = await self._chain.result()
            writing = live[result.lane]
            if not writing.arrived(result, payload):
                continue
            if writing.new_tokens == 0 and writing.lane == writing.leader:
                await self._share(writing, live.values())
            made = await self._choose(writing, result)
            for _ in made:
                last = self._note(last)
            if made[-1].finish_reason is None:
                await self._step(writing)
            else:
                del live[writing.lane]
                if live:
                    self._chain.drop(writing.lane)
            for piece in made:
                yield piece

    async def _share(self, leader: Writing, others: Iterable[Writing]) -> None:
        """The prompt is computed: the other sequences after it begin there, each with a choice of its own."""
        known = len(leader.history) - 1
        for writing in others:
            if writing.leader == leader.lane != writing.lane:
                self._chain.fork(leader.lane, writing.lane)
                self._chain.truncate(known, writing.lane)
                self._feed(writing, await self._ends.rows(writing.history[-1:]), 1, Want.LAST)
                await self._prepare(writing)

    async def _prefill(self, writing: Writing) -> None:
        """Feed what is new of the prompt in chunks; only the last row's result is wanted."""
        lane = writing.lane
        parts = list(chunks(writing.history[self._chain.position(lane) :], PREFILL_ROWS))
        for number, part in enumerate(parts, 1):
            want = Want.LAST if number == len(parts) else Want.NOTHING
            self._feed(writing, await self._ends.rows(part), len(part), want)
        await self._prepare(writing)

    async def _prepare(self, writing: Writing) -> None:
        """Get ready to guess, while the servers compute."""
        prompt = writing.history
        if self._wishes.ngrams or self._draft is not None:
            writing.speculator = Speculator(self._pace, ngrams=self._wishes.ngrams, model=self._draft is not None)
            if len(prompt) > INLINE_TOKENS:
                await asyncio.to_thread(writing.speculator.follow, tuple(prompt))

    async def _step(self, writing: Writing) -> None:
        """Take back the rows of wrong guesses, and feed the last token with new ones."""
        lane, known = writing.lane, len(writing.history) - 1
        writing.guesses = guesses = await self._guess(writing)
        rows = await self._ends.rows([writing.history[-1], *guesses])
        if self._chain.position(lane) > known:
            self._chain.truncate(known, lane)
        self._feed(writing, rows, 1 + len(guesses), Want.ALL if guesses else Want.LAST)

    def _feed(self, writing: Writing, rows: bytes, count: int, want: Want) -> None:
        self._chain.feed(rows, count, want, writing.lane)
        writing.due, writing.fed_at, writing.payload = count, self._clock.now(), b""

    async def _guess(self, writing: Writing) -> list[int]:
        speculator = writing.speculator
        if speculator is None:
            return []
        room = min(self._wishes.max_new_tokens - writing.new_tokens - 1, self._ends.max_guesses)
        guess = speculator.propose(writing.history, room)
        if guess.tokens is None and self._draft is not None:
            began = self._clock.now()
            tokens = await self._draft.guess((self, writing.lane), writing.history, max(1, guess.count), writing.params)
            speculator.drafted_by_model(tokens, self._clock.now() - began)
        return (guess.tokens or [])[: guess.count]

    async def _choose(self, writing: Writing, result: Result) -> list[Piece]:
        """The pieces a step brings."""
        choices = await self._ends.choose(
            result, writing.payload, writing.params, writing.history, writing.guesses, self._wishes.top
        )
        self.stats.traversals += 1
        if writing.new_tokens and writing.speculator is not None:
            writing.speculator.observe([choice.token for choice in choices], self._clock.now() - writing.fed_at)
        self.stats.drafted += len(writing.guesses)
        made: list[Piece] = []
        for choice in choices:
            made.append(self._piece(writing, choice))
            writing.history.append(choice.token)
            if made[-1].finish_reason is not None:
                break
        self.stats.accepted += len(made) - 1
        return made

    def _piece(self, writing: Writing, choice: Choice) -> Piece:
        self.stats.new_tokens += 1
        writing.new_tokens += 1
        text, reason = "", "stop"
        if choice.token in self._wishes.ends:
            text = writing.stream.finish().text
        else:
            piece = writing.stream.push(choice.token)
            text = piece.text
            if not piece.stopped:
                over = writing.new_tokens >= self._wishes.max_new_tokens
                text, reason = (text + writing.stream.finish().text, "length") if over else (text, "")
        return Piece(
            text=text,
            token_id=choice.token,
            logprob=choice.logprob,
            finish_reason=reason or None,
            index=writing.lane,
            top_logprobs=choice.top,
        )

    def _note(self, last: float) -> float:
        now, stats = self._clock.now(), self.stats
        if not self._begun:
            self._begun, stats.first_token_s = True, now - last
        else:
            stats.gaps_s.append(now - last)
            stats.decode_s += now - last
            stats.longest_gap_s = max(stats.longest_gap_s, now - last)
        return now
