"""Iterative lookup as a pure iterator: whom to ask next on the way to the peers nearest a target.

Modelled on rust-libp2p's closest-peers iterator. Questions are truly in flight at once (no rounds: the `kademlia`
package waits for the slowest of each round). On the way, `alpha` at a time are enough, more would only ask peers that
the next answer makes pointless; a candidate inside `near`, the distance within which the result is expected to lie,
has to be asked anyway and may be one of FINAL_ALPHA. Three times per question: from the first on (a hedge) the peer
holds no slot and the next nearest is asked in its stead; the second ends the wait if several peers are silent past
theirs, for then they are dead; otherwise the third does, for then it is probably just late. Whoever is not waited for
is SLOW; its answer still counts.

    state     on next()            on reply    on failure   not waited for any longer
    NEW       -> WAITING (asked)   DONE        FAILED
    WAITING                        DONE        FAILED       -> SLOW
    SLOW                           DONE        FAILED
    DONE, FAILED are final; but a FAILED candidate for whom others name new addresses is NEW again, at most twice.

The lookup is finished when the `width` nearest candidates that are not FAILED or SLOW are all DONE. If nobody at all
has answered, it waits for the SLOW ones instead.

Four defences against liars. A teller whose named peers do not answer (invented ids near the target) loses credit,
and what only it named is left aside. With `per_subnet`, only so many candidates of one /24 (/48) count towards `width`
while there are others. All inside `region`, where fewer than `width` are expected, must answer, however many they are:
ids chosen to sit next to a key push nobody out (Sridhar et al., NDSS 2024). And with `paths` > 1 the lookup is so many
lookups that start from different peers and never ask the same one (S/Kademlia, Baumgart and Mies 2007): liars who name
only accomplices capture the paths they stand on, no more.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from .table import Contact, subnet_of

ALPHA: Final = 4
"""Questions in flight on the way. Measured: 3 is slower with dead peers, 6 asks more and gains nothing."""
FINAL_ALPHA: Final = 24
"""Questions in flight to candidates that the result must contain anyway."""
MAX_PATHS: Final = 8
MAX_REGION: Final = 64
"""Most peers a lookup waits for when many sit inside `region`."""
MAX_CANDIDATES: Final = 256
"""Nearest candidates kept by a path; a liar can name 20 a reply."""
MAX_ATTEMPTS: Final = 3
"""Address sets tried for one peer: the first words about a victim's addresses may be lies."""
MAX_ADDRS: Final = 16
"""Addresses collected for one candidate."""
SILENT_SHARE: Final = 0.12
"""More than this share of all questions silent past their second time, and two at least: no lateness explains that."""
LATE_SHARE: Final = 0.2
"""This share of live peers is past its first time too; only for silent ones in excess of it are others asked."""
SPARES: Final = 1
"""So many more are asked once more than so many are silent: the substitutes of the dead may be dead as well."""
DOUBT_FAILURES: Final = 4
"""This many dead among the peers somebody named, and three dead to a live one: the others it named can wait."""
DOUBT_RATIO: Final = 3


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
    """Earliest deadline; None: only an answer or failure can help."""


@dataclass(frozen=True, slots=True)
class Done:
    """The lookup is over."""


@dataclass(slots=True, eq=False)
class _Candidate:
    distance: int
    contact: Contact
    path: int
    """The path that names it first, then the one that asked it: its answer belongs there alone."""
    teller: PeerId | None
    """Who named it; None: our own table."""
    state: State = State.NEW
    hedge_at: float = 0.0
    deadline: float = 0.0
    late_at: float = 0.0
    attempts: int = 0
    tried: set[Multiaddr] = field(default_factory=set)
    others: tuple[Multiaddr, ...] = ()
    """Addresses named while the peer was being asked at different ones."""
    subnet: str | None = None

    def __lt__(self, other: _Candidate) -> bool:
        return self.distance < other.distance


