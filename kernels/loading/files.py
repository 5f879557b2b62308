"""The files of a model folder in Hugging Face layout: config.json, safetensors in one file or shards, tokenizer.json.

Of each shard only the header is read, and of its tensors only those asked for: a server of ten blocks touches the
pages of ten blocks. What the tensors mean is the business of folder.py and foreign.py.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ...protocol.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from ...protocol.manifest import MAX_FILE_BYTES, TEMPLATE_FILE, TOKENIZER_FILE, FileEntry, Manifest
from ..models.config import ModelConfig
from .manifests import Hasher, Progress, by_name, cached_manifest
from .safetensors import SafetensorsFile, StoredTensor

MAX_JSON_BYTES: Final = 64 * 1024 * 1024
MAX_SHARDS: Final = 4096
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"


class Folder(ABC):
    """What every checkpoint in a folder has: texts, shards, a manifest."""

    head_kind: Final = "float"
    version: int
    """Raised when the same folder would give another manifest; it names the cache item."""

    def __init__(self, folder: Path, name: str, cache_dir: Path, progress: Progress | None = None) -> None:
        self.name = name
        self.path = folder
        self._cache_dir = cache_dir
        self._progress = progress
        self._shard_of = _shards(folder)
        self._open: dict[str, SafetensorsFile] = {}

    @cached_property
    def manifest(self) -> Manifest:
        """Identity; the first access hashes every shard."""
        names = ("config.json", "generation_config.json", TOKENIZER_FILE, TEMPLATE_FILE, "tokenizer_config.json")
        texts = [path for name in names if (path := self.path / name).exists()]
        paths = [*texts, *(self.path / name for name in sorted(set(self._shard_of.values())))]
        for path in paths:
            if not path.exists():
                raise CorruptCheckpoint(f"{path}: is missing, and {INDEX} names it: the download may be incomplete")
        return cached_manifest(paths, self._cache_dir, self.version, self._build_manifest, self.name)

    @property
    def tokenizer(self) -> bytes:
        """tokenizer.json. Raises UnsupportedModel when there is none."""
        path = self.path / TOKENIZER_FILE
        if not path.exists():
            raise UnsupportedModel(
                f"{self.path}: has no tokenizer.json: save the model's fast tokenizer into it (save_pretrained)"
            )
        return _read(path, MAX_FILE_BYTES)

    @cached_property
    def chat_template(self) -> str | None:
        """From chat_template.jinja, else from tokenizer_config.json (its `default` one where it has several)."""
        path = self.path / TEMPLATE_FILE
        if path.exists():
            return _read(path, MAX_JSON_BYTES).decode(errors="replace")
        config = self.path / "tokenizer_config.json"
        template = _read_json(config).get("chat_template") if config.exists() else None
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def _shard(self, name: str) -> SafetensorsFile:
        shard = self._shard_of[name]
        if shard not in self._open:
            self._open[shard] = SafetensorsFile(self.path / shard)
        return self._open[shard]

    def _entry(self, name: str) -> StoredTensor:
        shard = self._shard(name)
        if name not in shard.tensors:
            raise CorruptCheckpoint(f"{shard.path}: lacks {name}, which {INDEX} says is in it")
        return shard.tensors[name]

    @abstractmethod
    def _build_manifest(self) -> Manifest: ...

    def _manifest_of(self, config: ModelConfig, blocks: Sequence[Iterable[str]], head: Iterable[str]) -> Manifest:
        """The manifest over these stored names."""
        names = [name for block in (*blocks, head) for name in block]
        entries = {name: self._entry(name) for name in names if name in self._shard_of}
        hasher = Hasher(sum(entry.end - entry.start for entry in entries.values()), self._progress)
        hashed = {
            name: hasher.entry(name, entry.dtype, entry.shape, self._shard(name).raw(name))
            for name, entry in entries.items()
        }
        return Manifest(
            name=self.name,
            config=config.to_json(),
            blocks=tuple(by_name(hashed[name] for name in block) for block in blocks),
            head=by_name(hashed[name] for name in head if name in hashed),
            files=tuple(FileEntry.pack(name, data) for name, data in sorted(self._text_files().items())),
        )

    def _text_files(self) -> dict[str, bytes]:
        files = {}
        if (self.path / TOKENIZER_FILE).exists():
            files[TOKENIZER_FILE] = self.tokenizer
        if self.chat_template is not None:
            files[TEMPLATE_FILE] = self.chat_template.encode()
        return files


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json. Raises ModelNotFound where there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelNotFound(f"{folder} is no model folder: it has no config.json")
    return _read_json(path)


def refuse_quantized(folder: Path) -> UnsupportedModel:
    """What to say of a checkpoint that is stored in numbers of another library."""
    return UnsupportedModel(
        f"{folder}: stored with its own quantization: use the unquantized checkpoint or a GGUF; "
        "--quant quantizes while loading"
    )


def with_ends(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the end tokens of generation_config.json, which knows more of them than config.json."""
    generation = folder / "generation_config.json"
    ends = _read_json(generation).get("eos_token_id") if generation.exists() else None
    ids = [ends] if isinstance(ends, int) else ends
    if isinstance(ids, list) and ids and all(type(item) is int for item in ids):
        return config.with_eos(tuple(ids))
    return config


def _shards(folder: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index = folder / INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise CorruptCheckpoint(f"{index}: has no weight_map")
        files = {str(file) for file in weight_map.values()}
        if len(files) > MAX_SHARDS or any(Path(file).name != file for file in files):
            raise CorruptCheckpoint(f"{index}: names files that are not in the folder, or over {MAX_SHARDS}")
        return {str(name): str(file) for name, file in weight_map.items()}
    if (folder / SINGLE).exists():
        return dict.fromkeys(SafetensorsFile(folder / SINGLE).tensors, SINGLE)
    pickles = any(folder.glob("pytorch_model*.bin"))
    raise ModelNotFound(
        f"{folder} has no {SINGLE} or {INDEX}"
        + (": its pickled weights are never read, convert them to safetensors" if pickles else "")
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as exc:
        raise CorruptCheckpoint(f"{path}: is not JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise CorruptCheckpoint(f"{path}: is not a JSON map")
    return values


def _read(path: Path, limit: int) -> bytes:
    try:
        if path.stat().st_size > limit:
            raise CorruptCheckpoint(f"{path}: is larger than {limit} bytes")
        return path.read_bytes()
    except OSError as exc:
        raise CorruptCheckpoint(f"{path}: cannot be read: {exc}") from exc
