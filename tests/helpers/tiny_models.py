"""Tiny random checkpoints made by transformers, one per family and variation, and transformers itself as the oracle.

Weights are scaled up from the default initialisation, so that blocks change the hidden states by a lot and a wrong
norm, rotation or mask shows in the logits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from swarmnode.kernels.loading.shapes import block_shapes, norm_shapes
from swarmnode.kernels.models.config import ModelConfig, RopeConfig

BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 24, "attn_logit_softcapping": 5.0}
EXPERTS = {"num_local_experts": 6, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LONGROPE = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.5 * pair for pair in range(8)],
    },
}
PHI3 = {"pad_token_id": None}
OSS = {
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 24,
    "swiglu_limit": 1.5,
}

VARIATIONS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied-mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-mqa-biases": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (
        "llama",
        {"head_dim": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96},
    ),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 3.0,
        },
    ),
    "granite-plain": ("granite", {"attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3-sliding": (
        "smollm3",
        {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 20, "tie_word_embeddings": False},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 24, "head_dim": 32}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3-untied-softcap": (
        "gemma3_text",
        {**GEMMA, "tie_word_embeddings": False, "final_logit_softcapping": 5.0, "num_key_value_heads": 1},
    ),
    "gemma3-linear": (
        "gemma3_text",
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma-mqa": ("gemma", {"head_dim": 32, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2-uncapped": (
        "gemma2",
        {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 40},
    ),
    "gemma2-full": ("gemma2", {**GEMMA2, "layer_types": ["full_attention"] * 3, "num_key_value_heads": 4}),
    "phi3": ("phi3", PHI3),
    "phi3-sliding": ("phi3", {**PHI3, "sliding_window": 20, "num_key_value_heads": 4}),
    "phi3-longrope": ("phi3", {**PHI3, **LONGROPE}),
    "phi3-partial": ("phi3", {**PHI3, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", EXPERTS),
    "mixtral-sliding": ("mixtral", {**EXPERTS, "sliding_window": 24, "num_experts_per_tok": 1, "head_dim": 32}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 80}),
    "qwen2_moe-mixed": (
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 20,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32}),
    "qwen3_moe-normalized": (
        "qwen3_moe",
        {**EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 2, "attention_bias": True},
    ),
    "gpt_oss": ("gpt_oss", OSS),
    "gpt_oss-yarn": ("gpt_oss", {**OSS, "rope_parameters": {**YARN, "truncate": False}, "num_key_value_heads": 1}),
    "falcon-7b": ("falcon", {}),
    "falcon-biases": ("falcon", {"bias": True, "tie_word_embeddings": False, "ffn_hidden_size": 96}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon-rw": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon-rw-odd": ("falcon", {"alibi": True, "num_attention_heads": 6, "hidden_size": 96}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4}),
    "bloom-odd-untied": ("bloom", {"n_layer": 3, "n_head": 6, "hidden_size": 96, "tie_word_embeddings": False}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-shared-norm": (
        "stablelm",
        {"use_parallel_residual": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    ),
    "starcoder2": ("starcoder2", {"sliding_window": 24}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "neox": ("gpt_neox", {}),
    "neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"}),
    "neox-linear-rope": (
        "gpt_neox",
        {
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}


def make_checkpoint(folder: Path, model_type: str, **changes) -> Path:
    """Write config.json and model.safetensors of a tiny random model, as transformers saves them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**BASE, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.3, 0.3)
            elif "embed" in name or "lm_head" in name or parameter.shape[0] == BASE["vocab_size"]:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 1.5 / parameter.shape[_inputs(name, parameter)] ** 0.5)
    model.save_pretrained(folder)
    return folder


def _inputs(name: str, parameter: torch.Tensor) -> int:
    """The dimension that is summed over: GPT-OSS's experts are [expert, in, out], all others end in it."""
    return 1 if parameter.dim() == 2 or "experts.gate_up_proj" not in name else 2


def make_variation(folder: Path, name: str, **changes) -> Path:
    """One of VARIATIONS, with further config changes."""
    model_type, variation = VARIATIONS[name]
    return make_checkpoint(folder, model_type, **{**variation, **changes})


def load_oracle(folder: Path):
    """transformers' model of the checkpoint: fp32, eager attention (what others are measured against).

    Falcon by SDPA: its eager attention adds ALiBi twice in transformers 5, through the mask and to the scores.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    falcon = AutoConfig.from_pretrained(folder).model_type == "falcon"
    kernel = "sdpa" if falcon else "eager"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kernel).eval()


def make_config(**changes) -> ModelConfig:
    """A small Llama config by our own fields, for tests that need no transformers."""
    values = {
        "family": "llama",
        "num_blocks": 2,
        "hidden_size": 128,
        "intermediate_size": 192,
        "vocab_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "norm_eps": 1e-6,
        "max_positions": 1024,
        "rope": RopeConfig(theta=10_000.0),
        "query_scale": 0.2,
    }
    return ModelConfig(**{**values, **changes})


class RandomCheckpoint:
    """Random weights for a config, made on demand from its own generator."""

    head_kind = "float"

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self.config = config
        self._seed = seed

    def _random(self, salt: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(self._seed * 1000 + salt)
        return {
            name: (torch.randn(shape, generator=rng) * (1.2 / shape[-1] ** 0.5 if len(shape) == 2 else 0.5)).to(dtype)
            for name, shape in shapes.items()
        }

    def block(self, index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._random(index + 1, block_shapes(self.config, index), dtype)

    def embedding_norm(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._random(502, norm_shapes(self.config), dtype)

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self._random(500, {"weight": shape}, dtype)["weight"]

    def final_norm(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._random(501, norm_shapes(self.config), dtype)

    def head(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {**self.final_norm(dtype), "lm_head.weight": self.embedding(dtype)}

    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_q8(self.embedding(torch.float32))


def quantize_q8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values and fp16 scales per 32 of them, as GGUF's Q8_0."""
    blocks = weight.view(weight.shape[0], -1, 32)
    scales = (blocks.abs().amax(-1) / 127).half()
    values = (blocks / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return values.view(weight.shape), scales


class Q8Checkpoint(RandomCheckpoint):
    """The same with embedding and head stored in Q8_0."""

    head_kind = "q8_0"

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        values, scales = self.head_q8()
        floats = values.view(*scales.shape, 32).float() * scales.float().unsqueeze(-1)
        return floats.view(values.shape).to(dtype)

    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_q8(super().embedding(torch.float32))
