"""Files mapped into memory for as long as somebody uses what is in them.

A checkpoint stays open for the life of a node, but its pages count as ours only while a tensor or array refers to
them: weights that were copied into a packed or quantized form leave nothing behind, and nothing has to be closed.
"""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

from ...protocol.errors import CorruptCheckpoint


class MappedFile:
    """A file that is mapped when asked for. Raises CorruptCheckpoint when it cannot be read, or has changed size.

    `writable` mappings are private: torch demands writable memory, and the file never changes.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path = path
        self._access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
        first = self._map()
        self._size = len(first)
        self._mapped = weakref.ref(first)

    def get(self) -> mmap.mmap:
        """The mapping; it lives as long as this reference, or an array or memoryview made from it."""
        current = self._mapped()
        if current is None:
            current = self._map()
            if len(current) != self._size:
                raise CorruptCheckpoint(f"{self.path}: has changed while it was in use; start again")
            self._mapped = weakref.ref(current)
        return current

    def _map(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=self._access)
        except (OSError, ValueError) as exc:  # ValueError: an empty file cannot be mapped
            raise CorruptCheckpoint(f"{self.path}: cannot be read: {exc}") from exc
