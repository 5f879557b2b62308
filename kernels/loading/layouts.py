"""How each family spells and fuses its tensors in Hugging Face files, and how they become ours.

Our names are Llama's, one matrix per tensor and one expert at a time (shapes.py). A layout says where the tables are,
which names differ, and which stored tensors hold several of ours: stacked rows, rows interleaved by KV group, or the
experts of a block in three dimensions. Nothing is copied that is only a range of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from ..models.config import ModelConfig
from .shapes import Shape, block_shapes

Split = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file and what it holds."""

    shape: Shape
    """What the config demands."""
    split: Split
    """The stored tensor -> ours, by our names."""


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

    def stored(self, config: ModelConfig, index: int) -> dict[str, Stored]:
        """Stored name inside a block -> what it is."""
        shapes = block_shapes(config, index)
        found: dict[str, Stored] = {}
        if self.fused_qkv:
            found |= self._qkv(config, shapes)
        if self.fused_gate_up and config.experts_of(index) is None:
            names = ("mlp.gate_proj", "mlp.up_proj")
            found |= _fused(self.fused_gate_up, names, shapes, _stack)
        if self.cubes and config.experts_of(index) is not None:
            found |= _cubes(config, shapes)
        for name, shape in shapes.items():
            found[self.rename(name)] = Stored(shape, _Renamed(name))
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
        return _fused(self.fused_qkv, names, shapes, _Groups(config) if self.by_group else _stack)


def layout_of(config: ModelConfig) -> Layout:
    """The layout of a config's family."""
    if config.family == "falcon" and config.residual == "parallel":
        return _FALCON_TWO_NORMS
    return _LAYOUTS.get(config.family, _LLAMA)


@dataclass(frozen=True, slots=True)
class _Renamed:
    name: str

    def __call__(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.name: tensor}


Cut = Callable[[torch.Tensor, list[int]], list[torch.Tensor]]
"""A fused tensor and the rows of its parts -> the parts."""


def _stack(tensor: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return list(torch.split(tensor, sizes))


@dataclass(frozen=True, slots=True)
class _Groups:
    """Rows by KV head: its queries, its key, its value."""

    config: ModelConfig

    def __call__(self, tensor: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        config = self.config
        group = config.num_heads // config.num_kv_heads
        grouped = tensor.reshape(config.num_kv_heads, group + 2, config.head_dim, *tensor.shape[1:])
        parts = grouped[:, :group], grouped[:, group], grouped[:, group + 1]
        return [part.reshape(size, *tensor.shape[1:]) for part, size in zip(parts, sizes, strict=True)]


def _fused(stem: str, names: tuple[str, ...], shapes: dict[str, Shape], cut: Cut) -> dict[str, Stored]:
    """One stored weight (and bias) for several of ours, which are taken out of `shapes`."""
    found = {}
    for kind in ("weight", "bias"):
        ours = [f"{name}.{kind}" for name in names if f"{name}.{kind}" in shapes]
        if not ours:
            continue
        parts = [shapes.pop(name) for name in ours]
        sizes = [part[0] for part in parts]

        def split(tensor: torch.Tensor, ours: list[str] = ours, sizes: list[int] = sizes) -> dict[str, torch.Tensor]:
            return dict(zip(ours, cut(tensor, sizes), strict=True))

        found[f"{stem}.{kind}"] = Stored((sum(sizes), *parts[0][1:]), split)
    return found


def _cubes(config: ModelConfig, shapes: dict[str, Shape]) -> dict[str, Stored]:
    """GPT-OSS: all experts of a block in four tensors."""
    experts = config.experts
    assert experts is not None
    for name in [name for name in shapes if name.startswith("mlp.experts.")]:
        del shapes[name]
    count, inner, hidden = experts.count, experts.intermediate_size, config.hidden_size

    def gate_up(kind: str) -> Split:
        def split(cube: torch.Tensor) -> dict[str, torch.Tensor]:
            columns = cube.transpose(1, -1) if kind == "weight" else cube  # [experts, 2 * inner, ...]
            gate = {f"mlp.experts.{number}.gate_proj.{kind}": columns[number, ::2] for number in range(count)}
            return gate | {f"mlp.experts.{number}.up_proj.{kind}": columns[number, 1::2] for number in range(count)}

        return split

    def down(kind: str) -> Split:
        def split(cube: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = cube.transpose(1, -1) if kind == "weight" else cube
            return {f"mlp.experts.{number}.down_proj.{kind}": rows[number] for number in range(count)}

        return split

    return {
        "mlp.experts.gate_up_proj": Stored((count, hidden, 2 * inner), gate_up("weight")),
        "mlp.experts.gate_up_proj_bias": Stored((count, 2 * inner), gate_up("bias")),
        "mlp.experts.down_proj": Stored((count, inner, hidden), down("weight")),
        "mlp.experts.down_proj_bias": Stored((count, hidden), down("bias")),
    }


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
