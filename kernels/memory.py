"""What the C library does with freed memory.

glibc keeps it for later, which is right while computing and wrong while loading: every matrix passes through buffers of
some ten megabytes that nobody needs again. It also raises, as it goes, the size from which a buffer is given straight
back to the system. So while weights load that size is small and stays, and afterwards it is as large as glibc itself
would ever make it. Elsewhere than under glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_MMAP_THRESHOLD: Final = -3
_TRIM_THRESHOLD: Final = -1
LOADING_BYTES: Final = 4 << 20
"""Buffers from this size on go back at once while weights load."""
COMPUTING_BYTES: Final = 32 << 20
"""And otherwise: glibc's own upper bound."""
KEPT_BYTES: Final = 128 << 20
"""Free memory at the top of the heap that is kept otherwise, as node/allocator.py wants it."""


def give_back_memory() -> None:
    """Return freed memory to the system where the C library would keep it."""
    if trim := _function("malloc_trim"):
        trim(0)


@contextmanager
def loading_memory() -> Iterator[None]:
    """Inside, freed buffers leave the process at once."""
    _keep(LOADING_BYTES, LOADING_BYTES)
    try:
        yield
    finally:
        _keep(COMPUTING_BYTES, KEPT_BYTES)
        give_back_memory()


def _keep(mapped: int, kept: int) -> None:
    if option := _function("mallopt"):
        option(_MMAP_THRESHOLD, mapped)
        option(_TRIM_THRESHOLD, kept)


def _function(name: str) -> Callable[..., Any] | None:
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, None)
