"""How to generate: the options of `generate` and `chat`, checked before anything heavy is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..protocol.errors import ConfigError
from ..protocol.sampling import SamplingParams
from ..protocol.tensors import Codec

SPECULATE: Final = ("auto", "ngram", "off")
"""auto: by the draft model, if one is given, and by looking up the text; ngram: by the text alone."""
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generating:
    """How to generate."""

    model: str | None
    max_new_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...]
    wire: str
    speculate: str
    draft: str | None
    stats: bool

    @classmethod
    def checked(cls, how: Mapping[str, Any]) -> Generating:
        """From a command's options. Raises ConfigError naming the option and what it may be."""
        seed = how["seed"] if how["seed"] is not None else secrets.randbelow(1 << 31)
        sampling = SamplingParams(seed=seed, **{name: how[name] for name in _SAMPLING})
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
            "wire": self.wire,
            "speculate": self.speculate,
            "draft": self.draft,
        }


def check_speculate(value: str, name: str = "speculate") -> None:
    """Raises ConfigError unless it is one of SPECULATE."""
    if value not in SPECULATE:
        raise ConfigError(f"{name} is {value[:40]!r}: use {', '.join(SPECULATE)}")
