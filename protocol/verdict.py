"""Whether others can reach us: evidence per address, a verdict with confidence, and whom to ask next. Sans-IO.

A peer that dialed an address and proved it by the nonce has shown that it can be reached; one that says it could not
may be wrong, or lie. So each network has one vote, which counts double once it is confirmed; "private" needs more than
"public"; and to turn a verdict over takes a margin of a confirmed vote, whose owner another network's can hold back.

    unknown -> public     a success, and no more failures than successes
    unknown -> private    failures two ahead
    public  -> private    failures two ahead
    private -> public     a success, and no more failures; or successes worth two, and failures not two ahead
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from random import Random
from typing import Final

from .ids import PeerId
from .multiaddr import Multiaddr

CONFIRMED: Final = 2
"""What a network's vote is worth when it was given twice in a row; once it is worth 1."""
SURE: Final = 6
"""The margin at which confidence is full: three networks, confirmed."""
MAX_VOTERS: Final = 16
"""Networks heard about one address; the one heard of longest ago goes."""
VOTE_S: Final = 3600.0
"""How long a vote counts."""
MAX_CANDIDATES: Final = 16
"""Addresses looked into at a time."""
FIRST_RETRY_S: Final = 3.0
"""Until an address is asked about again, at first; doubled each time."""
RECHECK_S: Final = 600.0
"""The longest pause between two questions about an address."""
SPACING_S: Final = 6.0
"""Between two questions to one peer; servers allow about 12 a minute."""
UNWILLING_S: Final = 600.0
"""A peer that did not keep to the protocol is left alone so long; one that refused an address, with that one."""
BUSY_S: Final = 60.0
"""The same of one that has had too many questions."""
MAX_REFUSALS: Final = 64
"""Peers remembered that refused an address."""
ENOUGH_TRIES: Final = 2
"""An address asked about so often, without an answer, no longer keeps the node's verdict open."""
MAX_ASKED: Final = 512
"""Peers remembered as asked."""


class Reach(StrEnum):
    """Can others dial it?"""

    UNKNOWN = "unknown"
    PUBLIC = "public"
    PRIVATE = "private"


class Source(IntEnum):
    """Where a candidate address is from, the likeliest to be right first."""

    MAPPED = 0
    """A router gave it to us."""
    LISTEN = 1
    """We listen on a public address."""
    OBSERVED = 2
    """Peers in different networks see connections from our listening port come from it."""
    GUESSED = 3
    """Our IP as peers see it, with the port we listen on: somebody may have opened it by hand."""


class Outcome(StrEnum):
    """What came of one question."""

    REACHED = "reached"
    """The nonce came back on a new connection."""
    FAILED = "failed"
    """The server says that nobody answered."""
    REFUSED = "refused"
    """It does not dial such an address."""
    BUSY = "busy"
    """It has had too many questions."""
    NOTHING = "nothing"
    """It broke the protocol, did not answer, or claims a dial that never came."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one address."""

    reach: Reach
    confidence: float
    """0 to 1: how far one kind of votes is ahead of the other."""
    yes: int
    """What the votes of those who reached it are worth."""
    no: int


@dataclass(slots=True)
class _Vote:
    reached: bool
    weight: int
    at: float
    through: bool


