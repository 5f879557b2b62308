"""What a model is, in numbers: one frozen config for every family, free of torch and of any file format.

Checkpoints describe themselves in many dialects (Hugging Face config.json of several generations, GGUF
metadata). They are read once (huggingface.py) into this one resolved form: every default filled in, every
derived factor computed, so the engine never asks "which generation is this?". The canonical JSON of it goes
into the model's manifest and is hashed with it; a config may therefore come from a stranger, and every number
is bounded before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .bounds import (
    MAX_BLOCKS,
    MAX_EOS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_INTERMEDIATE,
    MAX_JSON_BYTES,
    MAX_POSITIONS,
    MAX_VOCAB,
    as_mapping,
    check_choice,
    check_int,
    check_range,
)
from .canonical import plain, typed
from .components import ExpertsConfig, ForeignConfig, RopeConfig

__all__ = ["ACTIVATIONS", "FAMILIES", "ExpertsConfig", "ForeignConfig", "ModelConfig", "RopeConfig"]

FAMILIES: Final = (
    "llama",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "falcon",
    "bloom",
    "gpt_neox",
    "gpt_oss",
    "stablelm",
    "starcoder2",
    "hf",
)
"""Names of families, for people and file formats; what a block computes is in the other fields. hf: see `foreign`."""
NORMS: Final = ("rms", "layer")
RESIDUALS: Final = ("sequential", "parallel", "shared")
ALIBIS: Final = ("none", "bloom", "falcon")
ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}
"""Activation names in checkpoints -> ours."""


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
    """Added to the mean square (variance) in every norm."""
    norm: str = "rms"
    """rms, or layer: centred, with a bias."""
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
    rotary_dim: int | None = None
    """How many of a head's leading values are rotated; None: all, 0: none."""
    unrotated_blocks: tuple[int, ...] = ()
    """Blocks that know no positions (SmolLM 3)."""
    alibi: str = "none"
    """Scores fall with distance: not at all, as in BLOOM, or as in Falcon (scaled with them, slopes in bf16)."""
    score_softcap: float | None = None
    """Attention scores become cap * tanh(scores / cap)."""
    sinks: bool = False
    """Every query also attends to a sink that has a score per head and no value (GPT-OSS)."""
    residual: str = "sequential"
    """sequential: the MLP follows attention; parallel: both read the block's input, each through a norm of its own;
    shared: both through the same norm."""
    residual_scale: float = 1.0
    """What attention and MLP give is multiplied by this before it is added (Granite)."""
    gated: bool = True
    """MLP: down(activation(gate) * up); otherwise down(activation(up))."""
    experts: ExpertsConfig | None = None
    """A mixture of experts instead of the MLP."""
    activation: str = "silu"
    """silu, gelu_tanh or gelu."""
    swiglu_limit: float | None = None
    """Clamp of gate and up, and then gate * sigmoid(swiglu_alpha * gate) * (up + 1) (GPT-OSS)."""
    swiglu_alpha: float = 1.702
    """See swiglu_limit."""
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
    embed_norm: bool = False
    """A norm follows the embedding (BLOOM)."""
    final_softcap: float | None = None
    """Logits become cap * tanh(logits / cap)."""
    logit_scale: float = 1.0
    """Logits are multiplied by this (Granite)."""
    tied_head: bool = False
    """The LM head is the embedding matrix."""
    foreign: ForeignConfig | None = None
    """Blocks, embedding and head are transformers' own (kernels/fallback.py)."""
    bos_token_id: int | None = None
    """Token that starts a text, if the model has one."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text."""

    def __post_init__(self) -> None:
        check_choice("block family", self.family, FAMILIES)
        check_choice("activation", self.activation, tuple(dict.fromkeys(ACTIVATIONS.values())))
        check_choice("norm", self.norm, NORMS)
        check_choice("residual form", self.residual, RESIDUALS)
        check_choice("ALiBi", self.alibi, ALIBIS)
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
        for name in ("embed_scale", "residual_scale", "logit_scale"):
            check_range(name, getattr(self, name), 1e-6, 1e6)
        for name in ("score_softcap", "final_softcap", "swiglu_limit", "swiglu_alpha"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1e-3, 1e6)
        if self.num_heads % self.num_kv_heads:
            raise CorruptCheckpoint(f"{self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads")
        if self.head_dim % 2:
            raise CorruptCheckpoint(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")
        self._check_forms()
        self._check_windows()
        self._check_tokens()

    def _check_forms(self) -> None:
        check_int("rotary_dim", self.rotated, 0, self.head_dim)
        if self.rotated % 2 or (self.rotated == 2 and self.rope.kind == "dynamic"):
            raise CorruptCheckpoint(f"rotary embedding of {self.rotated} values: it needs pairs")
        if self.rope.factors and len(self.rope.factors) * 2 != self.rotated:
            raise CorruptCheckpoint(f"{len(self.rope.factors)} rope factors for {self.rotated} rotated values")
        if len(self.unrotated_blocks) > MAX_BLOCKS:
            raise CorruptCheckpoint(f"{len(self.unrotated_blocks)} unrotated blocks: at most {MAX_BLOCKS} are allowed")
        if self.residual != "sequential" and (self.post_norms or self.residual_scale != 1.0):
            raise UnsupportedModel("norms or scales after attention in a parallel block are not supported")
        if self.norm == "layer" and (self.norm_offset or self.qk_norm):
            raise UnsupportedModel("layer norms with an offset or on heads are not supported")
        if (self.foreign is not None) != (self.family == "hf"):
            raise CorruptCheckpoint("a model of family 'hf' has the settings of transformers, and no other has")
        if self.experts is not None and not self.gated:
            raise UnsupportedModel("experts without a gate are not supported")

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

    @property
    def rotated(self) -> int:
        """How many of a head's values are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def experts_of(self, block: int) -> ExpertsConfig | None:
        """The experts of a block, None where it has a plain MLP."""
        return None if self.experts is None or block in self.experts.dense_blocks else self.experts

    def rope_of(self, block: int) -> RopeConfig:
        """The rotary embedding a block uses."""
        return self.local_rope if self.local_rope is not None and self.window(block) is not None else self.rope

    def block_parameters(self) -> int:
        """Weights in the matrices of one block: what a placement decision and a memory estimate count."""
        if self.foreign is not None:
            return self.foreign.block_weights
        qkv = self.hidden_size * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        output = self.num_heads * self.head_dim * self.hidden_size
        return qkv + output + self.hidden_size * self._mlp_width()

    def _mlp_width(self) -> int:
        """Weights in the MLP's matrices per hidden value."""
        if self.experts is not None:
            experts = self.experts
            return 3 * (experts.count * experts.intermediate_size + experts.shared_size) + experts.count
        return (3 if self.gated else 2) * self.intermediate_size

    def parameters(self) -> int:
        """Weights in all matrices of the model."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)
        return self.num_blocks * self.block_parameters() + tables

    def with_eos(self, token_ids: tuple[int, ...]) -> ModelConfig:
        """The same model with other end tokens: generation_config.json knows more than config.json."""
        return replace(self, eos_token_ids=token_ids)

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, so that equal configs have equal bytes.

        It is hashed into the model's identity, so what a later version added is left out where it does not apply.
        """
        return json.dumps(plain(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ModelConfig:
        """Parse `to_json` bytes from any source. Raises CorruptCheckpoint or UnsupportedModel."""
        if len(data) > MAX_JSON_BYTES:
            raise CorruptCheckpoint(f"model config of {len(data)} bytes: at most {MAX_JSON_BYTES} are allowed")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as exc:
            raise CorruptCheckpoint(f"model config is not JSON: {exc}") from exc
        values = typed(cls, as_mapping(values, "model config"))
        return cls(**values)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config.json (4.x or 5.x keys). Raises UnsupportedModel, CorruptCheckpoint."""
        from .huggingface import read_config  # it builds a ModelConfig, so it imports this module

        return read_config(mapping)
