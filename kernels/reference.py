"""The slow, obvious block: what the fast one is checked against where transformers is not at hand.

Whole sequences only, fp32, no cache, no fusing, no padding: each step as the papers write it. It knows the forms of
Llama, Mistral, Qwen and Gemma 3; for all others transformers is the oracle (tests/kernels/test_families.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from ..protocol.errors import UnsupportedModel
from .models.config import ModelConfig
from .rope import inverse_frequencies

Tensors = Mapping[str, torch.Tensor]


def run_block(config: ModelConfig, index: int, tensors: Tensors, hidden: torch.Tensor) -> torch.Tensor:
    """fp32 [tokens, hidden] of one whole sequence -> the same after block `index`. Raises UnsupportedModel."""
    if (
        config.norm != "rms"
        or config.residual != "sequential"
        or not config.gated
        or config.experts is not None
        or config.residual_scale != 1.0
    ):
        raise UnsupportedModel(f"the reference knows no blocks of {config.family}")
    if (
        config.score_softcap is not None
        or config.alibi != "none"
        or config.sinks
        or config.rotated != config.head_dim
        or config.unrotated_blocks
    ):
        raise UnsupportedModel(f"the reference knows no attention of {config.family}")
    attended = _attention(config, index, tensors, _norm(config, tensors, "input_layernorm", hidden))
    if config.post_norms:
        hidden = hidden + _norm(config, tensors, "post_attention_layernorm", attended)
        inner = _mlp(config, tensors, _norm(config, tensors, "pre_feedforward_layernorm", hidden))
        return hidden + _norm(config, tensors, "post_feedforward_layernorm", inner)
    hidden = hidden + attended
    return hidden + _mlp(config, tensors, _norm(config, tensors, "post_attention_layernorm", hidden))


def _norm(config: ModelConfig, tensors: Tensors, name: str, rows: torch.Tensor) -> torch.Tensor:
    scaled = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + config.norm_eps)
    return scaled * (tensors[f"{name}.weight"] + config.norm_offset)


def _linear(tensors: Tensors, name: str, rows: torch.Tensor) -> torch.Tensor:
    return functional.linear(rows, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _attention(config: ModelConfig, index: int, tensors: Tensors, rows: torch.Tensor) -> torch.Tensor:
    tokens, width = rows.shape[0], config.head_dim
    query, key, value = (
        _linear(tensors, f"self_attn.{part}_proj", rows).view(tokens, -1, width).transpose(0, 1) for part in "qkv"
    )  # [heads, tokens, d]
    if config.qk_norm:
        query = _norm(config, tensors, "self_attn.q_norm", query)
        key = _norm(config, tensors, "self_attn.k_norm", key)
    query, key = _rotated(config, index, query), _rotated(config, index, key)
    group = config.num_heads // config.num_kv_heads
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    positions = torch.arange(tokens)
    distance = positions[:, None] - positions[None, :]
    hidden_from = distance < 0
    if (window := config.window(index)) is not None:
        hidden_from |= distance >= window
    scores = (query @ key.mT * config.query_scale).masked_fill(hidden_from, float("-inf"))
    mixed = scores.softmax(-1) @ value  # [heads, tokens, d]
    return _linear(tensors, "self_attn.o_proj", mixed.transpose(0, 1).reshape(tokens, -1))


def _rotated(config: ModelConfig, index: int, heads: torch.Tensor) -> torch.Tensor:
    rope = config.rope_of(index)
    angles = torch.arange(heads.shape[1]).float()[:, None] * inverse_frequencies(rope, config.head_dim)
    cosine, sine = (angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor)  # [tokens, d / 2]
    first, second = heads.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def _mlp(config: ModelConfig, tensors: Tensors, rows: torch.Tensor) -> torch.Tensor:
    gate = _linear(tensors, "mlp.gate_proj", rows)
    match config.activation:
        case "gelu_tanh":
            gate = functional.gelu(gate, approximate="tanh")
        case "gelu":
            gate = functional.gelu(gate)
        case _:
            gate = functional.silu(gate)
    return _linear(tensors, "mlp.down_proj", gate * _linear(tensors, "mlp.up_proj", rows))