class Judge:
    """The evidence on one address."""

    __slots__ = ("_reach", "_votes")

    def __init__(self) -> None:
        self._votes: dict[Hashable, _Vote] = {}
        self._reach = Reach.UNKNOWN

    def heard(self, network: Hashable, reached: bool, now: float, *, through: bool = False) -> None:
        """A peer of this network could, or could not, dial it. `through`: we had dialed it from there before."""
        old = self._votes.pop(network, None)
        same = old is not None and old.reached is reached
        self._votes[network] = _Vote(reached, CONFIRMED if same else 1, now, through)
        while len(self._votes) > MAX_VOTERS:
            del self._votes[next(iter(self._votes))]
        self._decide(now)

    def doubt(self) -> None:
        """The votes so far are no longer confirmed."""
        for vote in self._votes.values():
            vote.weight = 1

    def weight_of(self, network: Hashable) -> int:
        """What a network's vote is worth now; 0 for one not heard."""
        vote = self._votes.get(network)
        return 0 if vote is None else vote.weight

    def verdict(self, now: float) -> Verdict:
        """The verdict now."""
        yes, no = self._decide(now)
        margin = {Reach.PUBLIC: yes - no, Reach.PRIVATE: no - yes, Reach.UNKNOWN: 0}[self._reach]
        return Verdict(self._reach, max(0.0, min(1.0, margin / SURE)), yes, no)

    def _decide(self, now: float) -> tuple[int, int]:
        self._votes = {network: vote for network, vote in self._votes.items() if now - vote.at < VOTE_S}
        # some routers let in whom we dialed first, and nobody else: their success counts if the others do not object
        others = sum(vote.weight if vote.reached else -vote.weight for vote in self._votes.values() if not vote.through)
        yes = sum(vote.weight for vote in self._votes.values() if vote.reached and (others >= 0 or not vote.through))
        no = sum(vote.weight for vote in self._votes.values() if not vote.reached)
        self._reach = turned(self._reach, yes, no)
        return yes, no


def turned(reach: Reach, yes: int, no: int) -> Reach:
    """The next verdict: see the module's table."""
    if not yes and not no:
        return Reach.UNKNOWN
    match reach:
        case Reach.UNKNOWN if yes and yes >= no:
            return Reach.PUBLIC
        case Reach.UNKNOWN | Reach.PUBLIC if no >= yes + CONFIRMED:
            return Reach.PRIVATE
        case Reach.PRIVATE if yes and (yes >= no or no < yes + CONFIRMED <= 2 * yes):
            return Reach.PUBLIC
        case _:
            return reach


@dataclass(frozen=True, slots=True)
class Server:
    """A connected peer that answers AutoNAT requests."""

    peer: PeerId
    network: Hashable
    """Peers of one network have one vote."""
    through: bool = False
    """We dialed it from our listening port, so a lenient router may let its dial in that would keep others out."""


@dataclass(frozen=True, slots=True)
class Question:
    """Ask this peer to dial this address."""

    server: Server
    address: Multiaddr
    era: int = 0
    """How often the network had changed when it was asked."""


@dataclass(slots=True)
class _Candidate:
    source: Source
    judge: Judge = field(default_factory=Judge)
    tries: int = 0
    due_at: float = 0.0
    refused: dict[PeerId, float] = field(default_factory=dict)
    """Who does not dial it, and until when it is not asked again."""


