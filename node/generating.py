"""How to generate: the options of `generate` and `chat`, checked before anything heavy is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..protocol.errors import ConfigError
from ..protocol.sampling import SamplingParams
from ..protocol.tensors import Codec

SPECULATE: Final = ("auto", "ngram", "off")
"""auto: by the draft model, if one is given, and by looking up the text; ngram: by the text alone."""
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p")
_PENALTIES: Final = ("repetition_penalty", "frequency_penalty", "presence_penalty", "penalty_last_n")
MAX_TOP_LOGPROBS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Generating:
    """How to generate."""

    model: str | None
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_token: tuple[int, ...]
    logprobs: int
    wire: str
    speculate: str
    draft: str | None
    stats: bool

    @classmethod
    def checked(cls, how: Mapping[str, Any]) -> Generating:
        """From a command's options. Raises ConfigError naming the option and what it may be."""
        seed = how["seed"] if how["seed"] is not None else secrets.randbelow(1 << 31)
        names = (*_SAMPLING, *_PENALTIES)
        biases = _biases(how["logit_bias"])
        sampling = SamplingParams(seed=seed, logit_bias=biases, **{name: how[name] for name in names})
        if not 0 <= how["logprobs"] <= MAX_TOP_LOGPROBS:
            raise ConfigError(f"--logprobs is {how['logprobs']}: use 0 to {MAX_TOP_LOGPROBS}")
        if how["max_new_tokens"] < 1:
            raise ConfigError(f"--max-new-tokens is {how['max_new_tokens']}: use at least 1")
        if how["wire"] != "auto":
            Codec.from_label(how["wire"])
        check_speculate(how["speculate"], "--speculate")
        if how["draft"] is not None and how["speculate"] != "auto":
            raise ConfigError(f"--draft with --speculate {how['speculate']}: a draft model guesses under auto only")
        return cls(
            model=how["model"],
            max_new_tokens=how["max_new_tokens"],
            sampling=sampling,
            stop=how["stop"],
            stop_token=how["stop_token"],
            logprobs=how["logprobs"],
            wire=how["wire"],
            speculate=how["speculate"],
            draft=how["draft"],
            stats=how["stats"],
        )

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of RemoteModel.generate."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "sampling": self.sampling,
            "stop": self.stop,
            "stop_token_ids": self.stop_token,
            "top_logprobs": self.logprobs,
            "wire": self.wire,
            "speculate": self.speculate,
            "draft": self.draft,
        }


def _biases(texts: Sequence[str]) -> tuple[tuple[int, float], ...]:
    """`ID=BIAS` each."""
    pairs = []
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            raise ConfigError(f"--logit-bias {text[:40]!r}: use ID=BIAS, such as 1024=-100") from None
    return tuple(pairs)


def check_speculate(value: str, name: str = "speculate") -> None:
    """Raises ConfigError unless it is one of SPECULATE."""
    if value not in SPECULATE:
        raise ConfigError(f"{name} is {value[:40]!r}: use {', '.join(SPECULATE)}")
