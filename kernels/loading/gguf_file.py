"""The container of a .gguf file: metadata and tensor table, parsed with bounds, weights mapped into memory.

The gguf package's own reader walks 262,144 token strings through numpy (9 s for Gemma 3 270M; here 0.1 s) and trusts
every length in the file. Here each length is checked against what is left of the file before anything is read or
allocated for it. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from numpy.typing import NDArray

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .mapped import MappedFile

Value = int | float | bool | str | list[str] | NDArray[np.generic]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_ENTRIES: Final = 65_536
"""Metadata keys, and tensors."""
MAX_STRING: Final = 16 * 1024 * 1024
MAX_ARRAY: Final = 16 * 1024 * 1024
"""Items; the largest vocabularies have some 300,000 tokens and 600,000 merges."""
MAX_DIMENSIONS: Final = 4
MAX_NAME: Final = 256
DEFAULT_ALIGNMENT: Final = 32

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Metadata value type -> numpy type."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table."""

    name: str
    """As in the file: blk.0.attn_q.weight."""
    kind: str
    """ggml's name of the storage type: F32, Q5_0, Q4_K, ..."""
    shape: tuple[int, ...]
    """Outermost first, as torch has it (the file stores the reverse)."""
    offset: int
    """First byte, from the start of the file."""
    size_bytes: int
    """Stored bytes."""


class GgufFile:
    """A mapped .gguf file. Raises CorruptCheckpoint or UnsupportedModel naming the file and the cause."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path, writable=False)
        self.metadata, self.tensors = _Parser(path, self._file.get()).parse()

    def forget(self, *keys: str) -> None:
        """Drop metadata that is needed no more: a vocabulary takes 30 MB."""
        for key in keys:
            self.metadata.pop(key, None)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor, uncopied and read-only."""
        tensor = self.tensors[name]
        return np.frombuffer(self._file.get(), np.uint8, tensor.size_bytes, tensor.offset)


class _Parser:
    """One pass over the head of a file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def parse(self) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
        if self._take(4) != MAGIC:
            raise CorruptCheckpoint(f"{self._path}: is no GGUF file (it does not start with 'GGUF')")
        version = self._u32()
        if version not in VERSIONS:
            raise UnsupportedModel(
                f"{self._path}: GGUF version {version} is not supported: little-endian versions 2 and 3 are"
            )
        tensor_count, entry_count = self._count(MAX_ENTRIES, "tensors"), self._count(MAX_ENTRIES, "metadata keys")
        metadata: dict[str, Value] = {}
        for _ in range(entry_count):
            key = self._string()
            metadata[key] = self._value(self._u32())
        table = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise self._corrupt(f"general.alignment is {alignment!r:.40}")
        base = -(-self._at // alignment) * alignment
        return metadata, {name: self._place(name, kind, shape, base + at) for name, kind, shape, at in table}

    def _tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string(MAX_NAME)
        dimensions = self._u32()
        if dimensions > MAX_DIMENSIONS:
            raise self._corrupt(f"{name} has {dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed")
        shape = tuple(self._u64() for _ in range(dimensions))[::-1]
        return name, self._u32(), shape, self._u64()

    def _place(self, name: str, kind: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
        """Check a tensor's size and place against the file."""
        try:
            quantization = gguf.GGMLQuantizationType(kind)
        except ValueError as exc:
            raise UnsupportedModel(f"{self._path}: {name} has the unknown tensor type {kind}") from exc
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        if shape and shape[-1] % block:
            raise self._corrupt(f"{name} has rows of {shape[-1]}, no multiple of {quantization.name}'s {block}")
        size_bytes = math.prod(shape) // block * block_bytes
        if offset + size_bytes > self._size:
            raise CorruptCheckpoint(
                f"{self._path}: truncated: {name} needs {offset + size_bytes} bytes, the file has {self._size}; "
                "fetch it again"
            )
        return GgufTensor(name, quantization.name, shape, offset, size_bytes)

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._corrupt(f"unknown metadata type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        scalar: int | float | bool = np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        return scalar

    def _array(self) -> Value:
        kind = self._u32()
        count = self._count(MAX_ARRAY, "array items")
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:
            raise self._corrupt(f"unknown array type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _strings(self, count: int) -> list[str]:
        """The hot loop: half a million strings in some vocabularies."""
        data, at, size, unpack = self._data, self._at, self._size, _U64.unpack_from
        if count * _U64.size > size - at:
            raise self._truncated()
        strings = []
        for _ in range(count):
            if at + _U64.size > size:
                raise self._truncated()
            end = at + _U64.size + unpack(data, at)[0]
            if end > size:
                raise self._truncated()
            strings.append(data[at + _U64.size : end])
            at = end
        self._at = at
        try:
            return [string.decode() for string in strings]
        except UnicodeDecodeError as exc:
            raise self._corrupt("a string is not UTF-8") from exc

    def _string(self, limit: int = MAX_STRING) -> str:
        length = self._u64()
        if length > limit:
            raise self._corrupt(f"a string has {length} bytes, at most {limit} are allowed")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as exc:
            raise self._corrupt("a string is not UTF-8") from exc

    def _count(self, limit: int, what: str) -> int:
        count = self._u64()
        if count > limit:
            raise self._corrupt(f"{count} {what}, at most {limit} are allowed")
        return count

    def _u32(self) -> int:
        value: int = _U32.unpack(self._take(_U32.size))[0]
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack(self._take(_U64.size))[0]
        return value

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._truncated()
        self._at += count
        return self._data[self._at - count : self._at]

    def _truncated(self) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._path}: truncated: the file ends inside its header; fetch it again")

    def _corrupt(self, cause: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self._path}: damaged header: {cause}")
