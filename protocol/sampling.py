"""How the next token is chosen: parameters as users give them and as they travel to whoever samples.

Torch-free, because the client names them and the tail of a chain, wherever that runs, applies them. The draw is
a pure function of (parameters, token history, position), see kernels/sampling.py; so the seed is settled here,
once, by the client, and a new tail after a failover continues the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import msgpack

from .errors import ConfigError, RemoteProtocolError

MAX_TEMPERATURE: Final = 100.0
MAX_TOP_K: Final = 2**31 - 1
MAX_PENALTY: Final = 100.0
MAX_LOOKBACK: Final = 2**20
"""Tokens of history the penalties may look at."""
MAX_SEED: Final = 2**63 - 1
MAX_BIASES: Final = 1024
MAX_BIAS: Final = 100.0
MAX_CHOICES: Final = 256
MAX_WIRE_BYTES: Final = 1024
"""Of what a tail can be given; with more the client samples, and logits travel."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that was chosen."""

    token: int
    logprob: float
    """Natural log probability under the raw logits: temperature 1, nothing filtered."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log probabilities, if they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one generation. Invalid values raise ConfigError naming the parameter and its range."""

    temperature: float = 0.0
    """0 is greedy: the likeliest token, the lowest id on a tie. Above, logits are divided by it."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their probabilities sum to this; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; 0 keeps all."""
    seed: int = 0
    """Same seed, same prompt, same parameters: same text."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen before are divided (positive) or multiplied (negative) by this; 1 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per time it was seen."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token seen."""
    penalty_last_n: int = 0
    """How many of the last tokens the penalties look at; 0 is all of them."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit), before anything else; a mapping may be given."""
    choices: int = 1
    """Sequences written after each prompt: those of one prompt stand on so many lanes in a row, see `for_lane`."""

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _whole("top_k", self.top_k, 0, MAX_TOP_K)
        _number("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _whole("seed", self.seed, 0, MAX_SEED)
        _number("repetition_penalty", self.repetition_penalty, 0.0, MAX_PENALTY, above_low=True)
        _number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _whole("penalty_last_n", self.penalty_last_n, 0, MAX_LOOKBACK)
        _whole("choices", self.choices, 1, MAX_CHOICES)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """No draw is made: the likeliest token is taken."""
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        """The choice depends on the history, not on the logits alone."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    @property
    def adjusts(self) -> bool:
        """Logits are changed before the choice."""
        return self.penalized or bool(self.logit_bias)

    def for_lane(self, lane: int) -> SamplingParams:
        """What the sequence on this lane is drawn with: the first of each prompt's has the seed itself."""
        number = lane % self.choices
        return self if number == 0 else replace(self, seed=(self.seed + number) % (MAX_SEED + 1))

    @property
    def fits_wire(self) -> bool:
        """Whether a tail can be given them."""
        return len(self.to_wire()) <= MAX_WIRE_BYTES

    def to_wire(self) -> bytes:
        """A msgpack map with integer keys; values equal to the default are left out."""
        values = {key: getattr(self, name) for key, name in _WIRE_KEYS.items()}
        changed = {key: value for key, value in values.items() if value != getattr(_DEFAULT, _WIRE_KEYS[key])}
        packed: bytes = msgpack.packb(changed)
        return packed

    @classmethod
    def from_wire(cls, data: bytes) -> SamplingParams:
        """Parse a peer's bytes; unknown keys are ignored. Raises RemoteProtocolError on junk and bad values."""
        if len(data) > MAX_WIRE_BYTES:
            raise RemoteProtocolError(f"sampling parameters of {len(data)} bytes: at most {MAX_WIRE_BYTES}")
        try:
            wire = msgpack.unpackb(data, strict_map_key=False, max_ext_len=0)
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as exc:
            raise RemoteProtocolError(f"sampling parameters are not valid msgpack: {exc}") from exc
        if not isinstance(wire, dict):
            raise RemoteProtocolError(f"sampling parameters are {type(wire).__name__}, expected a map")
        values = {_WIRE_KEYS[key]: value for key, value in wire.items() if key in _WIRE_KEYS}
        try:
            return cls(**values)
        except ConfigError as exc:
            raise RemoteProtocolError(f"peer's sampling parameters: {exc}") from exc


_WIRE_KEYS: Final = {
    1: "temperature",
    2: "top_k",
    3: "top_p",
    4: "min_p",
    5: "seed",
    6: "repetition_penalty",
    7: "frequency_penalty",
    8: "presence_penalty",
    9: "penalty_last_n",
    10: "logit_bias",
    11: "choices",
}
"""Never renumber."""


def _number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    # the comparison refuses NaN too; math.isfinite would overflow on a JSON integer of 400 digits
    valid = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not valid or (above_low and value == low):
        bounds = f"above {low:g}, at most {high:g}" if above_low else f"{low:g} to {high:g}"
        raise ConfigError(f"{name} is {_shown(value)}: use a number {bounds}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} is {_shown(value)}: use a whole number {low} to {high}")


def _biases(given: object) -> tuple[tuple[int, float], ...]:
    """Pairs by rising id. Raises ConfigError for what is no token id, no bias, or named twice."""
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or len(pairs) > MAX_BIASES:
        raise ConfigError(f"logit_bias is {_shown(given)}: use up to {MAX_BIASES} pairs of token id and bias")
    made: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ConfigError(f"logit_bias has {_shown(pair)}: use pairs of token id and bias")
        token, bias = pair
        _whole("a token id of logit_bias", token, 0, MAX_TOP_K)
        _number(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)
        if token in made:
            raise ConfigError(f"logit_bias names token {token} twice: add the two up")
        made[token] = float(bias)
    return tuple(sorted(made.items()))


def _shown(value: object) -> str:
    """A value for a message; Python refuses to print integers of over 4,300 digits."""
    return f"{value!r:.60}" if not isinstance(value, int) or value.bit_length() < 256 else "a huge number"


_DEFAULT: Final = SamplingParams()
