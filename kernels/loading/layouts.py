"""How each family spells and fuses its tensors in Hugging Face files, and how they become ours.

Our names are Llama's, one matrix per tensor and one expert at a time (shapes.py). A layout says where the tables are,
which names differ, and which stored tensors hold several of ours: stacked rows, rows interleaved by KV group, or the
experts of a block in three dimensions. Nothing is copied that is only a range of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch

from ..models.config import ModelConfig
from .mxfp4 import MX_BLOCK, mxfp4_rows
from .shapes import Shape, block_shapes


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors made when asked for, each time: a block's experts are never in memory all at once."""

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


Take = Callable[..., torch.Tensor]
"""The stored tensor (and its companion) -> one of ours, a view wherever possible."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file and what it holds."""

    shape: Shape
    """What the config demands."""
    parts: Mapping[str, Take]
    """Our name -> how it is taken from the stored tensor."""
    companion: str = ""
    """Stored name of a second tensor that the parts need: the scales of packed numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names of one family. Stems are names without .weight and .bias."""

    blocks: str = "layers"
    """What stands before a block's number."""
    embedding: str = "embed_tokens"
    """Stem of the embedding, inside the model."""
    embedding_norm: str = ""
    """Stem of the norm after it."""
    norm: str = "norm"
    """Stem of the final norm, inside the model."""
    head: str = "lm_head"
    """Stem of the head, outside the model."""
    stems: Mapping[str, str] = field(default_factory=dict)
    """Our stems -> theirs, where they differ; `experts.*.` stands for any expert."""
    fused_qkv: str = ""
    """Stem of queries, keys and values in one, if they are."""
    by_group: bool = False
    """Its rows are: for every KV head its queries, key, value. Otherwise all queries, all keys, all values."""
    fused_gate_up: str = ""
    """Stem of gate and up in one, stacked."""
    cubes: bool = False
    """Experts are three-dimensional, [expert, in, out], with gate and up in alternating columns (GPT-OSS)."""
    stacked: Mapping[str, str] = field(default_factory=dict)
    """Experts are in cubes [expert, out, in]: part of an expert -> stem of its cube (GGUF)."""
    packed: bool = False
    """They are stored in MXFP4, [expert, out, in / 32, 16 bytes], with a scale for every 32 values."""

    def stored(self, config: ModelConfig, index: int) -> dict[str, Stored]:
        """Stored name inside a block -> what it is."""
        shapes = block_shapes(config, index)
        found: dict[str, Stored] = {}
        if self.fused_qkv:
            found |= self._qkv(config, shapes)
        if self.fused_gate_up and config.experts_of(index) is None:
            names = ("mlp.gate_proj", "mlp.up_proj")
            found |= _fused(self.fused_gate_up, names, shapes, _rows)
        if self.cubes and config.experts_of(index) is not None:
            found |= _cubes(config, shapes, self.packed)
        if self.stacked and config.experts_of(index) is not None:
            found |= _stacked(config, shapes, self.stacked)
        for name, shape in shapes.items():
            found[self.rename(name)] = Stored(shape, {name: _whole})
        return found

    def rename(self, name: str) -> str:
        """Our name inside a block -> theirs."""
        stem, dot, kind = name.rpartition(".")
        first, middle, rest = stem.partition("experts.")
        number, _, part = rest.partition(".")
        if middle and number.isdigit():
            theirs = self.stems.get(f"{first}experts.*.{part}", f"{first}experts.*.{part}")
            return theirs.replace("*", number) + dot + kind
        return self.stems.get(stem, stem) + dot + kind

    def _qkv(self, config: ModelConfig, shapes: dict[str, Shape]) -> dict[str, Stored]:
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return _fused(self.fused_qkv, names, shapes, partial(_group, config) if self.by_group else _rows)


def layout_of(config: ModelConfig, packed: bool = False) -> Layout:
    """The layout of a config's family; `packed`: experts are stored in MXFP4."""
    if packed:
        return replace(_LAYOUTS["gpt_oss"], packed=True)
    if config.family == "falcon" and config.residual == "parallel":
        return _FALCON_TWO_NORMS
    return _LAYOUTS.get(config.family, _LLAMA)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


Cut = Callable[[int, int, int, torch.Tensor], torch.Tensor]
"""Number of a part, its first row and its rows in the fused tensor, the fused tensor -> the part."""


