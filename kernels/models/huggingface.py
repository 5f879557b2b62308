"""Reading Hugging Face configs of several generations (4.x and 5.x keys) into a ModelConfig.

The defaults here are those of the config classes of transformers: published config.json files leave out
whatever equals them. GGUF metadata is first spelled as such a mapping, so that there is one reader.
Families with layer norms are in layernormed.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .bounds import MAX_BLOCKS, MAX_HEADS, check_int
from .config import ExpertsConfig, ModelConfig, RopeConfig
from .layernormed import read_bloom, read_falcon, read_neox, read_stablelm, read_starcoder2
from .reader import Reader, optional_mapping, positive
from .ropes import read_rope, rope_values, rotary_share


def read_config(mapping: Mapping[str, Any]) -> ModelConfig:
    """What `ModelConfig.from_hf` does. Raises UnsupportedModel, CorruptCheckpoint."""
    model_type = mapping.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        raise UnsupportedModel(_unsupported(model_type))
    if isinstance(mapping.get("text_config"), Mapping):  # Gemma 3 with vision: only the text part is run
        outer, mapping = mapping, {**mapping["text_config"]}
        for key in ("eos_token_id", "bos_token_id", "tie_word_embeddings"):
            if outer.get(key) is not None:
                mapping.setdefault(key, outer[key])
    return _READERS[model_type](Reader({**_DEFAULTS.get(model_type, {}), **mapping}))


def _llama_like(reader: Reader, family: str, *, theta: float = 10_000.0, **more: Any) -> ModelConfig:
    """What Llama and its variations have in common; `more` overrides."""
    num_blocks, hidden = reader.integer("num_hidden_layers"), reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    check_int("num_attention_heads", num_heads, 1, MAX_HEADS)
    head_dim = reader.integer("head_dim", more.pop("head_dim", None) or hidden // num_heads)
    max_positions = reader.integer("max_position_embeddings", more.pop("max_positions", 2048))
    values = {
        "family": family,
        "num_blocks": num_blocks,
        "hidden_size": hidden,
        "intermediate_size": reader.integer("intermediate_size"),
        "vocab_size": reader.integer("vocab_size"),
        "num_heads": num_heads,
        "num_kv_heads": reader.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "norm_eps": reader.number("rms_norm_eps", 1e-6),
        "max_positions": max_positions,
        "rope": None,
        "activation": reader.activation("hidden_act", default="silu"),
        "query_scale": positive("head_dim", head_dim) ** -0.5,
        "tied_head": reader.flag("tie_word_embeddings", False),
        "bos_token_id": reader.optional("bos_token_id"),
        "eos_token_ids": reader.tokens("eos_token_id"),
    } | more
    if values["rope"] is None:
        theta = reader.number("rope_theta", theta)
        values["rope"] = read_rope(rope_values(reader.values), theta, max_positions)
    return ModelConfig(**values)


def _sliding(window: int | None, blocks: tuple[bool, ...]) -> dict[str, Any]:
    """The fields of a model whose blocks slide where `blocks` says so."""
    if not window or not any(blocks):
        return {}
    return {"sliding_window": window, "sliding_blocks": blocks}


def _everywhere(reader: Reader) -> tuple[bool, ...]:
    count = reader.integer("num_hidden_layers")
    check_int("num_hidden_layers", count, 1, MAX_BLOCKS)
    return (True,) * count


def _alternating(reader: Reader) -> tuple[bool, ...]:
    """Every other block slides, the first one too, where the config does not list them."""
    count = len(_everywhere(reader))
    return reader.layer_types(count) or tuple(not index % 2 for index in range(count))


def _from_llama(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    return _llama_like(reader, "llama", qkv_bias=bias, output_bias=bias, mlp_bias=reader.flag("mlp_bias", False))


def _from_granite(reader: Reader) -> ModelConfig:
    """Llama with four scales."""
    bias = reader.flag("attention_bias", False)
    return _llama_like(
        reader,
        "llama",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
        query_scale=reader.number("attention_multiplier", 1.0),
        embed_scale=reader.number("embedding_multiplier", 1.0),
        residual_scale=reader.number("residual_multiplier", 1.0),
        logit_scale=1 / positive("logits_scaling", reader.number("logits_scaling", 1.0)),
    )


def _from_smollm3(reader: Reader) -> ModelConfig:
    """Llama without positions in every fourth block, which may slide instead."""
    bias, count = reader.flag("attention_bias", False), len(_everywhere(reader))
    step = reader.integer("no_rope_layer_interval", 4)
    check_int("no_rope_layer_interval", step, 1, MAX_BLOCKS)
    listed = reader.tokens("no_rope_layers") or tuple(int((index + 1) % step > 0) for index in range(count))
    if len(listed) != count:
        raise CorruptCheckpoint(f"config.json: no_rope_layers lists {len(listed)} of {count} blocks")
    unrotated = tuple(index for index, rotated in enumerate(listed) if not rotated)
    slides = reader.flag("use_sliding_window", False)
    sliding = reader.layer_types(count) or tuple(slides and index in unrotated for index in range(count))
    return _llama_like(
        _with_defaults(reader, tie_word_embeddings=True),
        "llama",
        theta=2_000_000.0,
        max_positions=32_768,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
        unrotated_blocks=unrotated,
        **_sliding(reader.optional("sliding_window"), sliding),
    )


def _from_seed_oss(reader: Reader) -> ModelConfig:
    return _llama_like(
        reader,
        "llama",
        head_dim=128,
        max_positions=524_288,
        qkv_bias=reader.flag("attention_bias", True),
        output_bias=reader.flag("attention_out_bias", False),
        mlp_bias=reader.flag("mlp_bias", False),
    )


def _from_mistral(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    window = _sliding(reader.optional("sliding_window"), _everywhere(reader))
    return _llama_like(reader, "llama", qkv_bias=bias, output_bias=bias, **window)


def _from_qwen2(reader: Reader) -> ModelConfig:
    return _llama_like(reader, "llama", qkv_bias=True, **_qwen_windows(reader))


def _from_qwen3(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    more = _qwen_windows(reader)
    return _llama_like(reader, "llama", head_dim=128, qk_norm=True, qkv_bias=bias, output_bias=bias, **more)


def _qwen_windows(reader: Reader) -> dict[str, Any]:
    """Qwen slides from max_window_layers on, and only when told."""
    if not reader.flag("use_sliding_window", False):
        return {}
    first, count = reader.integer("max_window_layers", 28), len(_everywhere(reader))
    sliding = reader.layer_types(count) or tuple(index >= first for index in range(count))
    return _sliding(reader.optional("sliding_window"), sliding)


def _from_phi3(reader: Reader) -> ModelConfig:
    max_positions = reader.integer("max_position_embeddings", 4096)
    values = dict(rope_values(reader.values))
    if (values.get("rope_type") or values.get("type")) == "yarn":  # what early Phi-3 files called it
        values["rope_type"] = "longrope"
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    check_int("num_attention_heads", heads, 1, MAX_HEADS)
    return _llama_like(
        reader,
        "phi3",
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        max_positions=max_positions,
        rope=read_rope(
            values,
            reader.number("rope_theta", 10_000.0),
            max_positions,
            partial=True,
            original_positions=reader.integer("original_max_position_embeddings", 4096),
        ),
        rotary_dim=int(reader.integer("head_dim", hidden // heads) * rotary_share(reader)),
        **_sliding(reader.optional("sliding_window"), _everywhere(reader)),
    )


def _from_mixtral(reader: Reader) -> ModelConfig:
    inner = reader.integer("intermediate_size", 14_336)
    experts = ExpertsConfig(
        count=_expert_count(reader, 8), active=reader.integer("num_experts_per_tok", 2), intermediate_size=inner
    )
    return _llama_like(
        reader,
        "mixtral",
        theta=1_000_000.0,
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        max_positions=131_072,
        experts=experts,
        **_sliding(reader.optional("sliding_window"), _everywhere(reader)),
    )


def _expert_count(reader: Reader, default: int) -> int:
    """transformers has renamed it back and forth."""
    return reader.integer("num_local_experts", reader.integer("num_experts", default))


def _from_qwen2_moe(reader: Reader) -> ModelConfig:
    bias, count = reader.flag("qkv_bias", True), len(_everywhere(reader))
    most = reader.integer("max_window_layers", 28)
    sliding = reader.layer_types(count) or tuple(not index % 2 and index < most for index in range(count))
    window = reader.optional("sliding_window") if reader.flag("use_sliding_window", False) else None
    experts = _qwen_experts(reader, count=60, active=4, inner=1408)
    shared = reader.integer("shared_expert_intermediate_size", 5632)
    return _llama_like(
        reader,
        "qwen2_moe",
        max_positions=32_768,
        qkv_bias=bias,
        experts=ExpertsConfig(**experts, shared_size=shared),
        **_sliding(window, sliding),
    )


def _from_qwen3_moe(reader: Reader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    window = reader.optional("sliding_window") if reader.flag("use_sliding_window", False) else None
    return _llama_like(
        reader,
        "qwen3_moe",
        max_positions=32_768,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        experts=ExpertsConfig(**_qwen_experts(reader, count=128, active=8, inner=768)),
        **_sliding(window, _everywhere(reader)),
    )


def _qwen_experts(reader: Reader, *, count: int, active: int, inner: int) -> dict[str, Any]:
    step, blocks = reader.integer("decoder_sparse_step", 1), len(_everywhere(reader))
    check_int("decoder_sparse_step", step, 1, MAX_BLOCKS)
    listed = set(reader.tokens("mlp_only_layers"))
    experts = _expert_count(reader, count)
    return {
        "count": experts,
        "active": min(reader.integer("num_experts_per_tok", active), max(experts, 1)),
        "intermediate_size": reader.integer("moe_intermediate_size", inner),
        "normalize": reader.flag("norm_topk_prob", False),
        "dense_blocks": tuple(index for index in range(blocks) if index in listed or (index + 1) % step),
    }


def _from_gpt_oss(reader: Reader) -> ModelConfig:
    bias, max_positions = reader.flag("attention_bias", True), reader.integer("max_position_embeddings", 131_072)
    window = reader.integer("sliding_window", 128) if reader.values.get("sliding_window", 128) else None
    yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    theta = reader.number("rope_theta", 150_000.0)
    return _llama_like(
        reader,
        "gpt_oss",
        head_dim=64,
        norm_eps=reader.number("rms_norm_eps", 1e-5),
        max_positions=max_positions,
        rope=read_rope(rope_values(reader.values) or yarn, theta, max_positions),
        sinks=True,
        qkv_bias=bias,
        output_bias=bias,
        experts=ExpertsConfig(
            count=_expert_count(reader, 128),
            active=reader.integer("num_experts_per_tok", 4),
            intermediate_size=reader.integer("intermediate_size", 2880),
            router="chosen",
            bias=True,
        ),
        swiglu_limit=positive("swiglu_limit", reader.number("swiglu_limit", 7.0)),
        swiglu_alpha=reader.number("swiglu_alpha", 1.702),
        **_sliding(window, _alternating(reader)),
    )


def _gemma_like(reader: Reader, family: str, **more: Any) -> ModelConfig:
    """What all Gemmas have in common: norm weights less one, a scaled embedding, a tied head."""
    if reader.flag("use_bidirectional_attention", False):
        raise UnsupportedModel("bidirectional attention (EmbeddingGemma) is not supported: text generation is")
    bias = reader.flag("attention_bias", False)
    defaults = {"tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256}
    reader = Reader({**defaults, **{key: value for key, value in reader.values.items() if value is not None}})
    return _llama_like(
        reader,
        family,
        qkv_bias=bias,
        output_bias=bias,
        norm_offset=1.0,
        embed_scale=positive("hidden_size", reader.integer("hidden_size")) ** 0.5,
        **more,
    )


def _from_gemma(reader: Reader) -> ModelConfig:
    activation = reader.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    reader = _with_defaults(
        reader,
        num_hidden_layers=28,
        hidden_size=3072,
        intermediate_size=24_576,
        vocab_size=256_000,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
    )
    # "gelu" in the first published files means the tanh approximation
    return _gemma_like(reader, "gemma", activation="gelu_tanh" if activation == "gelu" else activation)


def _from_gemma2(reader: Reader) -> ModelConfig:
    reader = _with_defaults(
        reader,
        num_hidden_layers=26,
        hidden_size=2304,
        intermediate_size=9216,
        vocab_size=256_000,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    )
    return _gemma_like(
        reader,
        "gemma2",
        activation=reader.activation("hidden_activation", default="gelu_pytorch_tanh"),
        query_scale=_query_scale(reader),
        post_norms=True,
        score_softcap=reader.softcap("attn_logit_softcapping", 50.0),
        final_softcap=reader.softcap("final_logit_softcapping", 30.0),
        **_sliding(reader.integer("sliding_window", 4096), _alternating(reader)),
    )


def _query_scale(reader: Reader) -> float:
    scalar: float = positive("query_pre_attn_scalar", reader.number("query_pre_attn_scalar", 256.0)) ** -0.5
    return scalar


def _with_defaults(reader: Reader, **defaults: Any) -> Reader:
    """Published Gemma configs leave out whatever equals the family's defaults, so they stand here."""
    missing = {key: value for key, value in defaults.items() if reader.values.get(key) is None}
    return Reader({**reader.values, **missing})


