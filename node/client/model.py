"""RemoteModel: a model served by the swarm, as a user of the embedding API holds it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Unpack

from ...kernels.beams import BeamSearch
from ...kernels.models.config import ModelConfig
from ...protocol.errors import ConfigError, UnsupportedModel
from ...protocol.messages import MAX_LANES, Output
from ...protocol.sampling import SamplingParams
from ...protocol.tensors import Codec
from ...routing.planner import Plan
from ...routing.swarm import SwarmView
from ..models import Model
from .chain import ChainSession
from .conversation import Conversation
from .draft import DraftModel
from .ends import Ends
from .generate import Generation, GenerationStats, Piece
from .opening import AUTO_WIRE, Opener
from .opening import Context as Context
from .request import DEFAULT_NEW_TOKENS, Options, Prompt, Request
from .searching import Found, Searching
from .session import HiddenSession

if TYPE_CHECKING:
    import torch

    from ...kernels.tokenizer import Tokenizer
    from .local import LocalEnds


@dataclass(frozen=True, slots=True)
class Run:
    """An open chain and its ends."""

    chain: ChainSession
    ends: Ends
    codec: Codec


class RemoteModel:
    """A model somebody serves. Made by `Node.model`; holds no resources but, once needed, its own ends."""

    def __init__(self, context: Context, model: Model, *, local_ends: bool, dtype: str) -> None:
        self._context = context
        self._model = model
        self._use_local = local_ends and model.checkpoint is not None
        self._dtype = dtype
        self._opener = Opener(context, model)
        self._ends: LocalEnds | None = None
        self._drafts: dict[str, DraftModel] = {}
        self._loading = asyncio.Lock()
        self._reached = False
        """There was a chain at least once."""
        self.last_stats: GenerationStats | None = None
        """Of the generation that ended last."""

    @property
    def name(self) -> str:
        """What people call it."""
        return self._model.name

    @property
    def digest(self) -> bytes:
        """What identifies it."""
        return self._model.digest

    @property
    def config(self) -> ModelConfig:
        """Its architecture."""
        return self._model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back; made on first use, in about a second. Raises UnsupportedModel if there is none."""
        if self._model.text is None:
            raise UnsupportedModel(f"{self.name} came without a tokenizer: feed token ids to session() or forward()")
        return self._model.text.get()

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's own chat template. Raises ConfigError if it has none."""
        from ...kernels.chat import ChatTemplate  # jinja2 is loaded here, not before

        source = self._model.chat_template
        if source is None:
            raise ConfigError(f"{self.name} has no chat template: it is a base model; use generate, or chat --raw")
        config, tokenizer = self.config, self.tokenizer
        bos = tokenizer.token(config.bos_token_id) if config.bos_token_id is not None else None
        eos = tokenizer.token(config.eos_token_ids[0]) if config.eos_token_ids else None
        text = ChatTemplate(source).render(messages, bos_token=bos or "", eos_token=eos or "")
        return tokenizer.encode(text, add_special=False)

    def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        top_logprobs: int = 0,
        wire: str = AUTO_WIRE,
        speculate: str = "auto",
        draft: str | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Generate text after a prompt, a piece per token; `n` sequences side by side, told apart by `piece.index`.

        Closing the iterator frees every server at once. Raises ConfigError for bad arguments, NoRoute when nobody
        serves the blocks, ServerFailed when a dead server could not be replaced (what came before stays yours).
        """
        return self._generate(
            [prompt],
            n=n,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            stop_token_ids=stop_token_ids,
            top_logprobs=top_logprobs,
            wire=wire,
            speculate=speculate,
            draft=draft,
        )

    def generate_many(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """Generate after several prompts in one session; sequence s of prompt p has `piece.index` p * n + s.

        Options and errors are those of `generate`.
        """
        return self._generate(prompts, **options)

    async def _generate(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        began = self._context.clock.now()
        request = await self.request(prompts, options)
        run = await self.open_run(request, request.max_length)
        try:
            async with contextlib.aclosing(self.pieces(run, request, began)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            await run.chain.close()

    async def beam_search(
        self,
        prompt: Prompt,
        *,
        beams: int = 4,
        count: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: SamplingParams | None = None,
        stop_token_ids: Sequence[int] = (),
        wire: str = AUTO_WIRE,
    ) -> list[Found]:
        """The `count` best sequences of a search with so many beams, as transformers' generate(num_beams=...) finds
        them. Of `sampling` only biases and penalties count. Raises what `generate` raises.
        """
        began = self._context.clock.now()
        options: Options = {"max_new_tokens": max_new_tokens, "stop_token_ids": stop_token_ids, "wire": wire}
        request = await self.request([prompt], {**options, "sampling": sampling})
        request.search(beams, count, length_penalty, early_stopping)
        run = await self.open_run(request, request.max_length, lanes=beams)
        search = BeamSearch(
            beams, max_new_tokens, request.wishes.ends, length_penalty=length_penalty, early_stopping=early_stopping
        )
        searching = Searching(run.chain, run.ends, self._context.clock, request.params, request.stats)
        try:
            await searching.run(request.prompts[0], search, began)
        finally:
            request.stats.note_chain(run.chain.repairs, run.codec.label, run.chain.route)
            await run.chain.close()
        return [Found(request.text_of(beam.tokens), beam.tokens, beam.score) for beam in search.best(count)]

    async def pieces(self, run: Run, request: Request, began: float) -> AsyncGenerator[Piece, None]:
        """Write what is asked for over an open chain."""
        draft = await self._draft_model(request.draft) if request.draft is not None else None
        stats = request.stats
        generation = Generation(
            run.chain, run.ends, self._context.clock, wishes=request.wishes, stats=stats, draft=draft
        )
        try:
            async with contextlib.aclosing(generation.pieces(request.writings, began)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            stats.note_chain(run.chain.repairs, run.codec.label, run.chain.route)

    async def request(self, prompts: Sequence[Prompt], options: Options) -> Request:
        """What is asked for, checked, with its prompts as token ids. Raises ConfigError, NoRoute."""
        if not self._reached:  # nobody waits for a tokenizer and an embedding to hear that nobody serves the blocks
            await self.route()
            self._reached = True
        tokenizer = await asyncio.to_thread(lambda: self.tokenizer)
        request = Request(self.name, self.config, tokenizer, prompts, **options)
        self.last_stats = request.stats
        return request

    async def open_run(self, request: Request, max_length: int, lanes: int = 0) -> Run:
        """A chain that can do what is asked for, and what stands at its ends. Raises NoRoute, Refused."""
        if self._use_local:
            local, output = await self._local_ends(), Output.HIDDEN
        else:
            local, output = None, Output.TOKEN if request.tail_can_choose else Output.LOGITS
        chain, codec = await self._opener.open(
            output,
            max_length,
            request.wire,
            lanes=lanes or len(request.writings),
            remote_ends=local is None,
            params=request.params,
        )
        return Run(chain, Ends(codec, output, self.config.vocab_size, local), codec)

    def conversation(self, *, max_length: int | None = None) -> Conversation:
        """Generations that follow each other, such as a chat's turns: each computes only what is new of its prompt.

        `async with model.conversation() as talk: async for piece in talk.generate(prompt)`. `max_length`: positions to
        ask the servers for at once; by default twice what is needed so far.
        """
        return Conversation(self, self._context, max_length)

    async def session(
        self, *, max_length: int = 2048, batch: int = 1, span: tuple[int, int] | None = None, wire: str = AUTO_WIRE
    ) -> HiddenSession:
        """A session on hidden states: `async with await model.session(...) as s: y = await s.step(x)`.

        `span`: only these blocks. Raises ConfigError, NoRoute.
        """
        start, end = span or (0, self.config.num_blocks)
        if not 0 <= start < end <= self.config.num_blocks:
            raise ConfigError(
                f"span {start}:{end} is not inside {self.name}, which has {self.config.num_blocks} blocks"
            )
        if not 1 <= batch <= MAX_LANES:
            raise ConfigError(f"batch is {batch}: use 1 to {MAX_LANES}")
        if not 1 <= max_length <= self.config.max_positions:
            raise ConfigError(f"max_length is {max_length}: {self.name} has {self.config.max_positions} positions")
        chain, codec = await self._opener.open(
            Output.HIDDEN, max_length, wire, lanes=batch, span=(start, end), remote_ends=False
        )
        return HiddenSession(chain, batch, self.config.hidden_size, codec, self._dtype)

    async def forward(self, ids: Sequence[int], *, wire: str = AUTO_WIRE) -> torch.Tensor:
        """float32 logits [tokens, vocab] of a whole sequence."""
        from .local import as_logits  # torch is loaded here, not before

        Request.check_prompt(self.name, self.config, ids, 1)
        local = await self._local_ends() if self._use_local else None
        output = Output.HIDDEN if local else Output.LOGITS
        chain, codec = await self._opener.open(output, len(ids), wire, remote_ends=local is None)
        ends = Ends(codec, output, self.config.vocab_size, local)
        try:
            payload = b"".join([part async for part in ends.forward(chain, ids)])
        finally:
            await chain.close()
        return await local.logits(payload, codec) if local else as_logits(payload, self.config.vocab_size)

    async def hidden_states(
        self, ids: Sequence[int], *, after: Sequence[int] | None = None, wire: str = AUTO_WIRE
    ) -> list[torch.Tensor]:
        """Hidden states [tokens, hidden] behind so many blocks each, by rising number: 0 is the embedding.

        Default: behind the last block, before the final norm. Only blocks up to the largest number are computed.
        Raises ConfigError, NoRoute.
        """
        Request.check_prompt(self.name, self.config, ids, 0)
        marks = sorted({self.config.num_blocks} if after is None else set(after))
        if not marks or not 0 <= marks[0] <= marks[-1] <= self.config.num_blocks:
            raise ConfigError(f"after is {after}: {self.name} has {self.config.num_blocks} blocks; use 0 to that many")
        made = [await self._embedded(ids, marks[0], wire)]
        for start, end in pairwise(marks):
            made.append(await self._through(made[-1], start, end, wire))
        return made

    async def _embedded(self, ids: Sequence[int], end: int, wire: str) -> torch.Tensor:
        """Hidden states behind the first `end` blocks."""
        from .local import as_hidden  # torch is loaded here, not before

        hidden = self.config.hidden_size
        if self._use_local:
            local = await self._local_ends()
            rows = as_hidden(await local.embed(ids, Codec.FP32), Codec.FP32, hidden, self._dtype)
            return rows if end == 0 else await self._through(rows, 0, end, wire)
        if end == 0:
            raise ConfigError("the embedding is asked for: it takes the model's files here, local_ends=True")
        chain, codec = await self._opener.open(
            Output.HIDDEN, len(ids), wire, span=(0, end), remote_ends=False, embed=True
        )
        ends = Ends(codec, Output.HIDDEN, self.config.vocab_size, None)
        try:
            payload = b"".join([part async for part in ends.forward(chain, ids)])
        finally:
            await chain.close()
        return as_hidden(payload, codec, hidden, self._dtype)

    async def _through(self, rows: torch.Tensor, start: int, end: int, wire: str) -> torch.Tensor:
        async with await self.session(max_length=rows.shape[0], span=(start, end), wire=wire) as session:
            return (await session.step(rows[None]))[0]

    async def view(self, *, fresh: bool = False) -> SwarmView:
        """Who serves which blocks now."""
        return await self._opener.view(fresh=fresh)

    async def route(self, *, tokens: int = 1) -> Plan:
        """The chain that would be used, with its cost terms. Raises NoRoute."""
        return await self._opener.route(tokens=tokens, remote_ends=not self._use_local)

    async def _local_ends(self) -> LocalEnds:
        from .local import LocalEnds  # torch is loaded here, not before

        async with self._loading:
            if self._ends is None:
                self._ends = await LocalEnds.load(self._model, self._dtype)
            return self._ends

    async def _draft_model(self, source: str) -> DraftModel:
        """A model of this machine that guesses for this one; loaded once. Raises ModelNotFound, ConfigError."""
        async with self._loading:
            if source not in self._drafts:
                model = await self._context.models.open(source)
                self._drafts[source] = await DraftModel.load(model, self._model, self._dtype)
            return self._drafts[source]

    async def close(self) -> None:
        """End its sessions (whoever waits in one gets SessionClosed) and the thread of its own ends."""
        await self._opener.close()
        ends, self._ends = self._ends, None
        if ends is not None:
            await asyncio.to_thread(ends.close)
        while self._drafts:
            await asyncio.to_thread(self._drafts.popitem()[1].close)
