"""Which tensors a model of a given config must have, and their shapes.

Checked before the engine sees a tensor, so that it never meets a missing bias or a wrong width, and strictly: a
checkpoint with a tensor its family does not know is a variation we would silently compute wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from ..models.config import ModelConfig

Shape = tuple[int, ...]

IGNORED: Final = ("rotary_emb.inv_freq", "attn_rot_embd.weight", "rope_freqs.weight")
"""Endings of tensors that old converters stored although they follow from the config."""
_MOST_NAMED: Final = 4


def block_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name inside a block -> shape."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.post_norms:
        shapes |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if config.qkv_bias:
        biases = {"q": queries, "k": keys, "v": keys}
        shapes |= {f"self_attn.{name}_proj.bias": (width,) for name, width in biases.items()}
    if config.output_bias:
        shapes |= {"self_attn.o_proj.bias": (hidden,)}
    if config.mlp_bias:
        shapes |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,), "mlp.down_proj.bias": (hidden,)}
    return shapes


def table_shape(config: ModelConfig) -> Shape:
    """Shape of the embedding and of the LM head."""
    return (config.vocab_size, config.hidden_size)


def check_names(path: Path, where: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raise unless exactly the expected tensors are there, but for the IGNORED."""
    expected, found = set(expected), {name for name in found if not name.endswith(IGNORED)}
    if missing := expected - found:
        raise CorruptCheckpoint(f"{path}: {where} lacks {_list(missing)}: the download may be incomplete")
    if unknown := found - expected:
        raise UnsupportedModel(f"{path}: {where} has {_list(unknown)}, which its model family does not know")


def check_shapes(path: Path, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raise CorruptCheckpoint naming the first tensor whose shape contradicts the config."""
    for name, shape in expected.items():
        if found[name] != shape:
            raise CorruptCheckpoint(f"{path}: {name} has shape {found[name]}, the config says {shape}")


def _list(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _MOST_NAMED} more" if len(ordered) > _MOST_NAMED else ""
    return ", ".join(ordered[:_MOST_NAMED]) + more
