"""Reading Hugging Face configs of several generations (4.x and 5.x keys) into a ModelConfig.

The defaults here are those of the config classes of transformers: published config.json files leave out
whatever equals them. GGUF metadata is first spelled as such a mapping, so that there is one reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .config import (
    ACTIVATIONS,
    MAX_BLOCKS,
    MAX_HEADS,
    ROPE_KINDS,
    ModelConfig,
    RopeConfig,
    as_mapping,
    check_int,
)

MODEL_TYPES: Final = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
"""Hugging Face `model_type` -> our family."""


def read_config(mapping: Mapping[str, Any]) -> ModelConfig:
    """What `ModelConfig.from_hf` does. Raises UnsupportedModel, CorruptCheckpoint."""
    model_type = mapping.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UnsupportedModel(_unsupported(model_type))
    if isinstance(mapping.get("text_config"), Mapping):  # Gemma 3 with vision: only the text part is run
        outer, mapping = mapping, {**mapping["text_config"]}
        for key in ("eos_token_id", "bos_token_id", "tie_word_embeddings"):
            if outer.get(key) is not None:
                mapping.setdefault(key, outer[key])
    reader = _Reader(mapping)
    return _from_gemma3(reader) if MODEL_TYPES[model_type] == "gemma3" else _from_llama(reader, model_type)


class _Reader:
    """Typed access to a config mapping: absent and null mean the default, a wrong type is damage."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)

    def optional(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key)

    def activation(self, *keys: str, default: str) -> str:
        name = next((self.values[key] for key in keys if self.values.get(key)), default)
        if name not in ACTIVATIONS:
            raise UnsupportedModel(f"activation {name!r} is not supported: {', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[name]

    def tokens(self, key: str, default: int | None = None) -> tuple[int, ...]:
        value = self.values.get(key, default)
        if value is None:
            return ()
        values = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in values):
            raise CorruptCheckpoint(f"config.json: {key} is {value!r}, expected token ids")
        return tuple(values)

    def layer_types(self, count: int) -> tuple[bool, ...] | None:
        """True where a block is sliding; None where the config does not list its blocks."""
        value = self.values.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != count:
            raise CorruptCheckpoint(f"config.json: layer_types must list {count} blocks")
        for kind in value:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedModel(f"layer type {kind!r} is not supported: full_attention, sliding_attention are")
        return tuple(kind == "sliding_attention" for kind in value)


def _from_llama(reader: _Reader, model_type: str) -> ModelConfig:
    qwen2, qwen3 = model_type == "qwen2", model_type == "qwen3"
    num_blocks, hidden = reader.integer("num_hidden_layers"), reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    check_int("num_attention_heads", num_heads, 1, MAX_HEADS)
    head_dim = reader.integer("head_dim", 128 if qwen3 else hidden // num_heads)
    window, sliding = _llama_windows(reader, model_type, num_blocks)
    attention_bias = reader.flag("attention_bias", False)
    max_positions = reader.integer("max_position_embeddings", 2048)
    return ModelConfig(
        family="llama",
        num_blocks=num_blocks,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        vocab_size=reader.integer("vocab_size"),
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        max_positions=max_positions,
        rope=_rope(_rope_values(reader.values), reader.number("rope_theta", 10_000.0), max_positions),
        sliding_window=window,
        sliding_blocks=sliding,
        activation=reader.activation("hidden_act", default="silu"),
        query_scale=head_dim**-0.5,
        qk_norm=qwen3,
        qkv_bias=qwen2 or attention_bias,
        output_bias=attention_bias and not qwen2,
        mlp_bias=model_type == "llama" and reader.flag("mlp_bias", False),
        tied_head=reader.flag("tie_word_embeddings", False),
        bos_token_id=reader.optional("bos_token_id"),
        eos_token_ids=reader.tokens("eos_token_id"),
    )


def _llama_windows(reader: _Reader, model_type: str, num_blocks: int) -> tuple[int | None, tuple[bool, ...]]:
    """Mistral slides everywhere, Qwen from max_window_layers on and only when told, Llama never."""
    window = reader.optional("sliding_window")
    if model_type == "llama" or window is None:
        return None, ()
    if model_type == "mistral":
        sliding = (True,) * num_blocks
    elif not reader.flag("use_sliding_window", False):
        return None, ()
    else:
        first = reader.integer("max_window_layers", 28)
        sliding = reader.layer_types(num_blocks) or tuple(index >= first for index in range(num_blocks))
    return (window, sliding) if any(sliding) else (None, ())


def _from_gemma3(reader: _Reader) -> ModelConfig:
    """Published Gemma 3 configs leave out whatever equals the family's defaults, so they stand here."""
    num_blocks, hidden = reader.integer("num_hidden_layers", 26), reader.integer("hidden_size", 2304)
    if reader.flag("use_bidirectional_attention", False):
        raise UnsupportedModel("bidirectional attention (EmbeddingGemma) is not supported: text generation is")
    pattern = reader.integer("sliding_window_pattern", 6)
    check_int("sliding_window_pattern", pattern, 1, MAX_BLOCKS)
    check_int("num_hidden_layers", num_blocks, 1, MAX_BLOCKS)
    sliding = reader.layer_types(num_blocks) or tuple(bool((i + 1) % pattern) for i in range(num_blocks))
    bias = reader.flag("attention_bias", False)
    max_positions = reader.integer("max_position_embeddings", 131_072)
    full, local = _gemma3_ropes(reader, max_positions)
    return ModelConfig(
        family="gemma3",
        num_blocks=num_blocks,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 9216),
        vocab_size=reader.integer("vocab_size", 262_208),
        num_heads=reader.integer("num_attention_heads", 8),
        num_kv_heads=reader.integer("num_key_value_heads", 4),
        head_dim=reader.integer("head_dim", 256),
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        max_positions=max_positions,
        rope=full,
        local_rope=local if any(sliding) else None,
        sliding_window=reader.integer("sliding_window", 4096) if any(sliding) else None,
        sliding_blocks=sliding if any(sliding) else (),
        activation=reader.activation("hidden_activation", default="gelu_pytorch_tanh"),
        query_scale=_positive("query_pre_attn_scalar", reader.number("query_pre_attn_scalar", 256.0)) ** -0.5,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        norm_offset=1.0,
        post_norms=True,
        embed_scale=_positive("hidden_size", hidden) ** 0.5,
        final_softcap=None if reader.values.get("final_logit_softcapping") is None else _softcap(reader),
        tied_head=reader.flag("tie_word_embeddings", True),
        bos_token_id=reader.integer("bos_token_id", 2),
        eos_token_ids=reader.tokens("eos_token_id", 1),
    )


