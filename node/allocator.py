"""Tell glibc to keep freed memory. For processes that are a node; an embedding program decides for itself.

A bulk stream frees and allocates a megabyte thousands of times a second. glibc's default gives such blocks
back to the kernel each time and takes the page faults again: receiving 1 MB messages cost 2.9 ms each with
the defaults and 0.8 ms with these on a virtual machine with expensive faults (tests/bench/transport.py),
and tensor temporaries suffer alike. Costs nothing while idle: only memory once used is kept, up to
KEEP_BYTES.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

KEEP_BYTES: Final = 128 * 1024 * 1024
"""Free memory at the top of the heap that stays ours."""
MMAP_BYTES: Final = 32 * 1024 * 1024
"""Blocks above this are still mapped and unmapped one by one: the largest glibc allows."""

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def keep_freed_memory() -> bool:
    """Set both thresholds for the whole process; False where the C library has no mallopt (musl, macOS,
    Windows)."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES) and mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES))
