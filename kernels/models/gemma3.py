"""The Gemma 3 block: norms on both sides of attention and MLP, query and key norms, local and global rotations."""

from __future__ import annotations

import torch

from ..blocks import Block, MakeLinear, NormNames, Tensors
from .config import ModelConfig

NORMS = NormNames(
    attention="input_layernorm",
    after_attention="post_attention_layernorm",
    mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def build_block(config: ModelConfig, index: int, tensors: Tensors, make: MakeLinear, device: torch.device) -> Block:
    """Block `index` from its tensors."""
    return Block(config, index, tensors, NORMS, make, device)
