"""The cache on disk of what is costly to make from a checkpoint: converted weights, manifests, tokenizers.

Each item is made once, under a file lock: of four processes that start together one converts and three wait, then map
the same pages. An item appears by rename, so it is whole or absent. Its content is hashed when it is made and checked
whenever it is opened (1.8 GB/s here, cheap beside using it), so a damaged item is noticed and made again, and nothing
has to be synced to disk. When the disk is full or read-only the item is used from memory and the log says so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import torch
from filelock import FileLock

from ...protocol.errors import CorruptCheckpoint
from .safetensors import SafetensorsFile, serialize, stored_bytes

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
Item = TypeVar("Item")

_DIGEST_BYTES: Final = 32
_HASH_KEY: Final = "sha256."


def fingerprint(paths: Iterable[Path], version: int) -> str:
    """A name for what is made from these files by this version of the code; another one once a file changes."""
    state = hashlib.sha256(str(version).encode())
    for path in paths:
        stat = path.stat()
        state.update(f"\0{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return state.hexdigest()[:32]


class Store:
    """Items of one folder, by key. A key must be a plain file name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tensors(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """The tensors made by `make`, mapped from disk."""
        return self._item(key + ".safetensors", make, _read_tensors, _tensor_chunks)

    def blob(self, key: str, make: Callable[[], bytes]) -> bytes:
        """The bytes made by `make`."""
        return self._item(key + ".bin", make, _read_blob, _blob_chunks)

    def file(self, name: str, chunks: Callable[[], Iterable[bytes]], valid: Callable[[Path], bool]) -> Path:
        """A file whose content is valid, assembled from chunks if need be. Raises OSError when it cannot be written."""
        path = self.folder / name
        if not valid(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(name):
                if not valid(path):
                    _write(path, chunks())
        return path

    def _item(
        self,
        name: str,
        make: Callable[[], Item],
        read: Callable[[Path], Item],
        chunks: Callable[[Item], Iterable[bytes | memoryview]],
    ) -> Item:
        path = self.folder / name
        item = _read_if_whole(path, read, logging.DEBUG)
        if item is not None:
            return item
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(name):
                # another process may have made it while we waited
                item = _read_if_whole(path, read, logging.WARNING)
                if item is not None:
                    return item
                item = make()
                _write(path, chunks(item))
                item = None  # not beside what is read
                return read(path)
        except (OSError, NotImplementedError) as exc:  # NotImplementedError: a file system without locks
            logger.warning(
                "cannot keep %s in %s (%s): using it from memory; free some space or choose another cache folder",
                name,
                self.folder,
                exc,
            )
            return make() if item is None else item

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with FileLock(self.folder / f"{name}.lock"):
            for stale in self.folder.glob(f"{name}.*.tmp"):  # left by a process that was killed while it wrote
                stale.unlink(missing_ok=True)
            yield


def _read_if_whole(path: Path, read: Callable[[Path], Item], level: int) -> Item | None:
    if not path.exists():
        return None
    try:
        return read(path)
    except CorruptCheckpoint as exc:
        logger.log(level, "making a damaged cache item again: %s", exc)
        return None


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write and rename, so that nobody ever sees half an item."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _tensor_chunks(tensors: Tensors) -> Iterable[bytes | memoryview]:
    hashes = {_HASH_KEY + name: _sha256(stored_bytes(tensor)) for name, tensor in tensors.items()}
    return serialize(tensors, hashes)


def _read_tensors(path: Path) -> Tensors:
    file = SafetensorsFile(path)
    for name in file.tensors:
        if file.metadata.get(_HASH_KEY + name) != _sha256(file.raw(name)):
            raise CorruptCheckpoint(f"{path}: {name} does not match its hash")
    return {name: file.tensor(name) for name in file.tensors}


def _blob_chunks(data: bytes) -> Iterable[bytes]:
    return [hashlib.sha256(data).digest(), data]


def _read_blob(path: Path) -> bytes:
    content = path.read_bytes()
    data = content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != content[:_DIGEST_BYTES]:
        raise CorruptCheckpoint(f"{path}: does not match its hash")
    return data


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
