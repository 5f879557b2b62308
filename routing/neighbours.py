"""Asking around: who has just come asks a neighbour whom it does not know yet, sixteen times in the first minutes.

Nodes that join at the same moment can miss each other, and so can nodes whose machines are too busy to answer in time:
thirty processes that start together on two cores did, and waited a minute for the next look-up of their own place. One
question names what we know (`have`), so the answer names only what we do not; those peers are greeted, and enter the
table by answering. Most answers are empty, and a look-up would cost twenty questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.kad import Message, MessageType
from .answers import peer_tag
from .table import Contact, Table

FIRST_S: Final = 2.0
"""Until the first question, and then the second."""
GROWTH: Final = 1.25
LAST_S: Final = 60.0
"""When the questions are so far apart, there are no more: from then on the look-ups of upkeep.py do."""
MAX_GREETED: Final = 8
"""Peers greeted because of one answer: what others say may be invented."""


class Neighbours:
    """When to ask whom. `count` nearest peers are our neighbours."""

    def __init__(self, own: PeerId, table: Table, rng: Random, *, count: int) -> None:
        self._own = own
        self._table = table
        self._rng = rng
        self._count = count
        self._due: float | None = None
        self._wait_s = FIRST_S

    def due(self, now: float) -> tuple[Contact, Message] | None:
        """A question to put now, if it is time."""
        near = self._table.closest(self._own.kad_key, self._count)
        if not near:  # alone: all begins anew with the next peer
            self._due, self._wait_s = None, FIRST_S
            return None
        if self._due is None:
            self._due = now + FIRST_S
        if now < self._due or self._wait_s > LAST_S:
            return None
        self._wait_s *= GROWTH
        self._due = now + self._wait_s * (0.75 + 0.5 * self._rng.random())
        have = b"".join(peer_tag(contact.key) for contact in near)
        return self._rng.choice(near), Message(type=MessageType.FIND_NODE, key=self._own.raw, have=have)

    def strangers(self, named: Iterable[Contact]) -> list[Contact]:
        """Whom to greet of those that an answer named: the nearest we do not know."""
        unknown = [contact for contact in named if contact.peer not in self._table and contact.addrs]
        place = int.from_bytes(self._own.kad_key, "big")
        return sorted(unknown, key=lambda contact: contact.place ^ place)[:MAX_GREETED]
