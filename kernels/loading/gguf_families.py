"""What GGUF files of each architecture call things: llama.cpp's names of tensors and numbers, in Hugging Face's terms.

llama.cpp's converters also move numbers: they stack queries, keys and values that a family keeps by KV head, store all
experts of a block in one cube, put the rotary rows of Llama's relatives into pairs and add one to Gemma's norms.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..models.config import ModelConfig
from .layouts import Layout

Key = Callable[[str], Any]
"""A number of the file by its name without the architecture; None where the file has none."""

_STEMS: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_SANDWICH: Final = {
    **_STEMS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TWO_NORMS: Final = {**_STEMS, "input_layernorm": "attn_norm_2", "post_attention_layernorm": "attn_norm"}
_CUBES: Final = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_APART: Final = {
    "mlp.experts.*.gate_proj": "ffn_gate.*",
    "mlp.experts.*.up_proj": "ffn_up.*",
    "mlp.experts.*.down_proj": "ffn_down.*",
}
"""Experts one by one, as the first Mixtral files have them."""
_GEMMA2_27B_BLOCKS: Final = 46
_GEMMA3_27B_BLOCKS: Final = 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One `general.architecture`."""

    model_type: str
    """Of the config.json its models had."""
    more: Callable[[Key, dict[str, Any], Collection[str]], Mapping[str, Any]] = lambda *_: {}
    """What its config.json says beyond what all have: from numbers, config so far, names of tensors."""
    stems: Mapping[str, str] = field(default_factory=lambda: _STEMS)
    """Our stems -> theirs."""
    paired: bool = False
    """Rotary rows of a head are pairs side by side, not halves."""
    norms_plus_one: bool = False
    """One is added to the weights of norms."""
    fused_qkv: bool = False
    """Queries, keys and values are stacked in one matrix."""
    fused_gate_up: bool = False
    """Gate and up are."""

    def layout(self, config: ModelConfig, names: Collection[str]) -> Layout:
        """How a file of these tensors spells a block."""
        stems = _TWO_NORMS if config.family == "falcon" and config.residual == "parallel" else self.stems
        apart = "blk.0.ffn_gate.0.weight" in names
        return Layout(
            stems={**stems, **_APART},
            fused_qkv="attn_qkv" if self.fused_qkv else "",
            fused_gate_up="ffn_up" if self.fused_gate_up else "",
            stacked={} if apart else _CUBES,
            embedding_norm="token_embd_norm" if config.embed_norm else "",
        )


