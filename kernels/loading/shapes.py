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

IGNORED: Final = (
    "rotary_emb.inv_freq",
    "attention.bias",
    "attention.masked_bias",
    "attn_rot_embd.weight",
    "rope_freqs.weight",
)
"""Endings of tensors that old converters stored although they follow from the config."""
_MOST_NAMED: Final = 4


def block_shapes(config: ModelConfig, index: int = 0) -> dict[str, Shape]:
    """Name inside a block -> shape, by our names: those of Llama, with experts one by one."""
    hidden = config.hidden_size
    norms = ["input_layernorm"] + ["post_attention_layernorm"] * (config.residual != "shared")
    if config.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    kinds = ("weight", "bias") if config.norm == "layer" else ("weight",)
    shapes: dict[str, Shape] = {f"{norm}.{kind}": (hidden,) for norm in norms for kind in kinds}
    return shapes | _attention_shapes(config) | _mlp_shapes(config, index)


def _attention_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    shapes: dict[str, Shape] = {}
    for name, width in (("q", queries), ("k", keys), ("v", keys)):
        shapes |= _matrix(f"self_attn.{name}_proj", width, hidden, config.qkv_bias)
    shapes |= _matrix("self_attn.o_proj", hidden, queries, config.output_bias)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    if config.sinks:
        shapes["self_attn.sinks"] = (config.num_heads,)
    return shapes


def _mlp_shapes(config: ModelConfig, index: int) -> dict[str, Shape]:
    hidden, experts = config.hidden_size, config.experts_of(index)
    if experts is None:
        return _mlp("mlp", hidden, config.intermediate_size, config.mlp_bias, config.gated)
    shapes = _matrix("mlp.router", experts.count, hidden, experts.bias)
    for number in range(experts.count):
        shapes |= _mlp(f"mlp.experts.{number}", hidden, experts.intermediate_size, experts.bias)
    if experts.shared_size:
        shapes |= _mlp("mlp.shared_expert", hidden, experts.shared_size, False)
        shapes |= _matrix("mlp.shared_expert_gate", 1, hidden, False)
    return shapes


def _mlp(name: str, hidden: int, inner: int, bias: bool, gated: bool = True) -> dict[str, Shape]:
    gate = _matrix(f"{name}.gate_proj", inner, hidden, bias) if gated else {}
    return gate | _matrix(f"{name}.up_proj", inner, hidden, bias) | _matrix(f"{name}.down_proj", hidden, inner, bias)


def _matrix(name: str, out_features: int, in_features: int, bias: bool) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (out_features, in_features)}
    return weight | ({f"{name}.bias": (out_features,)} if bias else {})


def norm_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The same for a norm outside the blocks."""
    kinds = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return {f"norm.{kind}": (config.hidden_size,) for kind in kinds}


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
