"""RemoteModel: a model served by the swarm, as a user of the embedding API holds it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from ...kernels.models.config import ModelConfig
from ...protocol.chain import ChainSpec
from ...protocol.errors import ConfigError, NoRoute, Refused, SwarmError, UnsupportedModel
from ...protocol.ids import PeerId
from ...protocol.messages import MAX_LANES, MAX_POSITION, MAX_ROWS, Output
from ...protocol.sampling import SamplingParams
from ...protocol.tensors import Codec, codec_at, payload_size
from ...routing.planner import Plan, PlanRequest
from ...routing.swarm import SwarmView
from ..clock import Clock
from ..generating import MAX_TOP_LOGPROBS, check_speculate
from ..host import Host
from ..models import Model, Models
from ..tasks import Supervisor
from .chain import ChainSession
from .draft import DraftModel
from .ends import FORWARD_ROWS, Ends
from .generate import Generation, GenerationStats, Piece, Wishes, Writing
from .router import Router
from .session import HiddenSession
from .target import Target, new_session_id

if TYPE_CHECKING:
    import torch

    from ...kernels.tokenizer import Tokenizer
    from .local import LocalEnds

AUTO_WIRE: Final = "auto"
HOP_BYTES: Final = 14_480
"""One initial congestion window: a token's frame beyond it costs a second round trip after idle."""
FRAME_OVERHEAD: Final = 100
OPEN_ATTEMPTS: Final = 64
"""Chains to try before giving up; each failure teaches which server to go round."""
PEER_ATTEMPTS: Final = 2
"""The second try dials anew: the connection may have been what was dead."""
DEFAULT_NEW_TOKENS: Final = 256


@dataclass(frozen=True, slots=True)
class Context:
    """What a model needs of its node."""

    host: Host
    router: Router
    clock: Clock
    tasks: Supervisor
    repair_timeout_s: float
    models: Models


