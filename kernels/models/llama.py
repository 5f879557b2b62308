"""The Llama block and its variations: Llama 2 and 3, Mistral, Qwen2 (biases), Qwen3 (query and key norms)."""

from __future__ import annotations

import torch

from ..blocks import Block, MakeLinear, NormNames, Tensors
from .config import ModelConfig

NORMS = NormNames(attention="input_layernorm", mlp="post_attention_layernorm")


def build_block(config: ModelConfig, index: int, tensors: Tensors, make: MakeLinear, device: torch.device) -> Block:
    """Block `index` from its tensors."""
    return Block(config, index, tensors, NORMS, make, device)