def _rows(_number: int, first: int, count: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[first : first + count]


def _group(config: ModelConfig, number: int, _first: int, count: int, tensor: torch.Tensor) -> torch.Tensor:
    """Rows by KV head: its queries, its key, its value."""
    group = config.num_heads // config.num_kv_heads
    grouped = tensor.reshape(config.num_kv_heads, group + 2, config.head_dim, *tensor.shape[1:])
    part = grouped[:, :group] if number == 0 else grouped[:, group + number - 1]
    return part.reshape(count, *tensor.shape[1:])


def _fused(stem: str, names: tuple[str, ...], shapes: dict[str, Shape], cut: Cut) -> dict[str, Stored]:
    """One stored weight (and bias) for several of ours, which are taken out of `shapes`."""
    found = {}
    for kind in ("weight", "bias"):
        ours = {name: shapes.pop(name) for name in (f"{stem}.{kind}" for stem in names) if name in shapes}
        if not ours:
            continue
        parts: dict[str, Take] = {}
        first = 0
        for number, (name, shape) in enumerate(ours.items()):
            parts[name] = partial(cut, number, first, shape[0])
            first += shape[0]
        found[f"{stem}.{kind}"] = Stored((first, *next(iter(ours.values()))[1:]), parts)
    return found


def _cubes(config: ModelConfig, shapes: dict[str, Shape], packed: bool) -> dict[str, Stored]:
    """GPT-OSS: all experts of a block in four tensors, or six where numbers are packed."""
    experts = config.experts
    assert experts is not None
    for name in [name for name in shapes if name.startswith("mlp.experts.")]:
        del shapes[name]
    count, inner, hidden = experts.count, experts.intermediate_size, config.hidden_size
    found: dict[str, Stored] = {}
    for stem, out_features, in_features in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        rows = {"down_proj": slice(None)} if stem == "down_proj" else rows
        take = mxfp4_rows if packed else _columns
        weights: dict[str, Take] = {}
        biases: dict[str, Take] = {}
        for number in range(count):
            for part, which in rows.items():
                weights[f"mlp.experts.{number}.{part}.weight"] = partial(take, number, which)
                biases[f"mlp.experts.{number}.{part}.bias"] = partial(_bias, number, which)
        name = f"mlp.experts.{stem}"
        if packed:
            blocks = in_features // MX_BLOCK
            found[f"{name}_blocks"] = Stored((count, out_features, blocks, MX_BLOCK // 2), weights, f"{name}_scales")
            found[f"{name}_scales"] = Stored((count, out_features, blocks), {})
        else:
            found[name] = Stored((count, in_features, out_features), weights)
        found[f"{name}_bias"] = Stored((count, out_features), biases)
    return found


def _stacked(config: ModelConfig, shapes: dict[str, Shape], stems: Mapping[str, str]) -> dict[str, Stored]:
    """One cube for each matrix of all experts of a block."""
    experts = config.experts
    assert experts is not None
    found: dict[str, Stored] = {}
    for part, stem in stems.items():
        names = [f"mlp.experts.{number}.{part}.weight" for number in range(experts.count)]
        planes = [shapes.pop(name) for name in names]
        found[f"{stem}.weight"] = Stored(
            (experts.count, *planes[0]), {name: partial(_plane, number) for number, name in enumerate(names)}
        )
    return found


def _plane(number: int, cube: torch.Tensor) -> torch.Tensor:
    return cube[number]


def _columns(number: int, which: slice, cube: torch.Tensor) -> torch.Tensor:
    return cube[number].T[which]


def _bias(number: int, which: slice, biases: torch.Tensor) -> torch.Tensor:
    return biases[number, which]


_LLAMA: Final = Layout()
_PLAIN_MLP: Final = {"mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"}
_BLOOM_LIKE: Final = {"self_attn.o_proj": "self_attention.dense", **_PLAIN_MLP}
_TWO_NORMS: Final = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


def _bloom_like(stems: Mapping[str, str], *, by_group: bool, embedding_norm: str = "") -> Layout:
    return Layout(
        blocks="h",
        embedding="word_embeddings",
        embedding_norm=embedding_norm,
        norm="ln_f",
        stems=stems,
        fused_qkv="self_attention.query_key_value",
        by_group=by_group,
    )


_FALCON_TWO_NORMS: Final = _bloom_like({**_BLOOM_LIKE, **_TWO_NORMS}, by_group=True)

_LAYOUTS: Final = {
    "phi3": Layout(fused_qkv="self_attn.qkv_proj", fused_gate_up="mlp.gate_up_proj"),
    "mixtral": Layout(
        stems={
            "mlp.router": "block_sparse_moe.gate",
            "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
            "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
            "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
        }
    ),
    "qwen2_moe": Layout(stems={"mlp.router": "mlp.gate"}),
    "qwen3_moe": Layout(stems={"mlp.router": "mlp.gate"}),
    "starcoder2": Layout(stems={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    "gpt_oss": Layout(cubes=True),
    "falcon": _bloom_like(_BLOOM_LIKE, by_group=True),  # with one KV head that is stacked
    "bloom": _bloom_like(_BLOOM_LIKE, by_group=True, embedding_norm="word_embeddings_layernorm"),
    "gpt_neox": Layout(
        embedding="embed_in",
        norm="final_layer_norm",
        head="embed_out",
        stems={"self_attn.o_proj": "attention.dense", **_PLAIN_MLP},
        fused_qkv="attention.query_key_value",
        by_group=True,
    ),
}
