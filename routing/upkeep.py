"""What a node does unasked, round after round: who must be asked whether it lives, given entries, or found again.

    silent contacts   asked whether they still live (table.py)
    lost ones         asked now and then, for networks that were cut (lost.py)
    newcomers         handed the entries of keys they are near to (handover.py)
    neighbours        asked whom we do not know yet (neighbours.py)
    the table         looked after by look-ups of our own and of a random place, seldom while little changes

dht.py puts the questions and starts the look-ups.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from random import Random
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.kad import Message, MessageType
from .handover import Handover
from .lost import Lost
from .neighbours import Neighbours
from .parameters import DhtConfig
from .store import Store, iter_batches
from .table import Contact, Table

CALM_CHANGES: Final = 2
"""So few newcomers and losses since the last refresh: the next one may wait longer."""
CALM_FACTOR: Final = 1.5


class Upkeep:
    """See the module's docstring."""

    def __init__(self, own: PeerId, table: Table, store: Store, config: DhtConfig, *, rng: Random, now: float) -> None:
        self._table = table
        self._store = store
        self._config = config
        self._rng = rng
        self._handover = Handover(own, table, store, config.replicas)
        self._lost = Lost(rng, now)
        self.neighbours = Neighbours(own, table, rng, count=config.k)
        """Those nearest to us."""
        self.due_at = now
        """When the next round is."""
        self._changes = 0
        self._pace_s = config.refresh_s
        self._refresh_at = now + self._pace_s * rng.random()

    def spoke(self, peer: PeerId, now: float, *, entered: bool) -> None:
        """A server spoke to us; `entered`: it is new in the table."""
        if entered:
            self._changes += 1
            self._handover.note(peer)
        if self._lost.found(peer):
            self._refresh_at = min(self._refresh_at, now + self._config.maintenance_s)

    def left(self, contact: Contact, now: float) -> None:
        """A contact left the table for not answering."""
        self._lost.note(contact, now)
        self._changes += 1

    def begin(self, now: float) -> bool:
        """True when a round is due; the next one's time is set."""
        if now < self.due_at:
            return False
        self.due_at = now + self._config.maintenance_s
        return True

    def questions(self, busy: Container[PeerId], now: float) -> Iterator[tuple[Contact, Message]]:
        """This round's questions, but for neighbours. Who is `busy` with a question of ours is not pinged."""
        for key, contact in self._handover.due(now):
            for batch in iter_batches(self._store.live(key, now)):
                yield contact, Message(type=MessageType.PUT_ENTRIES, key=key, entries=batch)
        silent = self._table.silent(now, self._config.silence_s, self._config.pings)
        lost = self._lost.due(now)
        for contact in silent if lost is None else [*silent, lost]:
            if contact.peer not in busy:
                yield contact, Message(type=MessageType.PING)

    def wants_refresh(self, now: float) -> bool:
        """Whether it is time to look for peers near ourselves and elsewhere."""
        return now >= self._refresh_at

    def refreshing(self, now: float) -> None:
        """They are being looked for; the next time is set."""
        calm = self._changes <= CALM_CHANGES
        self._pace_s = min(self._config.calm_refresh_s, CALM_FACTOR * self._pace_s) if calm else self._config.refresh_s
        self._changes = 0
        self._refresh_at = now + self._pace_s * (0.75 + 0.5 * self._rng.random())
