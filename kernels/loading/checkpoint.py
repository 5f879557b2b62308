"""Opening a model by whatever name the user has for it: one protocol over every checkpoint format.

A source is, in this order: the built-in name, a folder in Hugging Face layout, a .gguf file, a Hugging Face repository
id. Opening reads headers and texts only; weights are read when a block is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import torch

from ...protocol.errors import ConfigError, ModelNotFound, UnsupportedModel
from ...protocol.manifest import Manifest
from ..models.config import ModelConfig
from .manifests import Progress
from .store import Tensors

_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class Checkpoint(Protocol):
    """A whole model on this machine. Reading raises CorruptCheckpoint, UnsupportedModel naming file and cause."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""

    @property
    def manifest(self) -> Manifest:
        """Identity. The first access hashes the whole checkpoint; later ones, in any process, read the cache."""

    @property
    def tokenizer(self) -> bytes:
        """tokenizer.json. Raises UnsupportedModel when the checkpoint has none."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source, None when the model has no chat template."""

    @property
    def head_kind(self) -> str:
        """`q8_0` when head_q8() is there, else `float`."""

    def block(self, index: int, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        """One block's tensors in `dtype`, by our names (shapes.py); only these are read."""

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        """The embedding matrix [vocab, hidden]."""

    def embedding_norm(self, dtype: torch.dtype) -> Tensors:
        """`norm.weight` and `norm.bias` of the norm after the embedding, in the families that have one."""

    def head(self, dtype: torch.dtype) -> Tensors:
        """The final norm and `lm_head.weight`, which is the embedding itself where the model ties them."""

    def final_norm(self, dtype: torch.dtype) -> Tensors:
        """`norm.weight` (and `norm.bias`) alone, for a head that stays in 8 bits."""

    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The LM head as stored: int8 [vocab, hidden], float16 scales [vocab, hidden / 32]. Needs head_kind q8_0."""


def open_checkpoint(source: str | Path, *, cache_dir: Path, progress: Progress | None = None) -> Checkpoint:
    """Open a model. `cache_dir` holds what is made from checkpoints; several processes may share it.

    Raises ModelNotFound when `source` is no model, UnsupportedModel, CorruptCheckpoint.
    """
    from .builtin import BUILTIN, builtin_file  # imported when used: each needs another library

    if str(source) == BUILTIN:
        return _gguf(builtin_file(cache_dir), BUILTIN, cache_dir, progress)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, path.resolve().name, cache_dir, progress)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _gguf(path, path.stem, cache_dir, progress)
        raise ModelNotFound(f"{path} is no model file: give a .gguf file, or the folder that holds config.json")
    if isinstance(source, str) and _REPOSITORY.fullmatch(source):
        from .hub import fetch_repository

        return _folder(fetch_repository(source), source, cache_dir, progress)
    raise ModelNotFound(
        f"{str(source)!r} is no model: give a folder with config.json and .safetensors files, a .gguf file, "
        f"a Hugging Face repository id (owner/name), or {BUILTIN}"
    )


def _gguf(path: Path, name: str, cache_dir: Path, progress: Progress | None) -> Checkpoint:
    from .gguf import GgufCheckpoint

    return GgufCheckpoint(path, name, cache_dir, progress)


def _folder(path: Path, name: str, cache_dir: Path, progress: Progress | None) -> Checkpoint:
    """A folder of any family: ours if we know the variation, else transformers'."""
    from .files import read_settings
    from .folder import FolderCheckpoint

    try:
        ModelConfig.from_hf(read_settings(path))
    except UnsupportedModel as exc:
        ours = exc
    else:
        return FolderCheckpoint(path, name, cache_dir, progress)
    from .foreign import ForeignFolder  # transformers is loaded here, where it is installed

    try:
        return ForeignFolder(path, name, cache_dir, progress)
    except (ConfigError, UnsupportedModel) as exc:
        raise type(exc)(f"{ours}; {exc}") from exc
