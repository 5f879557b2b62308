"""A swarm's model for programs without a loop of their own, used as one of transformers is: tensors in, tensors out.

A node runs on a thread with its own event loop; every call here waits for it. Names, defaults and shapes are those of
transformers' `generate` where it has them, so that what is written for one runs with the other. Must not be called
from a coroutine: use Node there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

from ...protocol.errors import ConfigError
from ...protocol.sampling import SamplingParams
from ..config import NodeConfig
from ..node import Node
from .generate import Piece
from .request import Options

if TYPE_CHECKING:
    import torch

    from ...kernels.models.config import ModelConfig
    from ...kernels.tokenizer import Tokenizer
    from .model import RemoteModel
    from .session import HiddenSession

T = TypeVar("T")
TOP_K: Final = 50
DEFAULT_LENGTH: Final = 20
"""What transformers does where nothing is said: draws from 50 tokens, and ends at 20, the prompt counted."""


class Streamer(Protocol):
    """What transformers' streamers are: the prompt and then each token is put, and the end is told."""

    def put(self, value: torch.Tensor) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CausalOutput:
    """What a call of the model gives."""

    logits: torch.Tensor
    """float32 [batch, tokens, vocab]."""
    hidden_states: tuple[torch.Tensor, ...] | None = None
    """If asked for: [batch, tokens, hidden] of the embedding and behind each block, before the final norm."""


