"""Tiny random checkpoints made by transformers, one per family and variation, and transformers itself as the oracle.

Weights are scaled up from the default initialisation, so that blocks change the hidden states by a lot and a wrong
norm, rotation or mask shows in the logits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
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
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def make_variation(folder: Path, name: str, **changes) -> Path:
    """One of VARIATIONS, with further config changes."""
    model_type, variation = VARIATIONS[name]
    return make_checkpoint(folder, model_type, **{**variation, **changes})


def load_oracle(folder: Path):
    """transformers' model of the checkpoint: fp32, eager attention (what others are measured against)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@dataclass
class TinyCheckpoint:
    """The engine's side of a checkpoint folder with one safetensors file: the Checkpoint protocol, read plainly."""

    folder: Path
    head_kind: str = "float"

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(json.loads((self.folder / "config.json").read_text()))

    def _read(self, prefix: str, dtype: torch.dtype, only: str = "") -> dict[str, torch.Tensor]:
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix + only)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name).to(dtype) for name in names}

    def block(self, index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._read(f"model.layers.{index}.", dtype)

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        return self._read("model.embed_tokens.", dtype)["weight"]

    def final_norm(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._read("model.", dtype, only="norm.weight")

    def head(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        untied = self._read("lm_head.", dtype).get("weight")
        weight = self.embedding(dtype) if untied is None else untied
        return {**self.final_norm(dtype), "lm_head.weight": weight}


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
        config = self.config
        hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
        shapes = {
            "self_attn.q_proj.weight": (config.num_heads * width, hidden),
            "self_attn.k_proj.weight": (config.num_kv_heads * width, hidden),
            "self_attn.v_proj.weight": (config.num_kv_heads * width, hidden),
            "self_attn.o_proj.weight": (hidden, config.num_heads * width),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if config.post_norms:
            shapes |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
        if config.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
        biased = (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] * config.qkv_bias
            + ["self_attn.o_proj"] * config.output_bias
            + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] * config.mlp_bias
        )
        shapes |= {f"{name}.bias": (shapes[f"{name}.weight"][0],) for name in biased}
        return self._random(index + 1, shapes, dtype)

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return self._random(500, {"weight": shape}, dtype)["weight"]

    def final_norm(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._random(501, {"norm.weight": (self.config.hidden_size,)}, dtype)

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
