"""A model folder of a family of ours: stored tensors under our names.

Stored in the compute dtype, tensors are views of the mapped file; otherwise they are cast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from ...protocol.manifest import Manifest
from ..models.config import ModelConfig
from .files import Folder, read_settings, refuse_quantized, with_ends
from .layouts import LazyTensors, Take, layout_of
from .manifests import Progress
from .shapes import Shape, check_names, check_shapes, norm_shapes, table_shape
from .store import Tensors


class FolderCheckpoint(Folder):
    """See kernels/loading/checkpoint.py: Checkpoint."""

    version = 2

    def __init__(self, folder: Path, name: str, cache_dir: Path, progress: Progress | None = None) -> None:
        self.config, packed = _read_config(folder)
        super().__init__(folder, name, cache_dir, progress)
        self._layout = layout_of(self.config, packed)
        self._prefix = self._find_prefix()
        self._blocks = self._group_blocks()

    def block(self, index: int, dtype: torch.dtype) -> LazyTensors:
        """The tensors of one block in `dtype`, each made when it is asked for."""
        if not 0 <= index < self.config.num_blocks:
            raise CorruptCheckpoint(f"{self.name} has {self.config.num_blocks} blocks, none is {index}")
        wanted = self._layout.stored(self.config, index)
        names = self._blocks.get(index, {})
        check_names(self.path, f"block {index}", wanted, names)
        self._check({names[name]: each.shape for name, each in wanted.items()})
        packed = {part for name, each in wanted.items() if each.companion for part in (name, each.companion)}
        for name in wanted:
            self._stored(names[name], name in packed)  # its type is checked now, and the view let go
        makers = {
            ours: partial(self._made, take, names[name], names.get(each.companion), dtype)
            for name, each in wanted.items()
            for ours, take in each.parts.items()
        }
        return LazyTensors(makers)

    def _made(self, take: Take, name: str, companion: str | None, dtype: torch.dtype) -> torch.Tensor:
        """One of our tensors: the file is mapped only while somebody holds one that is a view of it."""
        if companion is None:
            return take(self._stored(name, False)).to(dtype)
        return take(self._stored(name, True), self._stored(companion, True)).to(dtype)

    def _stored(self, name: str, packed: bool) -> torch.Tensor:
        """A view of the mapped file."""
        return self._shard(name).bytes(name) if packed else self._shard(name).tensor(name)

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        """The embedding matrix [vocab, hidden] in `dtype`."""
        return self._read_tensors({"weight": (self._embedding_name, table_shape(self.config))}, dtype)["weight"]

    def embedding_norm(self, dtype: torch.dtype) -> Tensors:
        """`norm.weight` and `norm.bias` of the norm after the embedding, where the family has one."""
        return self._read_norm(self._layout.embedding_norm, dtype)

    def head(self, dtype: torch.dtype) -> Tensors:
        """`norm.weight`, its bias if it has one, and `lm_head.weight` in `dtype`."""
        if self.config.tied_head:
            return {**self.final_norm(dtype), "lm_head.weight": self.embedding(dtype)}
        wanted = {"lm_head.weight": (self._head_name, table_shape(self.config))}
        return {**self.final_norm(dtype), **self._read_tensors(wanted, dtype)}

    def final_norm(self, dtype: torch.dtype) -> Tensors:
        """`norm.weight`, and `norm.bias` where norms have one."""
        return self._read_norm(self._layout.norm, dtype)

    def _read_norm(self, stem: str, dtype: torch.dtype) -> Tensors:
        shapes = norm_shapes(self.config)
        return self._read_tensors({name: (self._norm_name(stem, name), shape) for name, shape in shapes.items()}, dtype)

    def _norm_name(self, stem: str, name: str) -> str:
        return f"{self._prefix}{stem}.{name.removeprefix('norm.')}"

    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Never there: safetensors checkpoints hold floats. Raises UnsupportedModel."""
        raise UnsupportedModel(f"{self.path}: the LM head is not stored as Q8_0")

    @property
    def _embedding_name(self) -> str:
        return f"{self._prefix}{self._layout.embedding}.weight"

    @property
    def _head_name(self) -> str:
        """The head stands outside `model.`, or beside it in checkpoints with a vision part."""
        name = f"{self._layout.head}.weight"
        return next((stored for stored in self._shard_of if stored.endswith(name)), name)

    def _read_tensors(self, wanted: Mapping[str, tuple[str, Shape]], dtype: torch.dtype) -> Tensors:
        """Our name -> (stored name, shape the config demands)."""
        self._check(dict(wanted.values()))
        return {name: self._shard(stored).tensor(stored).to(dtype) for name, (stored, _) in wanted.items()}

    def _check(self, shapes: Mapping[str, Shape]) -> None:
        """Raise unless the stored tensors are there in these shapes."""
        for stored in shapes:
            if stored not in self._shard_of:
                raise CorruptCheckpoint(f"{self.path}: lacks {stored}: the download may be incomplete")
        check_shapes(self.path, shapes, {stored: self._entry(stored).shape for stored in shapes})

    def _find_prefix(self) -> str:
        """What stands before block 0: `model.`, or `language_model.model.` in checkpoints with a vision part."""
        first = f"{self._layout.blocks}.0.{self._layout.rename('input_layernorm.weight')}"
        for name in self._shard_of:
            if name.endswith(first) and "vision" not in name:
                return name.removesuffix(first)
        raise CorruptCheckpoint(f"{self.path}: has no tensor {first}: block 0 is missing")

    def _group_blocks(self) -> dict[int, dict[str, str]]:
        """Block -> name inside the block -> stored name."""
        blocks: dict[int, dict[str, str]] = {}
        pattern = re.compile(re.escape(f"{self._prefix}{self._layout.blocks}.") + r"(\d{1,6})\.(.+)")
        for name in self._shard_of:
            if found := pattern.fullmatch(name):
                blocks.setdefault(int(found[1]), {})[found[2]] = name
        if beyond := [index for index in blocks if index >= self.config.num_blocks]:
            raise CorruptCheckpoint(
                f"{self.path}: has a block {max(beyond)}, but config.json says {self.config.num_blocks} blocks"
            )
        return blocks

    def _build_manifest(self) -> Manifest:
        head = {self._embedding_name}
        for stem in (self._layout.norm, self._layout.embedding_norm):
            head |= {self._norm_name(stem, name) for name in norm_shapes(self.config) if stem}
        head |= set() if self.config.tied_head else {self._head_name}
        blocks = [list(self._blocks.get(index, {}).values()) for index in range(self.config.num_blocks)]
        return self._manifest_of(self.config, blocks, head)


def _read_config(folder: Path) -> tuple[ModelConfig, bool]:
    """The config, and whether experts are stored in MXFP4."""
    values = read_settings(folder)
    stored = values.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, Mapping) else None
    packed = values.get("model_type") == "gpt_oss" and method == "mxfp4"
    if stored and not packed:
        raise refuse_quantized(folder)
    return with_ends(ModelConfig.from_hf(values), folder), packed