class RemoteModel:
    """A model somebody serves. Made by `Node.model`; holds no resources but, once needed, its own ends."""

    def __init__(self, context: Context, model: Model, *, local_ends: bool, dtype: str) -> None:
        self._context = context
        self._model = model
        self._use_local = local_ends and model.checkpoint is not None
        self._dtype = dtype
        self._ends: LocalEnds | None = None
        self._drafts: dict[str, DraftModel] = {}
        self._loading = asyncio.Lock()
        self._chains: WeakSet[ChainSession] = WeakSet()
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

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        top_logprobs: int = 0,
        wire: str = AUTO_WIRE,
        speculate: str = "auto",
        draft: str | None = None,
    ) -> AsyncIterator[Piece]:
        """Generate text after a prompt, a piece per token.

        Closing the iterator frees every server at once. Raises ConfigError for bad arguments, NoRoute when nobody
        serves the blocks, ServerFailed when a dead server could not be replaced (what came before stays yours).
        """
        from ...kernels.tokenizer import TextStream  # the tokenizers library is loaded here, not before

        began = self._context.clock.now()
        tokenizer = await asyncio.to_thread(lambda: self.tokenizer)
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_prompt(ids, max_new_tokens)
        check_speculate(speculate)
        self._check_ids(stop_token_ids, "stop token id")
        if not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
            raise ConfigError(f"top_logprobs is {top_logprobs}: use 0 to {MAX_TOP_LOGPROBS}")
        params = sampling or SamplingParams()
        writing = Writing(0, 0, ids, params, TextStream(tokenizer, ids, stop))
        stats = GenerationStats(prompt_tokens=len(ids))
        self.last_stats = stats
        guesser = await self._draft_model(draft) if draft is not None and speculate == "auto" else None
        local = await self._local_ends() if self._use_local else None
        output = _output(local is not None, params, top_logprobs)
        chain, codec = await self._open(
            output, len(ids) + max_new_tokens, wire, remote_ends=local is None, params=params
        )
        wishes = Wishes(
            max_new_tokens=max_new_tokens,
            ends=frozenset((*self.config.eos_token_ids, *stop_token_ids)),
            stops=tuple(stop),
            top=top_logprobs,
            ngrams=speculate != "off",
        )
        ends = Ends(codec, output, self.config.vocab_size, local)
        generation = Generation(chain, ends, self._context.clock, wishes=wishes, stats=stats, draft=guesser)
        try:
            async with contextlib.aclosing(generation.pieces([writing], began)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._fill(stats, chain, codec)
            await chain.close()

    def _check_prompt(self, ids: Sequence[int], max_new_tokens: int) -> None:
        if not ids:
            raise ConfigError("the prompt is empty: give at least one token")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}: use at least 1")
        self._check_ids(ids, "token id")
        limit = min(self.config.max_positions, MAX_POSITION)
        if len(ids) + max_new_tokens > limit:
            raise ConfigError(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones are over {self.name}'s {limit} positions: "
                "shorten the prompt or lower max_new_tokens"
            )

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        wrong = [token for token in ids if not 0 <= token < self.config.vocab_size]
        if wrong:
            raise ConfigError(f"{what} {wrong[0]} is not in {self.name}'s vocabulary of {self.config.vocab_size}")

    @staticmethod
    def _fill(stats: GenerationStats, chain: ChainSession, codec: Codec) -> None:
        stats.repairs = chain.repairs
        stats.wire = codec.label
        stats.route = chain.route

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
        chain, codec = await self._open(
            Output.HIDDEN, max_length, wire, lanes=batch, span=(start, end), remote_ends=False
        )
        return HiddenSession(chain, batch, self.config.hidden_size, codec, self._dtype)

    async def forward(self, ids: Sequence[int], *, wire: str = AUTO_WIRE) -> torch.Tensor:
        """float32 logits [tokens, vocab] of a whole sequence."""
        from .local import as_logits  # torch is loaded here, not before

        self._check_prompt(ids, 1)
        local = await self._local_ends() if self._use_local else None
        output = Output.HIDDEN if local else Output.LOGITS
        chain, codec = await self._open(output, len(ids), wire, remote_ends=local is None)
        ends = Ends(codec, output, self.config.vocab_size, local)
        try:
            payload = b"".join([part async for part in ends.forward(chain, ids)])
        finally:
            await chain.close()
        return await local.logits(payload, codec) if local else as_logits(payload, self.config.vocab_size)

    async def view(self, *, fresh: bool = False) -> SwarmView:
        """Who serves which blocks now."""
        return await self._context.router.view(self.name, self.digest, self.config.num_blocks, fresh=fresh)

    async def route(self, *, tokens: int = 1) -> Plan:
        """The chain that would be used, with its cost terms. Raises NoRoute."""
        whole = (0, self.config.num_blocks)
        request = self._request(tokens=tokens, remote_ends=not self._use_local, kv_tokens=0, span=whole)
        return await self._context.router.plan(await self.view(fresh=True), request)

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

    def _codec(self, wire: str, peers: Sequence[PeerId]) -> Codec:
        """The session's codec. `auto`: bf16, or int8s where a token's frame would not fit or a link is slow."""
        if wire != AUTO_WIRE:
            return Codec.from_label(wire)
        frame = payload_size(Codec.BF16, 1, self.config.hidden_size) + FRAME_OVERHEAD
        return Codec.INT8S if frame > HOP_BYTES or self._context.router.any_slow(peers) else Codec.BF16

    def _request(self, *, tokens: int, remote_ends: bool, kv_tokens: int, span: tuple[int, int]) -> PlanRequest:
        return PlanRequest(
            start=span[0],
            end=span[1],
            tokens=tokens,
            bytes_per_token=payload_size(Codec.BF16, 1, self.config.hidden_size),
            need_embed=remote_ends,
            need_head=remote_ends,
            kv_tokens=kv_tokens,
        )

    async def _open(
        self,
        output: Output,
        max_length: int,
        wire: str,
        *,
        lanes: int = 1,
        span: tuple[int, int] | None = None,
        remote_ends: bool,
        params: SamplingParams | None = None,
    ) -> tuple[ChainSession, Codec]:
        """Plan a chain and open it, around servers that refuse or do not answer.

        Raises NoRoute when no chain is left, Refused when all were declined.
        """
        whole = span or (0, self.config.num_blocks)
        request = self._request(tokens=lanes, remote_ends=remote_ends, kv_tokens=lanes * max_length, span=whole)
        problems: list[SwarmError] = []
        failures: Counter[PeerId] = Counter()
        for _ in range(OPEN_ATTEMPTS):
            plan = await self._plan(request, problems, failures)
            if any(failures[peer] >= PEER_ATTEMPTS for peer in plan.peers):
                break  # nobody else is left
            codec = self._codec(wire, plan.peers)
            spec = ChainSpec(
                session=new_session_id(),
                digest=self.digest,
                start=whole[0],
                end=whole[1],
                codec=codec,
                cuts=_cuts(plan, remote_ends),
                lanes=lanes,
                max_length=max_length,
                embed=remote_ends,
                output=output,
                sampling=params.to_wire() if params and output == Output.TOKEN else b"",
            )
            target = Target(
                spec=spec,
                request=request,
                view=self._view,
                row_bytes=self._row_bytes(spec),
                max_payload=self._max_payload(output),
                vocab=self.config.vocab_size,
            )
            context = self._context
            chain = ChainSession(context.host, context.router, context.clock, context.tasks, context.repair_timeout_s)
            problems = await chain.open(target, plan)
            if not problems:
                self._chains.add(chain)
                return chain, codec
            failures.update(chain.failed)
            request = replace(request, deny=request.deny | chain.refusing)
        raise problems[0]

    async def _plan(self, request: PlanRequest, problems: Sequence[SwarmError], failures: Counter[PeerId]) -> Plan:
        """A chain, given what went wrong before: round servers that failed, through them if there is no other way."""
        router, view = self._context.router, await self.view(fresh=bool(problems))
        try:
            try:
                return await router.plan(view, replace(request, deny=request.deny | failures.keys()))
            except NoRoute:
                if not failures:
                    raise
                return await router.plan(view, request)
        except NoRoute as exc:  # that servers declined says more than that none is left
            declined = next((problem for problem in problems if isinstance(problem, Refused)), exc)
            raise declined from exc

    async def _view(self, fresh: bool) -> SwarmView:
        return await self.view(fresh=fresh)

    def _row_bytes(self, spec: ChainSpec) -> int:
        """Payload of a result per row wanted."""
        match spec.output:
            case Output.TOKEN:
                return 0
            case Output.LOGITS:
                return 4 * self.config.vocab_size
            case _:
                return payload_size(codec_at(spec.end, spec.codec, spec.cuts), 1, self.config.hidden_size)

    def _max_payload(self, output: Output) -> int:
        rows = payload_size(Codec.FP32, MAX_ROWS, self.config.hidden_size)
        return max(rows, 4 * self.config.vocab_size * FORWARD_ROWS) if output == Output.LOGITS else rows

    async def close(self) -> None:
        """End its sessions (whoever waits in one gets SessionClosed) and the thread of its own ends."""
        for chain in list(self._chains):
            await chain.close()
        ends, self._ends = self._ends, None
        if ends is not None:
            await asyncio.to_thread(ends.close)
        while self._drafts:
            await asyncio.to_thread(self._drafts.popitem()[1].close)


def _output(local_ends: bool, params: SamplingParams, top_logprobs: int) -> Output:
    """What the tail is to return: a token where it can choose one, with all that this takes."""
    if local_ends:
        return Output.HIDDEN
    return Output.LOGITS if params.penalized or top_logprobs or not params.fits_wire else Output.TOKEN


def _cuts(plan: Plan, remote_ends: bool) -> tuple[int, ...]:
    """Borders where hidden states are encoded: those of the first chain, for the session's whole life.

    Where a server embeds or runs the head, no hidden states cross the model's own ends.
    """
    borders = [hop.start for hop in plan.hops] + [plan.hops[-1].end]
    return tuple(borders[1:-1] if remote_ends else borders)
