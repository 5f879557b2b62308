"""What a model is, in numbers: one frozen config for every family, free of torch and of any file format.

Checkpoints describe themselves in many dialects (Hugging Face config.json of several generations, GGUF
metadata). They are read once (huggingface.py) into this one resolved form: every default filled in, every
derived factor computed, so the engine never asks "which generation is this?". The canonical JSON of it goes
into the model's manifest and is hashed with it; a config may therefore come from a stranger, and every number
is bounded before anything is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel

FAMILIES: Final = ("llama", "gemma3")
"""Blocks the engine can assemble."""
ROPE_KINDS: Final = ("default", "linear", "dynamic", "yarn", "llama3")
ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
"""Activation names in checkpoints -> ours."""

# Bounds on what a config may ask for: far above any model of these families, far below what hurts a host.
MAX_BLOCKS: Final = 1_024
MAX_HIDDEN: Final = 65_536
MAX_INTERMEDIATE: Final = 524_288
MAX_VOCAB: Final = 2_097_152
MAX_HEADS: Final = 1_024
MAX_HEAD_DIM: Final = 1_024
MAX_POSITIONS: Final = 33_554_432
MAX_EOS: Final = 64
MAX_JSON_BYTES: Final = 64 * 1024


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole model's architecture, from `from_hf` or `from_json`; both raise on anything we cannot run."""

    family: str
    """One of FAMILIES."""
    num_blocks: int
    """Decoder blocks."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the gated MLP."""
    vocab_size: int
    """Rows of the embedding and of the head."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; each serves num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of one head."""
    norm_eps: float
    """Added to the mean square in every RMS norm."""
    max_positions: int
    """Longest context the model was made for."""
    rope: RopeConfig
    """Rotary embedding of full-attention blocks, and of sliding ones where local_rope is None."""
    local_rope: RopeConfig | None = None
    """Rotary embedding of sliding-window blocks (Gemma 3)."""
    sliding_window: int | None = None
    """A sliding block's query at p sees keys p - sliding_window + 1 ... p."""
    sliding_blocks: tuple[bool, ...] = ()
    """Which blocks are sliding; empty when sliding_window is None."""
    activation: str = "silu"
    """silu, gelu_tanh or gelu."""
    query_scale: float
    """Attention scores are multiplied by this."""
    qk_norm: bool = False
    """RMS norm on every query and key head before the rotation."""
    qkv_bias: bool = False
    """Biases on q_proj, k_proj, v_proj."""
    output_bias: bool = False
    """Bias on o_proj."""
    mlp_bias: bool = False
    """Biases on gate_proj, up_proj, down_proj."""
    norm_offset: float = 0.0
    """Added to every stored norm weight (Gemma stores weight - 1)."""
    post_norms: bool = False
    """Norms after attention and MLP too, before the residual sum (Gemma)."""
    embed_scale: float = 1.0
    """Embedding rows are multiplied by this."""
    final_softcap: float | None = None
    """Logits become cap * tanh(logits / cap)."""
    tied_head: bool = False
    """The LM head is the embedding matrix."""
    bos_token_id: int | None = None
    """Token that starts a text, if the model has one."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UnsupportedModel(f"block family {self.family!r} is not supported: {', '.join(FAMILIES)} are")
        if self.activation not in ACTIVATIONS.values():
            raise UnsupportedModel(f"activation {self.activation!r} is not supported: silu, gelu_tanh, gelu are")
        check_int("num_blocks", self.num_blocks, 1, MAX_BLOCKS)
        check_int("hidden_size", self.hidden_size, 1, MAX_HIDDEN)
        check_int("intermediate_size", self.intermediate_size, 1, MAX_INTERMEDIATE)
        check_int("vocab_size", self.vocab_size, 1, MAX_VOCAB)
        check_int("num_heads", self.num_heads, 1, MAX_HEADS)
        check_int("num_kv_heads", self.num_kv_heads, 1, self.num_heads)
        check_int("head_dim", self.head_dim, 2, MAX_HEAD_DIM)
        check_int("max_positions", self.max_positions, 1, MAX_POSITIONS)
        check_range("norm_eps", self.norm_eps, 0.0, 1.0)
        check_range("query_scale", self.query_scale, 1e-6, 1e6)
        check_range("embed_scale", self.embed_scale, 1e-6, 1e6)
        if self.num_heads % self.num_kv_heads:
            raise CorruptCheckpoint(f"{self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads")
        if self.head_dim % 2:
            raise CorruptCheckpoint(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")
        self._check_windows()
        self._check_tokens()

    def _check_windows(self) -> None:
        if self.sliding_window is None:
            if self.sliding_blocks:
                raise CorruptCheckpoint("sliding blocks without a sliding_window")
            return
        check_int("sliding_window", self.sliding_window, 1, MAX_POSITIONS)
        if len(self.sliding_blocks) != self.num_blocks:
            raise CorruptCheckpoint(f"{len(self.sliding_blocks)} layer types for {self.num_blocks} blocks")

    def _check_tokens(self) -> None:
        if len(self.eos_token_ids) > MAX_EOS:
            raise CorruptCheckpoint(f"{len(self.eos_token_ids)} eos tokens: at most {MAX_EOS} are allowed")
        for token in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            check_int("token id", token, 0, MAX_VOCAB)

    def window(self, block: int) -> int | None:
        """The sliding window of a block, None where it attends to everything before it."""
        return self.sliding_window if self.sliding_blocks and self.sliding_blocks[block] else None

    def rope_of(self, block: int) -> RopeConfig:
        """The rotary embedding a block uses."""
        return self.local_rope if self.local_rope is not None and self.window(block) is not None else self.rope

    def block_parameters(self) -> int:
        """Weights in the matrices of one block: what a placement decision and a memory estimate count."""
        qkv = self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        output = self.num_heads * self.head_dim * self.hidden_size
        return qkv + output + 3 * self.hidden_size * self.intermediate_size

    def parameters(self) -> int:
        """Weights in all matrices of the model."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)
        return self.num_blocks * self.block_parameters() + tables

    def with_eos(self, token_ids: tuple[int, ...]) -> ModelConfig:
        """The same model with other end tokens: generation_config.json knows more than config.json."""
        return replace(self, eos_token_ids=token_ids)

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, so that equal configs have equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ModelConfig:
        """Parse `to_json` bytes from any source. Raises CorruptCheckpoint or UnsupportedModel."""
        if len(data) > MAX_JSON_BYTES:
            raise CorruptCheckpoint(f"model config of {len(data)} bytes: at most {MAX_JSON_BYTES} are allowed")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise CorruptCheckpoint(f"model config is not JSON: {exc}") from exc
        values = _typed(cls, as_mapping(values, "model config"))
        return cls(**values)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config.json (4.x or 5.x keys). Raises UnsupportedModel, CorruptCheckpoint."""
        from .huggingface import read_config  # it builds a ModelConfig, so it imports this module

        return read_config(mapping)


def _typed(cls: type[ModelConfig] | type[RopeConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check JSON values against the dataclass: known names only, and the JSON type of each field."""
    names = {item.name for item in fields(cls)}
    if unknown := set(values) - names:
        raise CorruptCheckpoint(f"model config has unknown fields: {', '.join(sorted(map(str, unknown)))[:200]}")
    if missing := {item.name for item in fields(cls) if item.name not in values}:
        raise CorruptCheckpoint(f"model config lacks {', '.join(sorted(missing))}")
    return {item.name: _field(item.name, str(item.type), values[item.name]) for item in fields(cls)}


def _field(name: str, kind: str, value: Any) -> Any:
    if value is None and kind.endswith("| None"):
        return None
    match kind.removesuffix(" | None"):
        case "str" if isinstance(value, str):
            return value
        case "bool" if isinstance(value, bool):
            return value
        case "int" if isinstance(value, int) and not isinstance(value, bool):
            return value
        case "float" if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        case "RopeConfig":
            return RopeConfig(**_typed(RopeConfig, as_mapping(value, name)))
        case "tuple[bool, ...]" if isinstance(value, list) and all(isinstance(item, bool) for item in value):
            return tuple(value)
        case "tuple[int, ...]" if isinstance(value, list) and all(type(item) is int for item in value):
            return tuple(value)
    raise CorruptCheckpoint(f"model config: {name} is {value!r:.60}, expected {kind}")


def as_mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CorruptCheckpoint(f"{name} is not a mapping")
    return value


def check_int(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CorruptCheckpoint(f"model config: {name} is {value!r}, expected {low} to {high}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise CorruptCheckpoint(f"model config: {name} is {value!r}, expected {low:g} to {high:g}")