class Assessor:
    """Every candidate address, whom to ask about it, and what it all means for the node."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._candidates: dict[Multiaddr, _Candidate] = {}
        self._not_before: dict[PeerId, float] = {}
        self._was_private = False
        self._era = 0

    @property
    def candidates(self) -> Mapping[Multiaddr, Source]:
        """What is looked into, and where it is from."""
        return {address: candidate.source for address, candidate in self._candidates.items()}

    def offer(self, found: Mapping[Multiaddr, Source]) -> None:
        """The candidates there are now. What is known of those that stay is kept, of others forgotten."""
        ranked = sorted(found, key=lambda address: found[address])[:MAX_CANDIDATES]
        old = self._candidates
        self._candidates = {address: old.get(address) or _Candidate(found[address]) for address in ranked}
        for address, candidate in self._candidates.items():
            candidate.source = found[address]

    def recheck(self, now: float) -> None:
        """The network has changed: ask about everything again soon. Old votes count less, answers under way nothing."""
        self._era += 1
        for candidate in self._candidates.values():
            candidate.due_at, candidate.tries = now, 0
            candidate.refused.clear()
            candidate.judge.doubt()
        self._not_before.clear()

    def next_question(self, servers: Iterable[Server], now: float) -> Question | None:
        """What to ask whom now; None: nothing is due, or nobody is free."""
        servers = tuple(servers)
        for _, address in sorted((c.source, address) for address, c in self._candidates.items()):
            candidate = self._candidates[address]
            free = [server for server in servers if self._when(server, candidate) <= now]
            if free:
                server = self._best(free, candidate.judge)
                self._note_asked(server, candidate, now)
                return Question(server, address, self._era)
        return None

    def _when(self, server: Server, candidate: _Candidate) -> float:
        """When this server may be asked about this address."""
        waits = self._not_before.get(server.peer, 0.0), candidate.refused.get(server.peer, 0.0)
        return max(candidate.due_at, *waits)

    def _best(self, free: Sequence[Server], judge: Judge) -> Server:
        """Who adds most: a network not heard yet, not one that our own dial may have let in."""
        best = min((judge.weight_of(server.network), server.through) for server in free)
        equals = [server for server in free if (judge.weight_of(server.network), server.through) == best]
        return self._rng.choice(sorted(equals, key=lambda server: server.peer))

    def _note_asked(self, server: Server, candidate: _Candidate, now: float) -> None:
        candidate.due_at = now + min(RECHECK_S, FIRST_RETRY_S * 2 ** min(candidate.tries, 16))
        candidate.tries += 1
        self._leave_alone(server.peer, now + SPACING_S)

    def _leave_alone(self, peer: PeerId, until: float) -> None:
        self._not_before.pop(peer, None)
        self._not_before[peer] = until
        while len(self._not_before) > MAX_ASKED:
            del self._not_before[next(iter(self._not_before))]

    def next_timer(self, servers: Iterable[Server], now: float) -> float:
        """When next_question() may have something; infinity: not before something happens."""
        servers = tuple(servers)
        whens = (self._when(server, c) for server in servers for c in self._candidates.values())
        return max(now, min(whens, default=float("inf")))

    def heard(self, question: Question, outcome: Outcome, now: float) -> None:
        """What came of a question."""
        peer = question.server.peer
        if outcome in (Outcome.BUSY, Outcome.NOTHING):
            self._leave_alone(peer, now + (BUSY_S if outcome is Outcome.BUSY else UNWILLING_S))
        candidate = self._candidates.get(question.address)
        if candidate is None or question.era != self._era:  # no longer ours, or it was another network
            return
        if outcome is Outcome.REFUSED:
            candidate.refused = {one: until for one, until in candidate.refused.items() if until > now}
            if len(candidate.refused) < MAX_REFUSALS:
                candidate.refused[peer] = now + UNWILLING_S
        if outcome in (Outcome.REACHED, Outcome.FAILED):
            before = candidate.judge.verdict(now)
            server = question.server
            candidate.judge.heard(server.network, outcome is Outcome.REACHED, now, through=server.through)
            if before.reach is not candidate.judge.verdict(now).reach:
                candidate.tries = min(candidate.tries, 1)  # news: have it confirmed soon

    def verdicts(self, now: float) -> dict[Multiaddr, Verdict]:
        """What is known of each candidate."""
        return {address: candidate.judge.verdict(now) for address, candidate in self._candidates.items()}

    def reachable(self, now: float) -> tuple[Multiaddr, ...]:
        """Addresses that others can dial, the best source first."""
        return tuple(address for address, verdict in self.verdicts(now).items() if verdict.reach is Reach.PUBLIC)

    def node(self, now: float) -> Verdict:
        """The node's own verdict: that of its best address.

        Private only when every candidate is, or has been asked about in vain; it stays so when a new one turns up.
        """
        verdicts = self.verdicts(now)
        public = [v for v in verdicts.values() if v.reach is Reach.PUBLIC]
        if public:
            self._was_private = False
            return max(public, key=lambda verdict: verdict.confidence)
        private = [v for v in verdicts.values() if v.reach is Reach.PRIVATE]
        open_yet = any(
            verdicts[address].reach is Reach.UNKNOWN and candidate.tries < ENOUGH_TRIES
            for address, candidate in self._candidates.items()
        )
        self._was_private = bool(private) and (self._was_private or not open_yet)
        if self._was_private:
            return min(private, key=lambda verdict: verdict.confidence)
        return Verdict(Reach.UNKNOWN, 0.0, 0, 0)