class Lookup:
    """Candidates on the way to `target`, nearest first. `exclude` is never asked (ourselves)."""

    def __init__(
        self,
        target: bytes,
        seeds: Iterable[Contact],
        *,
        width: int,
        alpha: int = ALPHA,
        near: int = 0,
        paths: int = 1,
        per_subnet: int | None = None,
        region: int = 0,
        exclude: frozenset[PeerId] = frozenset(),
    ) -> None:
        self.target = target
        self._place = int.from_bytes(target, "big")
        self._width = width
        self._alpha = alpha if paths == 1 else max(2, alpha // paths)
        self._near = near
        self._per_subnet = per_subnet
        self._region = region
        self._exclude = exclude
        self._paths: list[list[_Candidate]] = [[] for _ in range(min(max(paths, 1), MAX_PATHS))]
        self._by_peer: dict[PeerId, _Candidate] = {}
        self._waiting: list[_Candidate] = []
        self._dead: Counter[PeerId] = Counter()
        self._alive: Counter[PeerId] = Counter()
        self._slow = 0
        self._asked = 0
        for number, contact in enumerate(seeds):
            self._add(contact, number % len(self._paths), None)

    def next(self, now: float) -> Contact | Wait | Done:
        """A peer to ask (then call asked()), or how long to wait, or the end."""
        self._mark_slow(now)
        busy, hedged = [0] * len(self._paths), [0] * len(self._paths)
        for candidate in self._waiting:
            (busy if candidate.hedge_at > now else hedged)[candidate.path] += 1
        done, anybody = True, False
        for path in range(len(self._paths)):
            silent = max(0, hedged[path] - int(LATE_SHARE * self._asked / len(self._paths)))
            head = self._head(path, self._width + silent + (SPARES if silent + self._slow > SPARES else 0))
            anybody = anybody or bool(head)
            needed = max(self._width, self._inside(head))
            done = done and all(candidate.state is State.DONE for candidate in head[:needed])
            fresh = next((candidate for candidate in head if candidate.state is State.NEW), None)
            if done or fresh is None:
                continue
            if busy[path] < (FINAL_ALPHA if fresh.distance <= self._near else self._alpha):
                fresh.path = path
                return fresh.contact
        if done:
            return Done() if anybody or not self._slow else Wait(None)
        times = (at for c in self._waiting for at in (c.hedge_at, c.deadline, c.late_at) if at > now)
        return Wait(min(times, default=None))

    def asked(
        self, contact: Contact, deadline: float, *, hedge_at: float | None = None, late_at: float | None = None
    ) -> None:
        """A question went out. From `hedge_at` (`deadline`) on it blocks nobody, past `late_at` (`deadline`) it is
        not waited for, past `deadline` neither if others are silent, too.
        """
        candidate = self._by_peer[contact.peer]
        candidate.contact = contact
        if candidate.state is State.SLOW:
            self._slow -= 1
        if candidate.state is not State.WAITING:
            self._waiting.append(candidate)
        candidate.state = State.WAITING
        candidate.deadline = deadline
        candidate.hedge_at = deadline if hedge_at is None else min(hedge_at, deadline)
        candidate.late_at = deadline if late_at is None else max(late_at, deadline)
        candidate.attempts += 1
        candidate.tried.update(candidate.contact.addrs)
        self._asked += 1

    def known(self, peer: PeerId, count: int) -> list[Contact]:
        """Whom the peer, about to be asked, need not name: the nearest candidates of its path that look alive.

        Without them its answer reaches further, past the dead that everybody names. Every second peer is told of fewer,
        those that answered and those of our own table only: what one teller says of addresses wants a second voice.
        """
        found = []
        trusting = self._asked % 2 == 0
        for candidate in self._paths[self._by_peer[peer].path]:
            plausible = trusting and candidate.state in (State.NEW, State.WAITING) and not self._is_doubtful(candidate)
            if plausible or candidate.teller is None or candidate.state is State.DONE:
                found.append(candidate.contact)
                if len(found) == count:
                    break
        return found

    def on_reply(self, peer: PeerId, closer: Iterable[Contact], seen: Multiaddr | None = None) -> None:
        """A peer answered, from address `seen`, and named others."""
        candidate = self._by_peer.get(peer)
        if candidate is None:
            return
        if candidate.state is not State.DONE:
            self._settle(candidate, State.DONE)
            if seen is not None:
                candidate.subnet = subnet_of(seen)
        self.add(closer, peer)

    def on_failure(self, contact: Contact) -> None:
        """A peer could not be reached at these addresses, or answered nonsense."""
        candidate = self._by_peer.get(contact.peer)
        if candidate is None or candidate.contact.addrs != contact.addrs:
            return  # it has been asked at other addresses meanwhile
        if candidate.state is State.WAITING or candidate.state is State.SLOW:
            self._settle(candidate, State.FAILED)

    def add(self, contacts: Iterable[Contact], teller: PeerId | None = None) -> None:
        """More candidates: peers that an answer named. They belong to the path that asked the teller."""
        asked = None if teller is None else self._by_peer.get(teller)
        path = 0 if asked is None else asked.path
        for contact in contacts:
            self._add(contact, path, teller)

    def closest(self, count: int) -> list[Contact]:
        """The nearest peers that answered, nearest first; those over the limit of their subnet only to fill up."""
        done = sorted(c for c in self._by_peer.values() if c.state is State.DONE)
        return [candidate.contact for candidate in self._spread(done, count)]

    def crowd(self) -> int:
        """How many that answered lie inside the region."""
        return self._inside(self._by_peer[contact.peer] for contact in self.closest(MAX_REGION))

    def _inside(self, candidates: Iterable[_Candidate]) -> int:
        return sum(candidate.distance <= self._region for candidate in candidates)

    def _settle(self, candidate: _Candidate, state: State) -> None:
        """Note how a question ended, to the credit of whoever named the peer."""
        before, teller = candidate.state, candidate.teller
        candidate.state = state
        if before is State.WAITING:
            self._waiting.remove(candidate)
        elif before is State.SLOW:
            self._slow -= 1
        if teller is not None:
            if state is State.DONE:
                self._alive[teller] += 1
                self._dead[teller] -= before is State.SLOW
            elif before is not State.SLOW:
                self._dead[teller] += 1
        if state is not State.DONE and candidate.others:
            self._retry(candidate, Contact(candidate.contact.peer, candidate.others), teller)

    def _mark_slow(self, now: float) -> None:
        for candidate in [one for one in self._waiting if one.others and one.hedge_at <= now]:
            self._settle(candidate, State.FAILED)  # and ask at the other addresses
        overdue = [candidate for candidate in self._waiting if candidate.deadline <= now]
        many = len(overdue) + self._slow >= max(2.0, SILENT_SHARE * self._asked)
        for candidate in overdue:
            if many or candidate.late_at <= now:
                self._slow += 1
                self._settle(candidate, State.SLOW)

    def _head(self, path: int, count: int) -> list[_Candidate]:
        """The `count` nearest of a path that are still good; what doubtful tellers named only to fill up."""
        good: Iterator[_Candidate] = (
            c for c in self._paths[path] if c.state is not State.FAILED and c.state is not State.SLOW
        )
        if self._dead:
            trusted: list[_Candidate] = []
            doubtful: list[_Candidate] = []
            for candidate in good:
                (doubtful if self._is_doubtful(candidate) else trusted).append(candidate)
            good = iter(trusted + doubtful)
        return self._spread(good, count)

    def _is_doubtful(self, candidate: _Candidate) -> bool:
        teller = candidate.teller
        if candidate.state is not State.NEW or teller is None:
            return False
        dead = self._dead[teller]
        return dead >= DOUBT_FAILURES and dead > DOUBT_RATIO * self._alive[teller]

    def _spread(self, candidates: Iterable[_Candidate], count: int) -> list[_Candidate]:
        """The first `count` and all inside the region; with a subnet limit those over it only to fill up."""
        if self._per_subnet is None:
            return [candidate for candidate, _ in zip(candidates, range(count), strict=False)]
        chosen: list[_Candidate] = []
        spare: list[_Candidate] = []
        places: Counter[str] = Counter()
        for candidate in candidates:
            if len(chosen) >= count and candidate.distance > self._region:
                return chosen
            subnet = candidate.subnet
            if subnet is not None and places[subnet] >= self._per_subnet:
                spare.append(candidate)
                continue
            if subnet is not None:
                places[subnet] += 1
            chosen.append(candidate)
            if len(chosen) >= max(count, MAX_REGION):
                return chosen
        return chosen + spare[: count - len(chosen)]

    def _add(self, contact: Contact, path: int, teller: PeerId | None) -> None:
        known = self._by_peer.get(contact.peer)
        if known is None:
            if contact.peer in self._exclude:
                return
            known = _Candidate(contact.place ^ self._place, contact, path, teller)
            if self._per_subnet is not None:
                known.subnet = subnet_of(contact.addrs[0]) if contact.addrs else None
            self._by_peer[contact.peer] = known
            self._insert(known, path)
            return
        self._learn(known, contact, teller)
        if len(self._paths) > 1 and known not in self._paths[path]:
            self._insert(known, path)

    def _insert(self, candidate: _Candidate, path: int) -> None:
        order = self._paths[path]
        insort(order, candidate)
        if len(order) > MAX_CANDIDATES:
            dropped = order.pop()
            if dropped.state is State.NEW and len(self._paths) == 1:
                del self._by_peer[dropped.contact.peer]

    def _learn(self, known: _Candidate, contact: Contact, teller: PeerId | None) -> None:
        """Others name a peer that is a candidate already: perhaps more ways to reach it, perhaps a better word."""
        if known.state is State.NEW:
            if known.contact.addrs != contact.addrs:
                merged = tuple(dict.fromkeys((*known.contact.addrs, *contact.addrs)))[:MAX_ADDRS]
                known.contact = Contact(contact.peer, merged)
            if self._dead and self._is_doubtful(known):
                known.teller = teller
        elif known.state is State.FAILED:
            self._retry(known, contact, teller)
        elif known.state is not State.DONE and not known.others and not known.tried.issuperset(contact.addrs):
            known.others = contact.addrs

    def _retry(self, failed: _Candidate, contact: Contact, teller: PeerId | None) -> None:
        """Another chance at other addresses: the first words about a peer's addresses may be lies."""
        failed.others = ()
        if failed.attempts < MAX_ATTEMPTS and not failed.tried.issuperset(contact.addrs):
            self._slow -= failed.state is State.SLOW
            failed.contact = contact
            failed.state = State.NEW
            failed.teller = teller
