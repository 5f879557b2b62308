"""Making a checkpoint's manifest: hash every stored tensor once, keep the result, recompute when a file changes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ...protocol.errors import CorruptCheckpoint, RemoteProtocolError
from ...protocol.manifest import Buffer, Manifest, TensorEntry
from .store import Store, fingerprint

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much of it is done (bytes)."""

_CHUNK_BYTES: Final = 16 * 1024 * 1024


def cached_manifest(
    paths: Sequence[Path], cache_dir: Path, version: int, build: Callable[[], Manifest], name: str
) -> Manifest:
    """The manifest that `build` makes of these files, made once. Raises what `build` raises."""
    data = Store(cache_dir / "manifests").blob(fingerprint(paths, version), lambda: build().encode())
    try:
        return replace(Manifest.decode(data), name=name)
    except RemoteProtocolError as exc:  # our own, with a valid hash: only another release can have written it
        raise CorruptCheckpoint(f"{cache_dir / 'manifests'}: {exc}; delete this folder") from exc


class Hasher:
    """Hashes tensors with progress over all of them."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._total = total_bytes
        self._done = 0
        self._progress = progress

    def entry(self, name: str, dtype: str, shape: tuple[int, ...], data: Buffer) -> TensorEntry:
        """The manifest entry of one tensor."""
        view = memoryview(data)
        state = hashlib.sha256()
        for first in range(0, view.nbytes, _CHUNK_BYTES):
            state.update(view[first : first + _CHUNK_BYTES])
            self._done += min(_CHUNK_BYTES, view.nbytes - first)
            if self._progress is not None:
                self._progress("identifying the model", self._done, self._total)
        return TensorEntry(name, dtype, shape, view.nbytes, state.digest())


def by_name(entries: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
    """The order a leaf has."""
    return tuple(sorted(entries, key=lambda entry: entry.name))
