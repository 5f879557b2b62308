"""A model folder in Hugging Face layout: config.json, safetensors in one file or shards, tokenizer.json.

Of each shard only the header is read, and of its tensors only those asked for: a server of ten blocks touches the
pages of ten blocks. Stored in the compute dtype, tensors are views of the mapped file; otherwise they are cast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch

from ...protocol.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from ...protocol.manifest import MAX_FILE_BYTES, TEMPLATE_FILE, TOKENIZER_FILE, FileEntry, Manifest
from ..models.config import ModelConfig
from .layouts import LazyTensors, Take, layout_of
from .manifests import Hasher, Progress, by_name, cached_manifest
from .safetensors import SafetensorsFile, StoredTensor
from .shapes import Shape, check_names, check_shapes, norm_shapes, table_shape
from .store import Tensors

MAX_JSON_BYTES: Final = 64 * 1024 * 1024
MAX_SHARDS: Final = 4096
MANIFEST_VERSION: Final = 2
"""Raised when the same folder would give another manifest; it names the cache item."""
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"


class FolderCheckpoint:
    """See kernels/loading/checkpoint.py: Checkpoint."""

    head_kind: Final = "float"

    def __init__(self, folder: Path, name: str, cache_dir: Path, progress: Progress | None = None) -> None:
        self.name = name
        self.path = folder
        self._cache_dir = cache_dir
        self._progress = progress
        self.config, packed = _read_config(folder)
        self._layout = layout_of(self.config, packed)
        self._shard_of = _shards(folder)
        self._open: dict[str, SafetensorsFile] = {}
        self._prefix = self._find_prefix()
        self._blocks = self._group_blocks()

    @cached_property
    def manifest(self) -> Manifest:
        """Identity; the first access hashes every shard."""
        names = ("config.json", "generation_config.json", TOKENIZER_FILE, TEMPLATE_FILE, "tokenizer_config.json")
        texts = [path for name in names if (path := self.path / name).exists()]
        paths = [*texts, *(self.path / name for name in sorted(set(self._shard_of.values())))]
        for path in paths:
            if not path.exists():
                raise CorruptCheckpoint(f"{path}: is missing, and {INDEX} names it: the download may be incomplete")
        return cached_manifest(paths, self._cache_dir, MANIFEST_VERSION, self._build_manifest, self.name)

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

    def block(self, index: int, dtype: torch.dtype) -> LazyTensors:
        """The tensors of one block in `dtype`, each made when it is asked for."""
        if not 0 <= index < self.config.num_blocks:
            raise CorruptCheckpoint(f"{self.name} has {self.config.num_blocks} blocks, none is {index}")
        wanted = self._layout.stored(self.config, index)
        names = self._blocks.get(index, {})
        check_names(self.path, f"block {index}", wanted, names)
        self._check({names[name]: each.shape for name, each in wanted.items()})
        packed = {part for name, each in wanted.items() if each.companion for part in (name, each.companion)}
        stored = {name: self._stored(names[name], name in packed) for name in wanted}
        makers = {
            ours: partial(_cut, take, stored[name], stored.get(each.companion), dtype)
            for name, each in wanted.items()
            for ours, take in each.parts.items()
        }
        return LazyTensors(makers)

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
        names = [name for index in range(self.config.num_blocks) for name in self._blocks.get(index, {}).values()]
        head = {self._embedding_name}
        for stem in (self._layout.norm, self._layout.embedding_norm):
            head |= {self._norm_name(stem, name) for name in norm_shapes(self.config) if stem}
        head |= set() if self.config.tied_head else {self._head_name}
        entries = {name: self._entry(name) for name in (*names, *head) if name in self._shard_of}
        hasher = Hasher(sum(entry.end - entry.start for entry in entries.values()), self._progress)
        hashed = {
            name: hasher.entry(name, entry.dtype, entry.shape, self._shard(name).raw(name))
            for name, entry in entries.items()
        }
        return Manifest(
            name=self.name,
            config=self.config.to_json(),
            blocks=tuple(
                by_name(hashed[name] for name in self._blocks.get(index, {}).values())
                for index in range(self.config.num_blocks)
            ),
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


def _cut(take: Take, stored: torch.Tensor, companion: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """One of our tensors from a stored one: cut first, then cast."""
    return (take(stored) if companion is None else take(stored, companion)).to(dtype)


def _read_config(folder: Path) -> tuple[ModelConfig, bool]:
    """The config, and whether experts are stored in MXFP4."""
    path = folder / "config.json"
    if not path.exists():
        raise ModelNotFound(f"{folder} is no model folder: it has no config.json")
    values = _read_json(path)
    stored = values.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, Mapping) else None
    packed = values.get("model_type") == "gpt_oss" and method == "mxfp4"
    if stored and not packed:
        raise UnsupportedModel(
            f"{folder}: stored with its own quantization: use the unquantized checkpoint or a GGUF; "
            "--quant quantizes while loading"
        )
    config = ModelConfig.from_hf(values)
    generation = folder / "generation_config.json"
    ends = _read_json(generation).get("eos_token_id") if generation.exists() else None
    ids = [ends] if isinstance(ends, int) else ends
    if isinstance(ids, list) and ids and all(type(item) is int for item in ids):
        return config.with_eos(tuple(ids)), packed
    return config, packed


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
