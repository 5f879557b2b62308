"""What is asked of a generation, checked before anything is opened: prompts as token ids, parameters, what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypedDict

from ...kernels.beams import MAX_BEAMS, NEVER
from ...kernels.models.config import ModelConfig
from ...protocol.errors import ConfigError
from ...protocol.messages import MAX_LANES, MAX_POSITION
from ...protocol.sampling import MAX_PENALTY, SamplingParams
from ..generating import MAX_TOP_LOGPROBS, check_speculate
from .generate import GenerationStats, Wishes, Writing

if TYPE_CHECKING:
    from ...kernels.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""

DEFAULT_NEW_TOKENS: Final = 256


class Options(TypedDict, total=False):
    """Arguments of `RemoteModel.generate` by name, for what passes them on."""

    n: int
    max_new_tokens: int
    sampling: SamplingParams | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    top_logprobs: int
    wire: str
    speculate: str
    draft: str | None


class Request:
    """One generation's. Raises ConfigError naming the argument and what it may be."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        tokenizer: Tokenizer,
        prompts: Sequence[str | Sequence[int]],
        *,
        n: int = 1,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        top_logprobs: int = 0,
        wire: str = "auto",
        speculate: str = "auto",
        draft: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._check_lanes(len(prompts), n)
        check_speculate(speculate)
        check_ids(name, config, stop_token_ids, "stop token id")
        if not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
            raise ConfigError(f"top_logprobs is {top_logprobs}: use 0 to {MAX_TOP_LOGPROBS}")
        self.prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}: use at least 1")
        for ids in self.prompts:
            self.check_prompt(name, config, ids, max_new_tokens)
        self._searching = False
        self.wire = wire
        self.draft = draft if speculate == "auto" else None
        self.params = replace(sampling or SamplingParams(), choices=n)
        self.wishes = Wishes(
            max_new_tokens=max_new_tokens,
            ends=frozenset((*config.eos_token_ids, *stop_token_ids)),
            top=top_logprobs,
            ngrams=speculate != "off",
        )
        self.stats = GenerationStats(prompt_tokens=sum(map(len, self.prompts)))
        self.writings = [self._writing(lane, self.prompts[lane // n]) for lane in range(len(prompts) * n)]

    def _writing(self, lane: int, prompt: Sequence[int]) -> Writing:
        from ...kernels.tokenizer import TextStream  # the tokenizers library is loaded here, not before

        stream = TextStream(self._tokenizer, prompt, self._stop)
        leader = lane - lane % self.params.choices
        return Writing(lane, leader, prompt, self.params.for_lane(lane), stream)

    @property
    def max_length(self) -> int:
        """Positions a lane may reach."""
        return max(map(len, self.prompts)) + self.wishes.max_new_tokens

    @property
    def tail_can_choose(self) -> bool:
        """A tail knows enough: nothing asked for depends on the history or on more than it can be told or tell."""
        return not (self.params.penalized or self.wishes.top or self._searching) and self.params.fits_wire

    def search(self, beams: int, count: int, length_penalty: float, early_stopping: bool | str) -> None:
        """It is a beam search. Raises ConfigError for arguments out of range."""
        if not 1 <= beams <= MAX_BEAMS:
            raise ConfigError(f"{beams} beams: use 1 to {MAX_BEAMS}")
        if not 1 <= count <= beams:
            raise ConfigError(f"{count} sequences of {beams} beams: use 1 to {beams}")
        if not -MAX_PENALTY <= length_penalty <= MAX_PENALTY:
            raise ConfigError(f"length_penalty is {length_penalty}: use -{MAX_PENALTY:g} to {MAX_PENALTY:g}")
        if early_stopping not in (True, False, NEVER):
            raise ConfigError(f"early_stopping is {early_stopping!r}: use True, False or {NEVER!r}")
        self._searching = True

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of what was written after the first prompt, its end token left out."""
        stream = self._writing(0, self.prompts[0]).stream
        kept = tokens[:-1] if tokens and tokens[-1] in self.wishes.ends else tokens
        return "".join([*(stream.push(token).text for token in kept), stream.finish().text])

    @staticmethod
    def _check_lanes(prompts: int, n: int) -> None:
        if prompts < 1:
            raise ConfigError("there is no prompt: give at least one")
        if n < 1 or prompts * n > MAX_LANES:
            raise ConfigError(f"{prompts} prompts of {n} sequences each: use 1 to {MAX_LANES} sequences in all")

    @staticmethod
    def check_prompt(name: str, config: ModelConfig, ids: Sequence[int], max_new_tokens: int) -> None:
        """Raises ConfigError unless the prompt and what is to follow it fit the model."""
        if not ids:
            raise ConfigError("the prompt is empty: give at least one token")
        check_ids(name, config, ids, "token id")
        limit = min(config.max_positions, MAX_POSITION)
        if len(ids) + max_new_tokens > limit:
            raise ConfigError(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones are over {name}'s {limit} positions: "
                "shorten the prompt or lower max_new_tokens"
            )


def check_ids(name: str, config: ModelConfig, ids: Sequence[int], what: str) -> None:
    """Raises ConfigError naming the first id outside the vocabulary."""
    wrong = [token for token in ids if not 0 <= token < config.vocab_size]
    if wrong:
        raise ConfigError(f"{what} {wrong[0]} is not in {name}'s vocabulary of {config.vocab_size}")