def _softcap(reader: _Reader) -> float:
    return _positive("final_logit_softcapping", reader.number("final_logit_softcapping"))


def _gemma3_ropes(reader: _Reader, max_positions: int) -> tuple[RopeConfig, RopeConfig]:
    """Full-attention and sliding-window rotations, from 5.x `rope_parameters` or the 4.x keys."""
    theta = reader.number("rope_theta", 1_000_000.0)
    local_theta = reader.number("rope_local_base_freq", 10_000.0)
    nested = _optional_mapping(reader.values.get("rope_parameters"), "rope_parameters")
    full = _optional_mapping(nested.get("full_attention"), "rope_parameters.full_attention")
    full = {**full, **_optional_mapping(reader.values.get("rope_scaling"), "rope_scaling")}
    local = _optional_mapping(nested.get("sliding_attention"), "rope_parameters.sliding_attention")
    return _rope(full, theta, max_positions), _rope(local, local_theta, max_positions)


def _rope_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one rotation of a family: 4.x `rope_scaling` or 5.x `rope_parameters`, flat or by layer type."""
    found = _optional_mapping(values.get("rope_scaling") or values.get("rope_parameters"), "rope_parameters")
    for key in ("full_attention", "sliding_attention"):
        if isinstance(found.get(key), Mapping):
            return as_mapping(found[key], key)
    return found


def _rope(values: Mapping[str, Any], default_theta: float, max_positions: int) -> RopeConfig:
    reader = _Reader(values)
    kind = values.get("rope_type") or values.get("type") or "default"
    if reader.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("partial rotary embedding is not supported: full rotary is")
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported: {', '.join(ROPE_KINDS)} are")
    theta = reader.number("rope_theta", default_theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    original = reader.integer("original_max_position_embeddings", max_positions)
    if kind == "dynamic":  # transformers measures growth against max_position_embeddings here
        original = max_positions
    factor = reader.number("factor", max_positions / max(original, 1) if kind == "yarn" else 1.0)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        original_positions=0 if kind == "linear" else original,
        low_freq_factor=reader.number("low_freq_factor", 1.0),
        high_freq_factor=reader.number("high_freq_factor", 4.0),
        beta_fast=reader.number("beta_fast", 32.0) or 32.0,
        beta_slow=reader.number("beta_slow", 1.0) or 1.0,
        truncate=reader.flag("truncate", True),
        attention_factor=_yarn_attention_factor(reader, factor) if kind == "yarn" else 1.0,
    )


def _yarn_attention_factor(reader: _Reader, factor: float) -> float:
    """YaRN's temperature on the scores (arXiv 2309.00071 section 3.4), in the spellings checkpoints use."""
    if reader.values.get("attention_factor") is not None:
        return reader.number("attention_factor")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, mscale_all = reader.number("mscale", 0.0), reader.number("mscale_all_dim", 0.0)
    return magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)


def _optional_mapping(value: Any, name: str) -> Mapping[str, Any]:
    return {} if value is None else as_mapping(value, name)


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise CorruptCheckpoint(f"config.json: {name} is {value!r}, expected a positive number")
    return value


def _unsupported(name: object) -> str:
    return (
        f"model family {name!r} is not supported: {', '.join(sorted(set(MODEL_TYPES)))} are "
        f"(choose a checkpoint with one of these as model_type)"
    )
