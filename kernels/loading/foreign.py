"""A model folder of a family that is not ours: tensors by their stored names, for transformers' own layers.

Only names are sorted here, into those of each block and the others; what they mean is known to transformers. The files
are read by the same code as all others: safetensors alone, never pickles, and of each shard only what is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import torch

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from ...protocol.manifest import Manifest
from ..fallback_skeleton import Skeleton
from ..models.foreign import read_foreign, settings_of, with_cache
from .files import Folder, read_settings, refuse_quantized, with_ends
from .layouts import LazyTensors
from .manifests import Progress
from .store import Tensors

_LONGEST_NUMBER: Final = 6


class ForeignFolder(Folder):
    """See kernels/loading/checkpoint.py: Checkpoint. Raises ConfigError where transformers is not installed."""

    version = 1

    def __init__(self, folder: Path, name: str, cache_dir: Path, progress: Progress | None = None) -> None:
        values = read_settings(folder)
        if values.get("quantization_config"):
            raise refuse_quantized(folder)
        self.settings = settings_of(values)
        skeleton = Skeleton(self.settings)
        super().__init__(folder, name, cache_dir, progress)
        self._blocks, self.others = self._sorted_names(skeleton)
        weights = max(sum(math.prod(self._entry(name).shape) for name in names) for names in self._blocks)
        self._identity = with_ends(read_foreign(self.settings, skeleton, weights), folder)
        self.config = with_cache(self._identity, skeleton)

    def _sorted_names(self, skeleton: Skeleton) -> tuple[list[list[str]], list[str]]:
        """Stored names of each block, and of everything outside the blocks."""
        stem = skeleton.path.rpartition(".")[2]
        pattern = re.compile(rf"(?:.*?\.)??{re.escape(stem)}\.(\d{{1,{_LONGEST_NUMBER}}})\..+")
        blocks: list[list[str]] = [[] for _ in skeleton.layers]
        others: list[str] = []
        for name in sorted(self._shard_of):
            found = pattern.fullmatch(name)
            if found and int(found[1]) >= len(blocks):
                raise CorruptCheckpoint(f"{self.path}: {name} is beyond the {len(blocks)} blocks of config.json")
            (blocks[int(found[1])] if found else others).append(name)
        if missing := [index for index, names in enumerate(blocks) if not names]:
            raise CorruptCheckpoint(
                f"{self.path}: has no tensors of block {missing[0]}: the download may be incomplete"
            )
        return blocks, others

    def stored(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors as stored, views of the mapped files. Raises UnsupportedModel, CorruptCheckpoint."""
        found = {}
        for name in names:
            self._entry(name)
            found[name] = self._shard(name).tensor(name)
        return found

    def block_names(self, index: int) -> list[str]:
        """Stored names of a block's tensors."""
        return self._blocks[index]

    def block(self, index: int, dtype: torch.dtype) -> LazyTensors:
        """The tensors of one block by their stored names, each made when it is asked for."""
        return LazyTensors({name: partial(self._cast, name, dtype) for name in self._blocks[index]})

    def _cast(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self.stored([name])[name].to(dtype)

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        """Not known by our names. Raises UnsupportedModel, as do the next four."""
        self._unnamed()

    def embedding_norm(self, dtype: torch.dtype) -> Tensors:
        self._unnamed()

    def head(self, dtype: torch.dtype) -> Tensors:
        self._unnamed()

    def final_norm(self, dtype: torch.dtype) -> Tensors:
        self._unnamed()

    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._unnamed()

    def _unnamed(self) -> NoReturn:
        raise UnsupportedModel(f"{self.path}: only transformers knows the tensors outside the blocks of this family")

    def _build_manifest(self) -> Manifest:
        return self._manifest_of(self._identity, self._blocks, self.others)
