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
from swarmnode.kernels.models.config import ModelConfig

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

    def _read(self, prefix: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name).to(dtype) for name in names}

    def block(self, index: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._read(f"model.layers.{index}.", dtype)

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        return self._read("model.embed_tokens.", dtype)["weight"]

    def final_norm(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return self._read("model.norm.", dtype)

    def head(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        untied = self._read("lm_head.", dtype).get("weight")
        weight = self.embedding(dtype) if untied is None else untied
        return {"norm.weight": self.final_norm(dtype)["weight"], "lm_head.weight": weight}


@dataclass
class Q8Checkpoint(TinyCheckpoint):
    """The same with its head stored in blocks of 32 int8 values, as GGUF's Q8_0."""

    head_kind: str = "q8_0"

    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight = super().head(torch.float32)["lm_head.weight"]
        blocks = weight.view(weight.shape[0], -1, 32)
        scales = (blocks.abs().amax(-1) / 127).half()
        values = (blocks / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return values.view(weight.shape), scales

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        values, scales = self.head_q8()
        floats = values.view(*scales.shape, 32).float() * scales.float().unsqueeze(-1)
        return floats.view(values.shape).to(dtype)
