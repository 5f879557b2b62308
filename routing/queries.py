"""What a lookup is for: finding peers, reading entries, or putting an entry. Each is a small state machine.

    Locate    ask FIND_NODE until the nearest peers have answered
    Read      ask GET_ENTRIES instead; holders answer with pages, the newest entry per signer wins
    Deliver   Locate, then a message to the nearest `replicas`; a failed one is replaced by the next nearest
    Publish   deliver an entry with PUT_ENTRIES

They only say what to send and keep what came back; dht.py numbers the questions, checks signatures, keeps time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from ..protocol.errors import RemoteProtocolError
from ..protocol.ids import PeerId
from ..protocol.kad import MAX_HAVE_BYTES, LeasedEntry, Message, MessageType
from ..protocol.multiaddr import Multiaddr
from ..protocol.records import TAG_BYTES, SignedEntry
from .answers import peer_tag
from .lookup import Done, Lookup, Wait
from .store import MIN_LEASE_S, Verifier
from .table import Contact, subnet_of
from .timeouts import Limits

MAX_PAGES: Final = 80
"""Pages read from one holder: 4096 entries fill 64."""
MAX_READ_ENTRIES: Final = 8192
"""Entries kept by one read, so that lying holders cannot fill our memory."""


KNOWN_PEERS: Final = 24
"""Candidates a question asks not to be told again."""


@dataclass(frozen=True, slots=True)
class Held:
    """A verified entry and when its lease ends on our clock."""

    entry: SignedEntry
    """The entry."""
    expires_at: float
    """Monotonic seconds."""


@dataclass(frozen=True, slots=True)
class Send:
    """A question to put to a peer."""

    contact: Contact
    """Whom to ask."""
    request: Message
    """What to ask."""


def merge(known: dict[PeerId, Held], found: Iterable[Held]) -> None:
    """Keep the newest entry of each signer, up to MAX_READ_ENTRIES signers."""
    for held in found:
        old = known.get(held.entry.subkey)
        if old is None and len(known) >= MAX_READ_ENTRIES:
            continue
        if old is None or held.entry.seq > old.entry.seq:
            known[held.entry.subkey] = held


class Locate:
    """Find the live peers nearest to a key."""

    def __init__(self, query_id: int, key: bytes, lookup: Lookup) -> None:
        self.id = query_id
        self.key = key
        self.lookup = lookup
        self.wake: float | None = None
        self.asked = 0
        """Questions put so far."""

    def step(self, now: float) -> Send | Wait | Done:
        """The next question, a wait, or the end."""
        step = self.lookup.next(now)
        return Send(step, self.request(step.peer)) if isinstance(step, Contact) else step

    def request(self, peer: PeerId) -> Message:
        """What to ask a peer on the way."""
        return Message(type=MessageType.FIND_NODE, key=self.key, have=self._known(peer))

    def _known(self, peer: PeerId) -> bytes:
        return b"".join(peer_tag(contact.key) for contact in self.lookup.known(peer, KNOWN_PEERS))

    def went_out(self, contact: Contact, limits: Limits, now: float) -> None:
        """The question went out."""
        self.asked += 1
        self.lookup.asked(contact, now + limits.soft_s, hedge_at=now + limits.hedge_s, late_at=now + limits.late_s)

    def on_reply(
        self, contact: Contact, closer: list[Contact], message: Message, seen: Multiaddr | None
    ) -> Message | None:
        """An answer came from address `seen`; returns what to ask the same peer next, if anything."""
        self.lookup.on_reply(contact.peer, closer, seen)
        return None

    def on_failure(self, contact: Contact) -> None:
        """No answer, or nonsense."""
        self.lookup.on_failure(contact)


class Read(Locate):
    """Collect the entries under a key from the peers nearest to it."""

    def __init__(self, query_id: int, key: bytes, lookup: Lookup, known: Mapping[PeerId, Held]) -> None:
        super().__init__(query_id, key, lookup)
        self.found = dict(known)
        self.untimely: set[PeerId] = set()
        """Signers of entries left out for their time."""
        self._pages: dict[PeerId, int] = {}

    def verified(self, reply: Message, verifier: Verifier, now: float, wall: float) -> list[Held]:
        """The news among a reply's entries, without untimely ones. Raises RemoteProtocolError for a forgery."""
        held = []
        for leased in reply.entries:
            entry = leased.entry
            if entry.key != self.key:
                raise RemoteProtocolError("entries of another key than was asked for")
            lease_s = entry.lease_s(wall, leased.lease_s)
            old = self.found.get(entry.subkey)
            if lease_s < MIN_LEASE_S and len(self.untimely) < MAX_READ_ENTRIES:
                self.untimely.add(entry.subkey)
            if lease_s < MIN_LEASE_S or (old is not None and old.entry.seq >= entry.seq):
                continue
            if not verifier.check(entry):
                raise RemoteProtocolError(f"entry of {entry.subkey.short} is not signed by it")
            held.append(Held(entry, now + lease_s))
        return held

    def request(self, peer: PeerId, cursor: bytes = b"") -> Message:
        """Ask for entries, but not for those we have."""
        peers = b"" if cursor else self._known(peer)
        room = (MAX_HAVE_BYTES - len(peers)) // TAG_BYTES
        tags = [held.entry.tag for held in islice(self.found.values(), room)]
        return Message(type=MessageType.GET_ENTRIES, key=self.key, cursor=cursor, have=peers + b"".join(tags))

    def on_reply(
        self, contact: Contact, closer: list[Contact], message: Message, seen: Multiaddr | None
    ) -> Message | None:
        """Go on with the peer's next page, or with the lookup. The caller has merged the entries."""
        peer = contact.peer
        pages = self._pages[peer] = self._pages.get(peer, 0) + 1
        if message.cursor and message.entries and pages < MAX_PAGES:
            self.lookup.add(closer, peer)
            return self.request(peer, message.cursor)
        return super().on_reply(contact, closer, message, seen)


