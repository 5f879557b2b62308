"""What was read lately, so that keys in use are answered from memory at once.

A key that was asked for twice within a minute is hot: it is read anew in the background before its copy gets old, so
whoever plans a session never waits for the DHT. Entries keep the lease their holders gave; nothing lives longer here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..protocol.ids import PeerId
from .queries import Held

MAX_KEYS: Final = 256
"""Keys remembered; the one used longest ago goes first."""
FRESH_S: Final = 20.0
"""A copy this young answers a lookup."""
AHEAD_S: Final = 10.0
"""A hot key is read anew at this age."""
HOT_S: Final = 60.0
"""A key is remembered this long after its last use."""
HOT_USES: Final = 2


@dataclass(slots=True)
class Cached:
    """One key's last read."""

    used_at: float
    """Last time our node asked for it."""
    held: dict[PeerId, Held]
    """What was found."""
    read_at: float = float("-inf")
    """When it was found."""
    uses: int = 0
    """How often our node asked."""
    reading: int | None = None
    """Id of the read in progress."""


class ReadCache:
    """Reads by key, at most MAX_KEYS."""

    def __init__(self) -> None:
        self._keys: dict[bytes, Cached] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def entry(self, key: bytes, now: float) -> Cached:
        """The key's place, made if needed."""
        cached = self._keys.get(key)
        if cached is None:
            cached = self._keys[key] = Cached(now, {})
            self._make_room(key)
        return cached

    def use(self, key: bytes, now: float) -> Cached:
        """The key's place, noting that our node asked for it."""
        cached = self.entry(key, now)
        cached.used_at = now
        cached.uses += 1
        return cached

    def due(self, now: float) -> list[bytes]:
        """Hot keys to read anew; forgets the cold ones."""
        found = []
        for key, cached in list(self._keys.items()):
            if cached.reading is not None:
                continue
            if now - cached.used_at > HOT_S:
                del self._keys[key]
            elif cached.uses >= HOT_USES and now - cached.read_at > AHEAD_S:
                found.append(key)
        return found

    def _make_room(self, newest: bytes) -> None:
        if len(self._keys) <= MAX_KEYS:
            return
        idle = [key for key, cached in self._keys.items() if cached.reading is None and key != newest]
        if idle:
            del self._keys[min(idle, key=lambda key: self._keys[key].used_at)]
