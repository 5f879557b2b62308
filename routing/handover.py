"""Entries for newcomers: who joins next to a key must hold what lies there, or readers would miss it.

Only the two nearest holders hand over (two, for one may be dying), what is left of each lease and no more: entries
never live longer for being passed on. Who came less than SETTLED_S ago does not count as one of the two: it may not
have been given anything yet, as when many join at once. Announcers come back within 40 s anyway; this covers the time
until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ..protocol.ids import PeerId
from .keys import position
from .store import Store
from .table import Contact, Table

MAX_NEWCOMERS: Final = 64
"""Newcomers considered per round; more come back with the announcers' next round."""
SETTLED_S: Final = 30.0
MAX_KEYS: Final = 512
"""Keys considered per round."""
GIVERS: Final = 2


class Handover:
    """Newcomers since the last round."""

    def __init__(self, own: PeerId, table: Table, store: Store, replicas: int) -> None:
        self._own_place = int.from_bytes(own.kad_key, "big")
        self._table = table
        self._store = store
        self._replicas = replicas
        self._newcomers: dict[PeerId, None] = {}
        self._from = 0

    def note(self, newcomer: PeerId) -> None:
        """A peer entered the table."""
        if len(self._newcomers) < MAX_NEWCOMERS:
            self._newcomers[newcomer] = None

    def due(self, now: float) -> Iterator[tuple[bytes, Contact]]:
        """Keys and the newcomers that ours is the turn to give them to."""
        if not self._newcomers:
            return
        newcomers = [contact for peer in self._newcomers if (contact := self._table.get(peer)) is not None]
        self._newcomers.clear()
        for key in self._keys() if newcomers else ():
            target = position(key)
            place = int.from_bytes(target, "big")
            nearest = self._table.closest(target, self._replicas)
            if not any(contact in newcomers for contact in nearest):
                continue
            ours = self._own_place ^ place
            before_us = [c for c in nearest if c.place ^ place < ours and self._is_settled(c.peer, now)]
            if len(before_us) < GIVERS:
                yield from ((key, contact) for contact in nearest if contact in newcomers)

    def _is_settled(self, peer: PeerId, now: float) -> bool:
        since = self._table.known_since(peer)
        return since is not None and since <= now - SETTLED_S

    def _keys(self) -> list[bytes]:
        keys = self._store.keys()
        if len(keys) <= MAX_KEYS:
            return keys
        start = self._from % len(keys)
        self._from = start + MAX_KEYS
        return (keys[start:] + keys[:start])[:MAX_KEYS]