def _from_gemma3(reader: Reader) -> ModelConfig:
    reader = _with_defaults(
        reader,
        num_hidden_layers=26,
        hidden_size=2304,
        intermediate_size=9216,
        vocab_size=262_208,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131_072,
    )
    num_blocks, pattern = reader.integer("num_hidden_layers"), reader.integer("sliding_window_pattern", 6)
    check_int("sliding_window_pattern", pattern, 1, MAX_BLOCKS)
    check_int("num_hidden_layers", num_blocks, 1, MAX_BLOCKS)
    sliding = reader.layer_types(num_blocks) or tuple(bool((i + 1) % pattern) for i in range(num_blocks))
    full, local = _gemma3_ropes(reader, reader.integer("max_position_embeddings"))
    return _gemma_like(
        reader,
        "gemma3",
        rope=full,
        local_rope=local if any(sliding) else None,
        activation=reader.activation("hidden_activation", default="gelu_pytorch_tanh"),
        query_scale=_query_scale(reader),
        qk_norm=True,
        post_norms=True,
        final_softcap=reader.softcap("final_logit_softcapping"),
        **_sliding(reader.integer("sliding_window", 4096), sliding),
    )


def _gemma3_ropes(reader: Reader, max_positions: int) -> tuple[RopeConfig, RopeConfig]:
    """Full-attention and sliding-window rotations, from 5.x `rope_parameters` or the 4.x keys."""
    theta = reader.number("rope_theta", 1_000_000.0)
    local_theta = reader.number("rope_local_base_freq", 10_000.0)
    nested = optional_mapping(reader.values.get("rope_parameters"), "rope_parameters")
    full = optional_mapping(nested.get("full_attention"), "rope_parameters.full_attention")
    full = {**full, **optional_mapping(reader.values.get("rope_scaling"), "rope_scaling")}
    local = optional_mapping(nested.get("sliding_attention"), "rope_parameters.sliding_attention")
    return read_rope(full, theta, max_positions), read_rope(local, local_theta, max_positions)