def _llama(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    window = key("attention.sliding_window")
    found: dict[str, Any] = {"attention_bias": "blk.0.attn_q.bias" in names}
    if key("expert_count"):
        experts = {"num_local_experts": key("expert_count"), "num_experts_per_tok": key("expert_used_count")}
        return {**found, **experts, "model_type": "mixtral", "sliding_window": window}
    if window:  # files of the first Mistral call themselves llama, with a window
        return {**found, "model_type": "mistral", "sliding_window": window}
    return found


def _mistral(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {"sliding_window": key("attention.sliding_window") or None}


def _granite(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in names,
        "attention_multiplier": key("attention.scale"),
        "embedding_multiplier": key("embedding_scale"),
        "residual_multiplier": key("residual_scale"),
        "logits_scaling": key("logit_scale"),
    }


def _gemma2(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "sliding_window": key("attention.sliding_window"),
        "attn_logit_softcapping": key("attn_logit_softcapping"),
        "final_logit_softcapping": key("final_logit_softcapping"),
        **_scalar(config, _GEMMA2_27B_BLOCKS),
    }


def _gemma3(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {"sliding_window": key("attention.sliding_window"), **_scalar(config, _GEMMA3_27B_BLOCKS)}


def _scalar(config: dict[str, Any], odd_blocks: int) -> dict[str, Any]:
    """Only the 27B scales queries by hidden / heads instead of head_dim, and the file does not say so."""
    if config["num_hidden_layers"] == odd_blocks:
        return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
    return {} if config["head_dim"] is None else {"query_pre_attn_scalar": config["head_dim"]}


def _phi3(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "sliding_window": key("attention.sliding_window") or None,
        "original_max_position_embeddings": key("rope.scaling.original_context_length"),
        "partial_rotary_factor": _rotated(key, config),
    }


def _qwen2_moe(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {**_qwen3_moe(key, config, names), "norm_topk_prob": False} | {
        "shared_expert_intermediate_size": key("expert_shared_feed_forward_length"),
        "qkv_bias": "blk.0.attn_q.bias" in names,
    }


def _qwen3_moe(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "num_experts": key("expert_count"),
        "num_experts_per_tok": key("expert_used_count"),
        "moe_intermediate_size": key("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _seed_oss(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in names}


def _falcon(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    two_norms = "blk.0.attn_norm_2.weight" in names
    return {
        "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
        "new_decoder_architecture": two_norms or 1 < (kv_heads or 0) < heads,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "ffn_hidden_size": config["intermediate_size"],
        "bias": "blk.0.attn_qkv.bias" in names,
    }


def _neox(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "layer_norm_eps": key("attention.layer_norm_epsilon"),
        "use_parallel_residual": key("use_parallel_residual"),
        "rotary_pct": _rotated(key, config),
        "attention_bias": "blk.0.attn_qkv.bias" in names,
    }


def _stablelm(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "layer_norm_eps": key("attention.layer_norm_epsilon"),
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in names,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in names,
        "use_qkv_bias": "blk.0.attn_q.bias" in names,
        "partial_rotary_factor": _rotated(key, config),
    }


def _starcoder2(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "norm_epsilon": key("attention.layer_norm_epsilon"),
        "sliding_window": key("attention.sliding_window"),
        "use_bias": "blk.0.attn_q.bias" in names,
    }


def _bloom(key: Key, config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
        "seq_length": config["max_position_embeddings"],
    }


def _rotated(key: Key, config: dict[str, Any]) -> float | None:
    """The part of a head that is rotated."""
    dimensions, heads, hidden = key("rope.dimension_count"), config["num_attention_heads"], config["hidden_size"]
    if not all(isinstance(value, int) and value > 0 for value in (dimensions, heads, hidden)):
        return None
    return float(dimensions / (config["head_dim"] or hidden // heads))


ARCHITECTURES: Final = {
    "llama": Architecture(model_type="llama", more=_llama, paired=True),
    "mistral": Architecture(model_type="mistral", more=_mistral, paired=True),
    "granite": Architecture(model_type="granite", more=_granite, paired=True),
    "smollm3": Architecture(model_type="smollm3", paired=True),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen3": Architecture(model_type="qwen3"),
    "qwen2moe": Architecture(model_type="qwen2_moe", more=_qwen2_moe),
    "qwen3moe": Architecture(model_type="qwen3_moe", more=_qwen3_moe),
    "seed_oss": Architecture(
        model_type="seed_oss", more=_seed_oss, stems={**_STEMS, "post_attention_layernorm": "post_attention_norm"}
    ),
    "gemma": Architecture(model_type="gemma", norms_plus_one=True),
    "gemma2": Architecture(model_type="gemma2", more=_gemma2, stems=_SANDWICH, norms_plus_one=True),
    "gemma3": Architecture(model_type="gemma3_text", more=_gemma3, stems=_SANDWICH, norms_plus_one=True),
    "phi3": Architecture(model_type="phi3", more=_phi3, fused_qkv=True, fused_gate_up=True),
    "falcon": Architecture(model_type="falcon", more=_falcon, fused_qkv=True),
    "gptneox": Architecture(model_type="gpt_neox", more=_neox, fused_qkv=True),
    "stablelm": Architecture(model_type="stablelm", more=_stablelm),
    "starcoder2": Architecture(model_type="starcoder2", more=_starcoder2),
    "bloom": Architecture(model_type="bloom", more=_bloom, fused_qkv=True),
}
"""general.architecture -> what it means."""
