"""Iterative lookup as a pure iterator: whom to ask next on the way to the peers nearest a target.

Modelled on rust-libp2p's closest-peers iterator. Up to alpha questions are truly in flight at once (no rounds: the
`kademlia` package waits for the slowest of each round, 22 round trips with 20 % dead peers). Each question has a soft
deadline; past it the peer is SLOW: it no longer holds a slot nor the end of the lookup, but its answer still counts.

    state     on next()            on reply    on failure   deadline passes
    NEW       -> WAITING (asked)   DONE        FAILED
    WAITING                        DONE        FAILED       -> SLOW
    SLOW                           DONE        FAILED
    DONE, FAILED are final; but a FAILED candidate for whom others name new addresses is NEW again, at most twice.

The lookup is finished when the `width` nearest candidates that are not FAILED or SLOW are all DONE. If nobody at all
has answered, it waits for the SLOW ones instead.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from .keys import distance
from .table import Contact

ALPHA: Final = 10
MAX_CANDIDATES: Final = 256
"""Nearest candidates kept; a liar can name 20 a reply."""
MAX_ATTEMPTS: Final = 3
"""Address sets tried for one peer: the first words about a victim's addresses may be lies."""
MAX_ADDRS: Final = 16
"""Addresses collected for one candidate."""


class State(Enum):
    """Where a candidate stands."""

    NEW = "new"
    WAITING = "waiting"
    SLOW = "slow"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to ask now; call next() again after a reply or failure, or at this time."""

    until: float | None
    """Earliest soft deadline; None: only an answer or failure can help."""


@dataclass(frozen=True, slots=True)
class Done:
    """The lookup is over."""


@dataclass(slots=True, order=True)
class _Candidate:
    distance: int
    contact: Contact = field(compare=False)
    state: State = field(compare=False, default=State.NEW)
    deadline: float = field(compare=False, default=0.0)
    attempts: int = field(compare=False, default=0)
    tried: set[Multiaddr] = field(compare=False, default_factory=set)


class Lookup:
    """Candidates on the way to `target`, nearest first. `exclude` is never asked (ourselves)."""

    def __init__(
        self,
        target: bytes,
        seeds: Iterable[Contact],
        *,
        width: int,
        alpha: int = ALPHA,
        exclude: frozenset[PeerId] = frozenset(),
    ) -> None:
        self.target = target
        self._width = width
        self._alpha = alpha
        self._exclude = exclude
        self._order: list[_Candidate] = []
        self._by_peer: dict[PeerId, _Candidate] = {}
        self.add(seeds)

    def next(self, now: float) -> Contact | Wait | Done:
        """A peer to ask (then call asked()), or how long to wait, or the end."""
        waiting, head = self._survey(now)
        if all(candidate.state is State.DONE for candidate in head):
            slow = any(candidate.state is State.SLOW for candidate in self._order)
            return Done() if head or not slow else Wait(None)
        if waiting < self._alpha:
            for candidate in head:
                if candidate.state is State.NEW:
                    return candidate.contact
        deadlines = [candidate.deadline for candidate in self._order if candidate.state is State.WAITING]
        return Wait(min(deadlines, default=None))

    def asked(self, peer: PeerId, deadline: float) -> None:
        """A question went out; past `deadline` the peer counts as slow."""
        candidate = self._by_peer[peer]
        candidate.state = State.WAITING
        candidate.deadline = deadline
        candidate.attempts += 1
        candidate.tried.update(candidate.contact.addrs)

    def on_reply(self, peer: PeerId, closer: Iterable[Contact]) -> None:
        """A peer answered and named others."""
        candidate = self._by_peer.get(peer)
        if candidate is not None:
            candidate.state = State.DONE
        self.add(closer)

    def on_failure(self, peer: PeerId) -> None:
        """A peer could not be reached, or answered nonsense."""
        candidate = self._by_peer.get(peer)
        if candidate is not None and candidate.state is not State.DONE:
            candidate.state = State.FAILED

    def closest(self, count: int) -> list[Contact]:
        """The nearest peers that answered, nearest first."""
        done = (candidate.contact for candidate in self._order if candidate.state is State.DONE)
        return [contact for _, contact in zip(range(count), done, strict=False)]

    def _survey(self, now: float) -> tuple[int, list[_Candidate]]:
        """Turn overdue candidates slow; return how many are waiting and the `width` nearest that are still good."""
        waiting = 0
        head: list[_Candidate] = []
        for candidate in self._order:
            if candidate.state is State.WAITING:
                if candidate.deadline <= now:
                    candidate.state = State.SLOW
                else:
                    waiting += 1
            if len(head) < self._width and candidate.state not in (State.FAILED, State.SLOW):
                head.append(candidate)
        return waiting, head

    def add(self, contacts: Iterable[Contact]) -> None:
        """More candidates: peers that an answer named."""
        for contact in contacts:
            known = self._by_peer.get(contact.peer)
            if known is not None:
                _learn(known, contact)
            elif contact.peer not in self._exclude:
                candidate = _Candidate(distance(contact.key, self.target), contact)
                self._by_peer[contact.peer] = candidate
                insort(self._order, candidate)
        while len(self._order) > MAX_CANDIDATES:
            del self._by_peer[self._order.pop().contact.peer]


def _learn(known: _Candidate, contact: Contact) -> None:
    """Others name addresses of a peer that is a candidate already: more ways to reach it."""
    if known.state is State.NEW:
        merged = tuple(dict.fromkeys((*known.contact.addrs, *contact.addrs)))[:MAX_ADDRS]
        known.contact = Contact(contact.peer, merged)
    elif known.state is State.FAILED and known.attempts < MAX_ATTEMPTS and not known.tried.issuperset(contact.addrs):
        known.contact = contact
        known.state = State.NEW
