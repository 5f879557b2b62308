"""The questions on their way to peers, and the peers not worth a question: silent ones, failed ones, liars.

Nobody can be declared dead by others: only our own failure to reach a peer at addresses it told us itself counts
against the peer. What third parties say about its addresses is tried, and on failure only the words are avoided.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.kad import KadPeer
from ..protocol.multiaddr import Multiaddr
from .answers import heard_of, is_local
from .bans import BackOff
from .queries import Locate
from .table import Contact, Table
from .timeouts import Limits, Timeouts

LIAR_BASE_S: Final = 60.0
"""First back-off for peers that sent forgeries or broke the protocol."""


@dataclass(slots=True)
class Question:
    """One question in flight."""

    query: Locate | None
    """What it is for; None: upkeep."""
    contact: Contact
    """Who was asked, and where."""
    verified: bool
    """Asked at the addresses it told us itself."""
    asked_at: float
    """When."""
    overdue_at: float
    """From then on the peer counts as silent."""
    around: bool
    """Peers named in the answer are to be greeted."""


class Questions:
    """See the module's docstring."""

    def __init__(self, own: PeerId, table: Table, rng: Random) -> None:
        self._own = own
        self._table = table
        self._open: dict[int, Question] = {}
        self._avoided = BackOff(rng)
        self._liars = BackOff(rng, base_s=LIAR_BASE_S)
        self.timeouts = Timeouts()
        """Answer times."""

    def put(self, number: int, query: Locate | None, contact: Contact, now: float, *, around: bool = False) -> Limits:
        """A question goes out: how long to wait for its answer."""
        limits = self.timeouts.limits(contact.peer)
        verified = self._table.get(contact.peer) == contact
        self._open[number] = Question(query, contact, verified, now, now + limits.soft_s, around)
        return limits

    def take(self, number: int) -> Question | None:
        """A question that has come to its end."""
        return self._open.pop(number, None)

    @property
    def busy(self) -> set[PeerId]:
        """Peers that a question is on its way to."""
        return {question.contact.peer for question in self._open.values()}

    def spoke(self, peer: PeerId) -> None:
        """A peer was heard: its failures are forgotten."""
        self._avoided.succeeded(peer)

    def failed(self, question: Question, now: float) -> bool:
        """No answer came. True when the peer left the table for it."""
        contact = question.contact
        if question.verified:
            self._avoided.failed(contact.peer, now)
            return self._table.failed(contact.peer, now)
        if contact.peer not in self._table:
            self._avoided.failed((contact.peer, contact.addrs), now)
        return False

    def lied(self, peer: PeerId, now: float) -> None:
        """A peer broke the protocol: neither asked nor answered for a while."""
        self._liars.failed(peer, now)

    def is_liar(self, peer: PeerId, now: float) -> bool:
        """Whether a peer broke the protocol lately."""
        return self._liars.avoided(peer, now)

    def usable(self, contacts: Iterable[Contact], now: float) -> list[Contact]:
        """Those worth asking: neither avoided nor silent on a question right now."""
        overdue = {question.contact.peer for question in self._open.values() if question.overdue_at <= now}
        return [
            contact
            for contact in contacts
            if contact.peer not in overdue
            and not self._avoided.avoided(contact.peer, now)
            and not self._liars.avoided(contact.peer, now)
        ]

    def candidates(self, told: Iterable[KadPeer], seen: Multiaddr | None, now: float) -> list[Contact]:
        """Those worth asking of the peers that an answer named, with the addresses they told us themselves if we know
        them.
        """
        found = []
        for peer in told:
            known = self._table.get(peer.peer)
            contact = known or heard_of(peer, is_local(seen))
            if known is None and (not contact.addrs or self._avoided.avoided((contact.peer, contact.addrs), now)):
                continue
            if contact.peer != self._own:
                found.append(contact)
        return self.usable(found, now)
