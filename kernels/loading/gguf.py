"""A model in a .gguf file, served as if it were a Hugging Face checkpoint.

Weights are dequantized block by block, when first asked for, and kept in the cache in the compute dtype: a server pays
for its own span only, and its second start maps what the first one made. The stored bytes of every tensor are checked
against the manifest on the way, so what was hashed is what is computed with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from ...protocol.manifest import TEMPLATE_FILE, TOKENIZER_FILE, FileEntry, Manifest, TensorEntry
from . import gguf_model
from .dequantize import dequantize, split_q8
from .gguf_file import GgufFile, GgufTensor
from .manifests import Hasher, Progress, by_name, cached_manifest
from .shapes import Shape, check_names, check_shapes, norm_shapes, table_shape
from .store import Store, Tensors
from .vocabulary import TABLES, tokenizer_json

CONVERSION: Final = 1
"""Raised when the same file would be converted to other numbers or another tokenizer; it names the cache items."""
_BLOCK_NAME: Final = re.compile(r"blk\.(\d{1,6})\.")


class _Stored(NamedTuple):
    entry: GgufTensor
    raw: NDArray[np.uint8]


class GgufCheckpoint:
    """See kernels/loading/checkpoint.py: Checkpoint."""

    def __init__(self, path: Path, name: str, cache_dir: Path, progress: Progress | None = None) -> None:
        self.name = name
        self.path = path
        self._file = GgufFile(path)
        self.config = gguf_model.model_config(self._file)
        self._layout = gguf_model.architecture_of(self._file).layout(self.config, self._file.tensors)
        self._check_tables()
        self.manifest = cached_manifest([path], cache_dir, CONVERSION, lambda: self._build_manifest(progress), name)
        self._file.forget(*TABLES)
        self._store = Store(cache_dir / "weights" / f"{self.manifest.digest.hex()[:32]}-{CONVERSION}")
        self._entries = {entry.name: entry for leaf in (*self.manifest.blocks, self.manifest.head) for entry in leaf}

    @property
    def tokenizer(self) -> bytes:
        """tokenizer.json, converted from the file's vocabulary."""
        if not self.manifest.has_file(TOKENIZER_FILE):
            raise UnsupportedModel(f"{self.path}: has no vocabulary: use a GGUF made from a whole model")
        return self.manifest.file(TOKENIZER_FILE)

    @property
    def chat_template(self) -> str | None:
        """The file's Jinja chat template, if it has one."""
        if not self.manifest.has_file(TEMPLATE_FILE):
            return None
        return self.manifest.file(TEMPLATE_FILE).decode()

    @property
    def head_kind(self) -> str:
        """`q8_0` when head_q8() gives the stored 8-bit numbers of the LM head, else `float`."""
        return "q8_0" if self._file.tensors[self._head_name].kind == "Q8_0" else "float"

    def block(self, index: int, dtype: torch.dtype) -> Tensors:
        """The tensors of one block in `dtype`, named as inside a Hugging Face block."""
        if not 0 <= index < self.config.num_blocks:
            raise CorruptCheckpoint(f"{self.name} has {self.config.num_blocks} blocks, none is {index}")
        key = f"block-{index:04d}.{str(dtype).removeprefix('torch.')}"
        return self._store.tensors(key, lambda: self._make_block(index, dtype))

    def _make_block(self, index: int, dtype: torch.dtype) -> Tensors:
        prefix = f"blk.{index}."
        wanted = {prefix + name: each for name, each in self._layout.stored(self.config, index).items()}
        check_names(self.path, f"block {index}", wanted, [n for n in self._file.tensors if n.startswith(prefix)])
        shapes = {name: each.shape for name, each in wanted.items()}
        check_shapes(self.path, shapes, {name: _squared(self._file.tensors[name], shapes[name]) for name in wanted})
        made = {}
        for name, each in wanted.items():
            values = self._dequantized(name, dtype).reshape(each.shape)
            for ours, take in each.parts.items():
                made[ours] = self._converted(take(values), ours, dtype)
        return made

    def embedding(self, dtype: torch.dtype) -> torch.Tensor:
        """The embedding matrix [vocab, hidden] in `dtype`."""
        return self._named("embedding", dtype, {"weight": gguf_model.EMBEDDING})["weight"]

    def embedding_norm(self, dtype: torch.dtype) -> Tensors:
        """`norm.weight` and `norm.bias` of the norm after the embedding, where the family has one."""
        return self._named("embedding-norm", dtype, self._norm_names(self._layout.embedding_norm))

    def head(self, dtype: torch.dtype) -> Tensors:
        """The final norm and `lm_head.weight` in `dtype`."""
        if self.config.tied_head:
            return {**self.final_norm(dtype), "lm_head.weight": self.embedding(dtype)}
        head = self._named("head", dtype, {"lm_head.weight": gguf_model.OUTPUT})
        return {**self.final_norm(dtype), **head}

    def final_norm(self, dtype: torch.dtype) -> Tensors:
        """`norm.weight`, and `norm.bias` where norms have one."""
        return self._named("norm", dtype, self._norm_names(gguf_model.OUTPUT_NORM))

    def _norm_names(self, stem: str) -> dict[str, str]:
        """Our name of each tensor of a norm -> the file's."""
        return {name: f"{stem}.{name.removeprefix('norm.')}" for name in norm_shapes(self.config)}

    def head_q8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The LM head as stored: int8 [vocab, hidden] and float16 scales [vocab, hidden / 32]. Needs head_kind q8_0."""
        if self.head_kind != "q8_0":
            raise UnsupportedModel(f"{self.path}: the LM head is not stored as Q8_0")

        def make() -> Tensors:
            values, scales = split_q8(self._checked(self._head_name).raw, table_shape(self.config))
            return {"values": values, "scales": scales}

        tensors = self._store.tensors("head.q8_0", make)
        return tensors["values"], tensors["scales"]

    @property
    def _head_name(self) -> str:
        return gguf_model.EMBEDDING if self.config.tied_head else gguf_model.OUTPUT

    def _check_tables(self) -> None:
        norms = [gguf_model.OUTPUT_NORM, *([self._layout.embedding_norm] if self._layout.embedding_norm else [])]
        table = table_shape(self.config)
        expected = {gguf_model.EMBEDDING: table, self._head_name: table}
        expected |= {name: table[1:] for stem in norms for name in self._norm_names(stem).values()}
        tensors = {name: tensor for name, tensor in self._file.tensors.items() if not name.startswith("blk.")}
        used = {gguf_model.LONG_FACTORS, gguf_model.SHORT_FACTORS} & set(tensors) if self.config.rope.factors else set()
        check_names(self.path, "the head", {*expected, *used}, tensors)
        check_shapes(self.path, expected, {name: tensor.shape for name, tensor in tensors.items()})

    def _named(self, key: str, dtype: torch.dtype, names: Mapping[str, str]) -> Tensors:
        """Tensors by our name from the cache, or dequantized now."""

        def make() -> Tensors:
            return {
                name: self._converted(self._dequantized(stored, dtype), name, dtype) for name, stored in names.items()
            }

        return self._store.tensors(f"{key}.{str(dtype).removeprefix('torch.')}", make)

    def _dequantized(self, stored: str, dtype: torch.dtype) -> torch.Tensor:
        """Matrices go straight to `dtype`; vectors are adjusted in float32 first, which their offset of one needs."""
        tensor = self._checked(stored)
        target = dtype if len(tensor.entry.shape) > 1 else torch.float32
        return dequantize(tensor.raw, tensor.entry.kind, tensor.entry.shape, target)

    def _converted(self, values: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
        return gguf_model.to_hf(values, name, self._file, self.config).to(dtype).contiguous()

    def _checked(self, name: str) -> _Stored:
        raw = self._file.raw(name)
        if hashlib.sha256(raw.data).digest() != self._entries[name].sha256:
            raise CorruptCheckpoint(f"{self.path}: {name} has changed since it was first read; fetch the file again")
        return _Stored(self._file.tensors[name], raw)

    def _build_manifest(self, progress: Progress | None) -> Manifest:
        hasher = Hasher(sum(tensor.size_bytes for tensor in self._file.tensors.values()), progress)
        blocks: list[list[TensorEntry]] = [[] for _ in range(self.config.num_blocks)]
        head: list[TensorEntry] = []
        for tensor in self._file.tensors.values():
            found = _BLOCK_NAME.match(tensor.name)
            if found and int(found[1]) >= len(blocks):
                raise UnsupportedModel(f"{self.path}: {tensor.name} is beyond the model's {len(blocks)} blocks")
            leaf = blocks[int(found[1])] if found else head
            leaf.append(hasher.entry(tensor.name, tensor.kind, tensor.shape, self._file.raw(tensor.name).data))
        return Manifest(
            name=self.name,
            config=self.config.to_json(),
            blocks=tuple(by_name(block) for block in blocks),
            head=by_name(head),
            files=tuple(FileEntry.pack(name, data) for name, data in sorted(self._text_files().items())),
        )

    def _text_files(self) -> dict[str, bytes]:
        files = {}
        template = self._file.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            files[TEMPLATE_FILE] = template.encode()
        tokenizer = tokenizer_json(self._file.metadata, self.path)
        if tokenizer is not None:
            files[TOKENIZER_FILE] = tokenizer
        return files


def _squared(tensor: GgufTensor, wanted: Shape) -> Shape:
    """Its shape; a matrix of one row is stored as a vector."""
    return wanted if wanted[:1] == (1,) and tensor.shape == wanted[1:] else tensor.shape
