"""Contacts that stopped answering, remembered for a while: a network that was cut in two must grow together again.

Both halves drop each other's members from their tables within minutes. If nobody ever asked them again the swarm would
stay two swarms for good. So now and then one of those lost last is asked; a single answer is enough, the lookups that
follow bring back the rest. Dead ones cost a question every ten seconds and are forgotten after half an hour.
"""

from __future__ import annotations

from collections import OrderedDict
from random import Random
from typing import Final

from ..protocol.ids import PeerId
from .table import Contact

CAPACITY: Final = 32
"""Contacts remembered; the one lost longest ago is forgotten first."""
EVERY_S: Final = 10.0
KEEP_S: Final = 1800.0


class Lost:
    """Contacts lost for not answering."""

    def __init__(self, rng: Random, now: float) -> None:
        self._rng = rng
        self._contacts: OrderedDict[PeerId, tuple[Contact, float]] = OrderedDict()
        self._due = now + EVERY_S * rng.random()

    def __len__(self) -> int:
        return len(self._contacts)

    def note(self, contact: Contact, now: float) -> None:
        """A contact left the table for not answering."""
        self._contacts.pop(contact.peer, None)
        self._contacts[contact.peer] = (contact, now)
        if len(self._contacts) > CAPACITY:
            self._contacts.popitem(last=False)

    def found(self, peer: PeerId) -> bool:
        """A peer spoke. True when it had been lost."""
        return self._contacts.pop(peer, None) is not None

    def due(self, now: float) -> Contact | None:
        """One to ask now, if it is time."""
        if now < self._due:
            return None
        self._due = now + EVERY_S * (0.75 + 0.5 * self._rng.random())
        while self._contacts:
            peer, (_, lost_at) = next(iter(self._contacts.items()))
            if now - lost_at <= KEEP_S:
                break
            del self._contacts[peer]
        if not self._contacts:
            return None
        return self._rng.choice([contact for contact, _ in self._contacts.values()])
