"""Parts of a model's config that are configs themselves: rotations, experts, and what only transformers understands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .bounds import (
    MAX_BLOCK_WEIGHTS,
    MAX_BLOCKS,
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_INTERMEDIATE,
    MAX_POSITIONS,
    check_choice,
    check_int,
    check_range,
)

ROPE_KINDS: Final = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ROUTERS: Final = ("softmax", "chosen")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched to longer contexts."""

    theta: float
    """Base of the geometric series of wavelengths."""
    kind: str = "default"
    """One of ROPE_KINDS."""
    factor: float = 1.0
    """How many times longer than the pretrained context."""
    original_positions: int = 0
    """Pretrained context (yarn, llama3, dynamic); 0 where the kind has no use for it."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original_positions / this are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original_positions / this are left alone."""
    beta_fast: float = 32.0
    """yarn: rotations above which a dimension is left alone."""
    beta_slow: float = 1.0
    """yarn: rotations below which a dimension is stretched in full."""
    truncate: bool = True
    """yarn: round the two borders to whole dimensions."""
    attention_factor: float = 1.0
    """cos and sin are multiplied by this."""
    factors: tuple[float, ...] = ()
    """longrope: what the wavelength of each pair is multiplied by."""

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise UnsupportedModel(f"rope scaling {self.kind!r} is not supported: {', '.join(ROPE_KINDS)} are")
        check_range("rope theta", self.theta, 1.0, 1e12)
        check_range("rope factor", self.factor, 1e-3, 1e6)
        check_range("rope attention_factor", self.attention_factor, 1e-3, 1e3)
        if self.kind in ("yarn", "llama3", "dynamic"):
            check_range("rope original_positions", self.original_positions, 1, MAX_POSITIONS)
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise CorruptCheckpoint("rope low_freq_factor must be positive and below high_freq_factor")
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise CorruptCheckpoint("rope beta_slow must be positive and not above beta_fast")
        if len(self.factors) > MAX_HEAD_DIM or (self.kind == "longrope") != bool(self.factors):
            raise CorruptCheckpoint(f"rope scaling {self.kind!r} with {len(self.factors)} factors")
        for factor in self.factors:
            check_range("rope factors", factor, 1e-6, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP."""

    count: int
    """Experts of a block."""
    active: int
    """Experts a token goes through."""
    intermediate_size: int
    """Width inside one expert."""
    router: str = "softmax"
    """softmax: weights are the chosen experts' shares of all; chosen: a softmax over the chosen ones' scores alone."""
    normalize: bool = True
    """softmax router: the chosen experts' weights are scaled up to a sum of 1."""
    shared_size: int = 0
    """Width inside the expert that every token goes through, behind a gate of its own; 0 where there is none."""
    bias: bool = False
    """Biases on the router and on the experts' matrices."""
    dense_blocks: tuple[int, ...] = ()
    """Blocks that have a plain gated MLP instead."""

    def __post_init__(self) -> None:
        check_int("experts", self.count, 1, MAX_EXPERTS)
        check_int("active experts", self.active, 1, self.count)
        check_int("expert intermediate_size", self.intermediate_size, 1, MAX_INTERMEDIATE)
        check_int("shared expert size", self.shared_size, 0, MAX_INTERMEDIATE)
        check_choice("router", self.router, ROUTERS)
        if len(self.dense_blocks) > MAX_BLOCKS:
            raise CorruptCheckpoint(f"{len(self.dense_blocks)} dense blocks: at most {MAX_BLOCKS} are allowed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignConfig:
    """A model that transformers' own layers run: its numbers beside this are for placement, cache and ends only."""

    settings: str
    """Canonical JSON of its config.json, without what is not about the architecture."""
    block_weights: int
    """Weights in the tensors of its largest block."""

    def __post_init__(self) -> None:
        check_int("block_weights", self.block_weights, 1, MAX_BLOCK_WEIGHTS)
