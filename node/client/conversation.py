"""Generations that follow each other over one session, so that each computes only what is new of its prompt.

The session's lane holds the last prompt and answer. The next prompt usually begins with them: what both have in common
stays, the rest is truncated away. What the chat template or the tokenizer turned into something else is simply not
common. A generation that is broken off ends the session, so that servers are free at once; so does silence, before the
servers lose patience. The next call then opens another and computes its whole prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, Unpack

from ...protocol.errors import ConfigError, NoRoute, ServerBusy, SwarmError
from .generate import Piece
from .opening import Context
from .request import Options, Prompt, Request

if TYPE_CHECKING:
    from .model import RemoteModel, Run

KEEP_S: Final = 300.0
"""Servers are freed when nobody has said anything for this long; they would end the session after 600 s."""
LEAST_LENGTH: Final = 1024
"""Positions to ask for at least: a session that is too short has to be opened again, and all of it computed."""


class Conversation:
    """Made by `RemoteModel.conversation`. Close it, or use `async with`: it holds memory at the servers."""

    def __init__(self, model: RemoteModel, context: Context, max_length: int | None) -> None:
        most = model.config.max_positions
        if max_length is not None and not 1 <= max_length <= most:
            raise ConfigError(f"max_length is {max_length}: {model.name} has {most} positions")
        self._model = model
        self._context = context
        self._max_length = max_length
        self._run: Run | None = None
        self._kind: tuple[object, ...] = ()
        """What the open session is good for."""
        self._room = 0
        self._held: list[int] = []
        """Tokens the session's lane holds."""
        self._timer: asyncio.TimerHandle | None = None
        self._busy = False

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """Generate after the whole conversation so far, given as one prompt. One at a time, one sequence.

        Options and errors are those of `RemoteModel.generate`. `last_stats.cached_tokens` says what was there already.
        """
        if options.get("n", 1) != 1:
            raise ConfigError("a conversation writes one sequence: use generate for n > 1")
        if self._busy:
            raise ConfigError("the conversation is generating already: wait for it, or start another one")
        self._busy = True
        try:
            async with contextlib.aclosing(self._generate(prompt, options)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._busy = False

    async def _generate(self, prompt: Prompt, options: Options) -> AsyncGenerator[Piece, None]:
        began = self._context.clock.now()
        request = await self._model.request([prompt], options)
        writing = request.writings[0]
        run = await self._run_for(request)
        request.stats.cached_tokens = run.chain.position()
        try:
            async with contextlib.aclosing(self._model.pieces(run, request, began)) as pieces:
                async for piece in pieces:
                    if piece.finish_reason is not None:  # rows behind the last token but one are wrong guesses, if any
                        self._held = writing.history[: min(run.chain.position(), len(writing.history) - 1)]
                        self._rest()
                    yield piece
        finally:
            if self._timer is None:  # broken off or failed
                await self.close()

    async def _run_for(self, request: Request) -> Run:
        """The session there is, cut to what it has in common with the prompt; a new one if it will not do."""
        self._wake()
        kind = (request.wire, request.tail_can_choose, request.params.to_wire())
        if self._run is not None and self._kind == kind and request.max_length <= self._room:
            same = _common(self._held, request.prompts[0][:-1])
            with contextlib.suppress(SwarmError):  # it failed while nobody looked
                self._run.chain.truncate(same)
                return self._run
        await self.close()
        self._run, self._kind = await self._open(request), kind
        return self._run

    async def _open(self, request: Request) -> Run:
        """With room for more turns, if anybody has it."""
        needed = request.max_length
        ample = max(needed, self._max_length or min(max(2 * needed, LEAST_LENGTH), self._model.config.max_positions))
        try:
            self._room = ample
            return await self._model.open_run(request, ample)
        except (NoRoute, ServerBusy):
            if ample == needed:
                raise
            self._room = needed
            return await self._model.open_run(request, needed)

    def _rest(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(KEEP_S, self._lapse)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _lapse(self) -> None:
        run, self._run, self._timer = self._run, None, None
        if run is not None:
            self._context.tasks.start(run.chain.close(), "conversation-idle")

    async def close(self) -> None:
        """Free the servers. The conversation can be used again; it then begins anew. Safe to call twice."""
        self._wake()
        run, self._run, self._held = self._run, None, []
        if run is not None:
            await run.chain.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
