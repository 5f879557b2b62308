"""safetensors files, mapped into memory: the format of Hugging Face checkpoints and of our own cache.

Our own reader because it must say which file is damaged and how, bounds the header before parsing it, and hands out
the stored bytes for hashing. Tensors are views of a private mapping: several processes that serve one model share its
pages, and only what is read is ever loaded from disk.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ...protocol.errors import CorruptCheckpoint, UnsupportedModel
from .mapped import MappedFile

MAX_HEADER_BYTES: Final = 64 * 1024 * 1024
MAX_DIMENSIONS: Final = 8
_PREFIX_BYTES: Final = 8

FLOATS: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
}
"""Types we compute with, or keep in our own cache (I8)."""
_ITEM_BITS: Final = {
    **{"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16},
    **{"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a file's header."""

    dtype: str
    """As the file spells it."""
    shape: tuple[int, ...]
    """Outermost first."""
    start: int
    """First byte, from the start of the file."""
    end: int
    """One past the last byte."""


class SafetensorsFile:
    """A mapped file. Raises CorruptCheckpoint naming the file and the cause."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path, writable=True)
        self.tensors, self.metadata = _parse_header(path, self._file.get())

    def raw(self, name: str) -> memoryview:
        """The stored bytes of a tensor, uncopied."""
        entry = self.tensors[name]
        return memoryview(self._file.get())[entry.start : entry.end]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as stored, a view of the mapping. Raises UnsupportedModel on a type we cannot compute with."""
        entry = self.tensors[name]
        dtype = FLOATS.get(entry.dtype)
        if dtype is None:
            raise UnsupportedModel(
                f"{self.path}: {name} is stored as {entry.dtype}: F32, F16, BF16 and GGUF checkpoints are supported"
            )
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        raw = np.frombuffer(self._file.get(), np.uint8, entry.end - entry.start, entry.start)
        if raw.ctypes.data % dtype.itemsize:
            raw = raw.copy()  # an odd header length leaves everything unaligned; torch wants aligned memory
        return torch.from_numpy(raw).view(dtype).reshape(entry.shape)

    def bytes(self, name: str) -> torch.Tensor:
        """A tensor of packed numbers, uint8, a view of the mapping. Raises UnsupportedModel on any other type."""
        entry = self.tensors[name]
        if entry.dtype != "U8":
            raise UnsupportedModel(f"{self.path}: {name} is stored as {entry.dtype}: packed numbers are U8")
        raw = np.frombuffer(self._file.get(), np.uint8, entry.end - entry.start, entry.start)
        return torch.from_numpy(raw).reshape(entry.shape)


def _parse_header(path: Path, data: mmap.mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    size = len(data)
    length = int.from_bytes(data[:_PREFIX_BYTES], "little")
    if size < _PREFIX_BYTES or length > size - _PREFIX_BYTES:
        raise CorruptCheckpoint(f"{path}: truncated: the file ends inside its header; fetch it again")
    if length > MAX_HEADER_BYTES:
        raise CorruptCheckpoint(f"{path}: header of {length} bytes: at most {MAX_HEADER_BYTES} are allowed")
    try:
        header = json.loads(data[_PREFIX_BYTES : _PREFIX_BYTES + length])
    except (ValueError, RecursionError) as exc:
        raise CorruptCheckpoint(f"{path}: the header is not JSON: no safetensors file, or a damaged one") from exc
    if not isinstance(header, dict):
        raise CorruptCheckpoint(f"{path}: the header is not a map")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CorruptCheckpoint(f"{path}: __metadata__ is not a map")
    base = _PREFIX_BYTES + length
    return {str(name): _parse_entry(path, name, value, base, size) for name, value in header.items()}, metadata


def _parse_entry(path: Path, name: str, value: Any, base: int, size: int) -> StoredTensor:
    try:
        dtype, shape = value["dtype"], tuple(value["shape"])
        start, end = value["data_offsets"]
    except (TypeError, KeyError, ValueError) as exc:
        raise CorruptCheckpoint(f"{path}: the header entry of {name!r:.80} is malformed") from exc
    if not isinstance(dtype, str) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, (*shape, start, end))):
        raise CorruptCheckpoint(f"{path}: the header entry of {name!r:.80} is malformed")
    if base + end > size:
        raise CorruptCheckpoint(
            f"{path}: truncated: {name!r:.80} needs {base + end} bytes, the file has {size}; fetch it again"
        )
    bits = _ITEM_BITS.get(dtype)
    if start > end or (bits is not None and (end - start) * 8 != math.prod(shape) * bits):
        raise CorruptCheckpoint(f"{path}: {name!r:.80} of shape {list(shape)} does not fill its {end - start} bytes")
    return StoredTensor(dtype, shape, base + start, base + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview | bytes]:
    """The chunks of a safetensors file, tensors sorted by name and uncopied."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = {dtype: name for name, dtype in FLOATS.items()}
    at = 0
    for name, tensor in sorted(tensors.items()):
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-(len(packed) + _PREFIX_BYTES) % 64)
    yield len(packed).to_bytes(_PREFIX_BYTES, "little") + packed
    for _, tensor in sorted(tensors.items()):
        yield stored_bytes(tensor)


def stored_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes in row-major order, uncopied when it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