class Deliver(Locate):
    """Find the peers nearest to a key and give them something to hold."""

    def __init__(self, query_id: int, lookup: Lookup, parcel: Message, replicas: int) -> None:
        super().__init__(query_id, parcel.key, lookup)
        self.holding: list[Contact] = []
        """Peers that say they hold it."""
        self.subnets: set[str | PeerId] = set()
        """Where they were really met; a peer on a local network counts for itself."""
        self._parcel = parcel
        self._replicas = replicas
        self._targets: list[Contact] | None = None
        self._deadlines: dict[PeerId, float] = {}

    def parcel(self, contact: Contact) -> Message:
        """What to give to a peer."""
        return self._parcel

    def taken(self, reply: Message) -> bool:
        """Whether a peer's answer says that it holds the parcel now."""
        raise NotImplementedError

    @property
    def putting(self) -> bool:
        """True once the nearest peers are known."""
        return self._targets is not None

    def step(self, now: float) -> Send | Wait | Done:
        """Questions of the lookup first, then the puts."""
        if self._targets is None:
            step = super().step(now)
            if not isinstance(step, Done):
                return step
            self._replicas = max(self._replicas, self.lookup.crowd())
            self._targets = self.lookup.closest(2 * self._replicas)[::-1]
        waiting = [deadline for deadline in self._deadlines.values() if deadline > now]
        if self._targets and len(self.holding) + len(waiting) < self._replicas:
            contact = self._targets.pop()
            return Send(contact, self.parcel(contact))
        if len(self.holding) >= self._replicas or not self._deadlines:
            return Done()
        return Wait(min(waiting, default=None))  # too few took it: the slow ones may still

    def went_out(self, contact: Contact, limits: Limits, now: float) -> None:
        """The question went out."""
        if self.putting:
            self.asked += 1
            self._deadlines[contact.peer] = now + limits.soft_s
        else:
            super().went_out(contact, limits, now)

    def on_reply(
        self, contact: Contact, closer: list[Contact], message: Message, seen: Multiaddr | None
    ) -> Message | None:
        """Count a put that was taken, or go on with the lookup."""
        if message.type is not self._parcel.type:
            return super().on_reply(contact, closer, message, seen)
        self._deadlines.pop(contact.peer, None)
        if self.taken(message):
            self.holding.append(contact)
            self.subnets.add(subnet_of(seen) or contact.peer)
        return None

    def on_failure(self, contact: Contact) -> None:
        """No answer: the next nearest peer will do."""
        if self.putting:
            self._deadlines.pop(contact.peer, None)
        super().on_failure(contact)


class Publish(Deliver):
    """Find the peers nearest to an entry's key and put it there."""

    def __init__(self, query_id: int, lookup: Lookup, leased: LeasedEntry, replicas: int) -> None:
        put = Message(type=MessageType.PUT_ENTRIES, key=leased.entry.key, entries=(leased,))
        super().__init__(query_id, lookup, put, replicas)

    def taken(self, reply: Message) -> bool:
        """It holds the entry, or had it."""
        return reply.accepted > 0