class CausalLM:
    """Make one with `from_pretrained`; `close` it, or use `with`. Safe to call from any thread but a loop's."""

    def __init__(self, name: str | None, config: NodeConfig, *, local_ends: bool | None, dtype: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="swarmnode", daemon=True)
        self._thread.start()
        self._stack = contextlib.AsyncExitStack()
        try:
            self.model: RemoteModel = self._wait(self._enter(name, config, local_ends, dtype))
            """The same for coroutines, on this one's loop."""
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        *,
        peers: Sequence[str] = (),
        local_ends: bool | None = None,
        dtype: str = "bf16",
        **settings: Any,
    ) -> Self:
        """Join a swarm through `peers` and find a model in it; `settings` are NodeConfig's.

        Raises ConfigError, PeerUnreachable, ModelNotFound.
        """
        values = {"listen": (), "dht_server": False, **settings}
        return cls(name, NodeConfig(peers=tuple(peers), **values), local_ends=local_ends, dtype=dtype)

    async def _enter(self, name: str | None, config: NodeConfig, local_ends: bool | None, dtype: str) -> RemoteModel:
        node = await self._stack.enter_async_context(Node(config))
        return await node.model(name, local_ends=local_ends, dtype=dtype)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it on our loop. An interrupt here ends it there."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            work.close()
            raise ConfigError("CausalLM was called from a coroutine, which it would block: use Node there")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back. transformers' own tokenizer of the model gives the same ids."""
        return self.model.tokenizer

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        stop_strings: str | Sequence[str] = (),
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
        wire: str = "auto",
    ) -> torch.Tensor:
        """Token ids [batch * num_return_sequences, tokens]: each prompt, what was written after it, padding.

        `seed` (default: drawn from torch's generator) decides the draws. End tokens are the model's own besides
        `eos_token_id`. Raises ConfigError for what cannot be done, and what RemoteModel.generate raises.
        """
        prompts = _prompts(input_ids, attention_mask)
        if streamer is not None and (len(prompts) > 1 or num_beams > 1 or num_return_sequences > 1):
            raise ConfigError("a streamer takes one sequence: one prompt, num_beams=1, num_return_sequences=1")
        if num_beams > 1 and (do_sample or stop_strings):
            raise ConfigError("beams are not drawn and end at tokens only: leave do_sample and stop_strings out")
        sampling = SamplingParams(
            temperature=temperature if do_sample else 0.0,
            top_k=TOP_K if top_k is None else top_k,
            top_p=top_p,
            min_p=min_p or 0.0,
            repetition_penalty=repetition_penalty,
            seed=_seed(seed, do_sample),
        )
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        options: Options = {
            "max_new_tokens": max_new_tokens or (max_length or DEFAULT_LENGTH) - input_ids.shape[1],
            "sampling": sampling,
            "stop_token_ids": ends,
            "wire": wire,
        }
        if num_beams > 1:
            how: dict[str, Any] = {"beams": num_beams, "count": num_return_sequences}
            how |= {"length_penalty": length_penalty, "early_stopping": early_stopping, **options}
            written = self._wait(self._search(prompts, how))
        else:
            options |= {
                "n": num_return_sequences,
                "stop": [stop_strings] if isinstance(stop_strings, str) else stop_strings,
            }
            if streamer is not None:
                streamer.put(input_ids.cpu())
            written = self._collect(prompts, options, streamer)
        if pad_token_id is None:
            pad_token_id = next(iter([*self.config.eos_token_ids, *ends]), 0)
        return _joined(input_ids, written, num_return_sequences, pad_token_id)

    def _collect(
        self, prompts: Sequence[Sequence[int]], options: Options, streamer: Streamer | None
    ) -> list[list[int]]:
        """Each sequence's new tokens; the streamer is told of them as they come."""
        import torch

        written: list[list[int]] = [[] for _ in range(len(prompts) * options["n"])]
        pieces = self.model.generate_many(prompts, **options)
        try:
            while (piece := self._wait(_next(pieces))) is not None:
                written[piece.index].append(piece.token_id)
                if streamer is not None:
                    streamer.put(torch.tensor([piece.token_id]))
        finally:
            self._wait(_close(pieces))
        if streamer is not None:
            streamer.end()
        return written

    async def _search(self, prompts: Sequence[Sequence[int]], options: dict[str, Any]) -> list[list[int]]:
        found = [await self.model.beam_search(prompt, **options) for prompt in prompts]
        return [list(one.token_ids) for beams in found for one in beams]

    def __call__(
        self, input_ids: torch.Tensor, *, output_hidden_states: bool = False, wire: str = "auto"
    ) -> CausalOutput:
        """Logits of whole sequences, and hidden states if asked for (which takes the model's files here)."""
        import torch

        rows = _prompts(input_ids, None)
        logits = torch.stack([self._wait(self.model.forward(row, wire=wire)) for row in rows])
        if not output_hidden_states:
            return CausalOutput(logits)
        states = self.hidden_states(input_ids, after=range(self.config.num_blocks + 1), wire=wire)
        return CausalOutput(logits, tuple(states))

    def hidden_states(
        self, input_ids: torch.Tensor, *, after: Sequence[int] | None = None, wire: str = "auto"
    ) -> list[torch.Tensor]:
        """[batch, tokens, hidden] behind so many blocks each; see RemoteModel.hidden_states."""
        import torch

        prompts = _prompts(input_ids, None)
        rows = [self._wait(self.model.hidden_states(prompt, after=after, wire=wire)) for prompt in prompts]
        return [torch.stack(states) for states in zip(*rows, strict=True)]

    def session(
        self, *, max_length: int = 2048, batch: int = 1, span: tuple[int, int] | None = None, wire: str = "auto"
    ) -> CausalSession:
        """Hidden states through any span of blocks, step by step, with caches: `with lm.session(...) as session`."""
        session = self._wait(self.model.session(max_length=max_length, batch=batch, span=span, wire=wire))
        return CausalSession(self, session)

    def close(self) -> None:
        """Leave the swarm and end the thread. Safe to call twice."""
        if self._loop.is_closed():
            return
        try:
            self._wait(self._stack.aclose())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CausalSession:
    """A HiddenSession for synchronous programs."""

    def __init__(self, owner: CausalLM, session: HiddenSession) -> None:
        self._owner = owner
        self._session = session

    @property
    def position(self) -> int:
        """Tokens per row of the batch so far."""
        return self._session.position

    def step(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run [batch, tokens, hidden] through the blocks."""
        return self._owner._wait(self._session.step(hidden))

    def truncate(self, position: int) -> None:
        """Forget every row's tokens from `position` on."""
        self._owner._wait(self._session.truncate(position))

    def close(self) -> None:
        """Free the servers' caches."""
        self._owner._wait(self._session.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _next(pieces: AsyncGenerator[Piece, None]) -> Piece | None:
    return await anext(pieces, None)


async def _close(pieces: AsyncGenerator[Piece, None]) -> None:
    await pieces.aclose()


def _seed(seed: int | None, do_sample: bool) -> int:
    """Of torch's generator if none is given, so that torch.manual_seed decides the text."""
    import torch

    if seed is None and do_sample:
        return int(torch.randint(2**31, (1,)))
    return seed or 0


def _prompts(input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[list[int]]:
    """Each row's tokens, those that the mask leaves out left out: padding may stand on either side."""
    if input_ids.dim() != 2:
        raise ConfigError(f"input_ids have shape {tuple(input_ids.shape)}: use [batch, tokens]")
    if mask is None:
        return [[int(token) for token in row] for row in input_ids.tolist()]
    if mask.shape != input_ids.shape:
        raise ConfigError(f"the attention mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}")
    return [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]


def _joined(input_ids: torch.Tensor, written: Sequence[Sequence[int]], each: int, pad: int) -> torch.Tensor:
    import torch

    longest = max(map(len, written))
    rows = [[*row, *[pad] * (longest - len(row))] for row in written]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids.repeat_interleave(each, 0), new], 1)