_READERS: Final[dict[str, Callable[[Reader], ModelConfig]]] = {
    "llama": _from_llama,
    "granite": _from_granite,
    "smollm3": _from_smollm3,
    "seed_oss": _from_seed_oss,
    "mistral": _from_mistral,
    "qwen2": _from_qwen2,
    "qwen3": _from_qwen3,
    "gemma": _from_gemma,
    "gemma2": _from_gemma2,
    "gemma3": _from_gemma3,
    "gemma3_text": _from_gemma3,
    "phi3": _from_phi3,
    "mixtral": _from_mixtral,
    "qwen2_moe": _from_qwen2_moe,
    "qwen3_moe": _from_qwen3_moe,
    "gpt_oss": _from_gpt_oss,
    "falcon": read_falcon,
    "RefinedWeb": read_falcon,
    "RefinedWebModel": read_falcon,
    "bloom": read_bloom,
    "gpt_neox": read_neox,
    "stablelm": read_stablelm,
    "starcoder2": read_starcoder2,
}
"""Hugging Face `model_type` -> reader."""


_LLAMA_TOKENS: Final = {"bos_token_id": 1, "eos_token_id": 2}
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "llama": _LLAMA_TOKENS,
    "granite": _LLAMA_TOKENS,
    "smollm3": {"bos_token_id": 128_000, "eos_token_id": 128_001, "num_key_value_heads": 4},
    "seed_oss": {"bos_token_id": 0, "eos_token_id": 2, "num_key_value_heads": 8},
    "mistral": {
        **_LLAMA_TOKENS,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32_768},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32_768},
    "phi3": {"bos_token_id": 1, "eos_token_id": 32_000},
    "mixtral": {**_LLAMA_TOKENS, "num_key_value_heads": 8},
    "qwen2_moe": {"num_key_value_heads": 16, "sliding_window": 4096},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096},
    "gpt_oss": {"num_key_value_heads": 8},
    "falcon": {"bos_token_id": 11, "eos_token_id": 11},
    "bloom": _LLAMA_TOKENS,
    "gpt_neox": {"bos_token_id": 0, "eos_token_id": 2},
    "stablelm": {"bos_token_id": 0, "eos_token_id": 0, "num_key_value_heads": 32},
    "starcoder2": {"bos_token_id": 50_256, "eos_token_id": 50_256, "num_key_value_heads": 2},
}
"""What an absent key means, where it is not the same for all; null means there is none."""


def _unsupported(name: object) -> str:
    return (
        f"model family {name!r} is not supported: {', '.join(sorted(_READERS))} are "
        f"(choose a checkpoint with one of these as model_type)"
    )
