"""Tiny random checkpoints of families that swarmnode does not implement: transformers' layers run them."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny_models import make_checkpoint

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}

FOREIGN: dict[str, dict] = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},  # learned positions, blocks in `decoder`
    "gpt2": {},  # learned positions, Conv1D, stored without a prefix
    "gptj": {"rotary_dim": 8},  # a sine table by position
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 16},
    "gpt_bigcode": {},  # one KV head
    "mpt": {},  # ALiBi made by the model; layers return tuples
    "ctrl": {},  # scales what it is given in place
    "xglm": {"attention_heads": 4, "ffn_dim": 96, "num_layers": 3},  # sine positions, scaled embedding
    "nemotron": {},
    "cohere2": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},  # experts are fused while loading
    "deepseek_v3": LATENT,  # caches latents: keys and values of other widths
    "vaultgemma": {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
}
"""model_type -> changes to tiny_models.BASE."""


def make_foreign(folder: Path, model_type: str, **changes) -> Path:
    """A checkpoint of one of FOREIGN."""
    return make_checkpoint(folder, model_type, **{**FOREIGN.get(model_type, {}), **changes})
