"""The DHT as one machine without I/O: requests, answers and the time go in, questions to peers and results come out.

    in     locate, read, publish, withdraw     what our node wants; each returns the id of a query
           handle                              another peer's request; returns the reply
           on_reply, on_failure                what became of an Ask
           tick                                call it when next_timer() has come
    out    actions()                           Ask: put this to that peer; Finished: a query's result

node/discovery.py executes this over streams; tests run hundreds of them on a simulated clock. Queries are in
queries.py, the answering half in answers.py; this file keeps the books: numbering, time limits, whom to trust,
republishing, hand-over to newcomers, and the cache of keys that are asked for often.

Nobody can be declared dead by others: only our own failure to reach a peer at addresses it told us itself counts
against the peer. What third parties say about its addresses is tried, and on failure only the words are avoided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from ..protocol.errors import RemoteProtocolError
from ..protocol.ids import PeerId, PrivateKey
from ..protocol.kad import KadPeer, LeasedEntry, Message, MessageType
from ..protocol.multiaddr import Multiaddr
from ..protocol.records import CLOCK_SKEW_S, MAX_TTL_S, SignedEntry, next_seq, sign_entry
from .answers import Answers, heard_of, is_local, self_told, wire_addrs
from .bans import BackOff
from .cache import FRESH_S, ReadCache
from .keys import distance, position
from .lookup import ALPHA, Lookup, Wait
from .queries import Held, Locate, Publish, Read, Send, merge
from .store import MIN_LEASE_S, Source, Store, StoreLimits, Verifier, iter_batches
from .table import Contact, K, Table
from .timeouts import Timeouts

MAX_ACTIVE_QUERIES: Final = 32
"""Queries stepping at once; more wait their turn."""
MAX_NEWCOMERS: Final = 16
"""Newcomers considered for hand-over per maintenance round."""
MAX_HANDOVER_KEYS: Final = 512
"""Keys considered for hand-over per maintenance round."""
LIAR_BASE_S: Final = 60.0
"""First back-off for peers that sent forgeries or broke the protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtConfig:
    """Parameters of the DHT; the defaults are what docs/spec/kad.md promises."""

    k: int = K
    """Bucket size, and peers named in an answer."""
    alpha: int = ALPHA
    """Questions of one lookup in flight."""
    replicas: int = 8
    """Peers an entry is put to."""
    width: int = 10
    """Nearest peers that must have answered before an entry is put or a read is complete."""
    republish_s: float = 40.0
    """How often our own entries are signed and put anew."""
    refresh_s: float = 60.0
    """How often the table looks for new peers."""
    maintenance_s: float = 2.0
    """How often hand-over, liveness and the cache are looked at."""
    silence_s: float = 90.0
    """A contact silent for this long is asked whether it still lives."""
    pings: int = 4
    """Contacts asked per maintenance round."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Put a question to a peer; tell on_reply() or on_failure() with the id."""

    id: int
    """Number of the question."""
    contact: Contact
    """Whom."""
    request: Message
    """What."""
    limit_s: float
    """Give up after this."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A query is over."""

    query: int
    """Its id."""
    contacts: tuple[Contact, ...]
    """Nearest peers that answered."""
    entries: tuple[SignedEntry, ...]
    """Of a read: the live entries, newest per signer, without withdrawn ones, in order of signer."""
    holders: int
    """Of a publication: peers that hold the entry, ourselves not counted."""


@dataclass(slots=True)
class _Question:
    query: Locate | None
    contact: Contact
    verified: bool
    asked_at: float
    overdue_at: float


@dataclass(slots=True)
class _Publication:
    payload: bytes
    ttl_s: int
    due: float


class Dht:
    """One node's part in the DHT. `addrs` is where it listens; in client mode it is never told to anybody."""

    def __init__(
        self,
        key: PrivateKey,
        *,
        rng: Random,
        now: float,
        config: DhtConfig | None = None,
        limits: StoreLimits | None = None,
        server_mode: bool = True,
        last_seq: int = 0,
    ) -> None:
        self._key = key
        self._rng = rng
        self._config = config or DhtConfig()
        self.own = key.peer_id
        self.server_mode = server_mode
        self.addrs: tuple[Multiaddr, ...] = ()
        self.table = Table(key.peer_id.kad_key, k=self._config.k)
        self.store = Store(key.peer_id, limits)
        self.verifier = Verifier()
        self.timeouts = Timeouts()
        self._answers = Answers(self.table, self.store, self.verifier, k=self._config.k)
        self._avoided = BackOff(rng)
        self._liars = BackOff(rng, base_s=LIAR_BASE_S)
        self._seq = last_seq
        self._ids = 0
        self._actions: deque[Ask | Finished] = deque()
        self._questions: dict[int, _Question] = {}
        self._active: dict[int, Locate] = {}
        self._backlog: deque[Locate] = deque()
        self._publications: dict[bytes, _Publication] = {}
        self._cache = ReadCache()
        self._newcomers: dict[PeerId, None] = {}
        self._maintenance_at = now
        self._refresh_at = now + self._config.refresh_s * rng.random()
        self._handover_from = 0

    # What our node wants

    def locate(self, key: bytes, now: float, *, seeds: Sequence[Contact] = (), width: int | None = None) -> int:
        """Find the `width` (k) live peers nearest to a key. Returns the query's id."""
        lookup = self._lookup(key, width or self._config.k, now, seeds)
        return self._start(Locate(self._number(), key, lookup), now)

    def read(self, key: bytes, now: float) -> int:
        """Read the entries under a key from its holders. Reads of one key share one query."""
        cached = self._cache.use(key, now)
        return self._read(key, now) if cached.reading is None else cached.reading

    def recent(self, key: bytes, now: float) -> list[SignedEntry] | None:
        """The entries under a key as of the last seconds, without asking anybody; None: read() it."""
        if now - self._cache.entry(key, now).read_at > FRESH_S:
            return None
        cached = self._cache.use(key, now)
        return self._visible(key, cached.held.values(), now)

    def publish(self, key: bytes, payload: bytes, ttl_s: int, now: float, wall: float) -> int:
        """Announce a payload under a key until withdraw(); it is signed and put anew every 40 s, and held here too.

        Returns the id of the first round's query. Raises LocalProtocolError for a payload or ttl out of bounds.
        """
        query = self._put_own(key, payload, ttl_s, now, wall)
        self._publications[key] = _Publication(payload, ttl_s, now + self._pace())
        return query

    def withdraw(self, key: bytes, now: float, wall: float) -> int | None:
        """Put a tombstone over our entry. Returns the query's id, None when nothing was published under the key."""
        publication = self._publications.pop(key, None)
        if publication is None:
            return None
        ttl_s = min(MAX_TTL_S, publication.ttl_s + 2 * int(CLOCK_SKEW_S))
        return self._put_own(key, b"", ttl_s, now, wall)

    @property
    def published(self) -> list[bytes]:
        """Keys under which we announce something."""
        return list(self._publications)

    @property
    def last_seq(self) -> int:
        """Highest sequence number we signed; give it to the next run if clocks may go backwards."""
        return self._seq

    # What the network says

    def handle(self, remote: PeerId, seen: Multiaddr | None, request: Message, now: float, wall: float) -> Message:
        """Answer an authenticated peer. Raises RemoteProtocolError when it broke the rules: reset its stream."""
        if self._liars.avoided(remote, now):
            raise RemoteProtocolError(f"{remote.short} sent forgeries lately and is not answered")
        try:
            if request.sender is not None:
                self._heard_sender(remote, seen, request.sender, now)
            reply = self._answers.answer(remote, seen, request, now, wall)
        except RemoteProtocolError:
            self.misbehaved(remote, now)
            raise
        return self._signed_off(reply, is_local(seen))

    def on_reply(self, ask: int, seen: Multiaddr | None, reply: Message, now: float, wall: float) -> None:
        """A peer answered. A forged answer counts as none."""
        question = self._questions.pop(ask, None)
        if question is None:
            return
        contact, query = self_told(question.contact, seen, reply), question.query
        self.timeouts.observe(contact.peer, now - question.asked_at)
        if query is not None and query.id not in self._active:
            query = None  # it could not wait for this answer
        try:
            held = self._verified(query, reply, now, wall)
        except RemoteProtocolError:
            self.misbehaved(contact.peer, now)
            self._drop(question, now)
            return
        self._avoided.succeeded(contact.peer)
        self._enter(contact, seen, now)
        self._learn_seq(reply, now, wall)
        if query is None:
            return
        if isinstance(query, Read):
            merge(query.found, held)
        follow_up = query.on_reply(contact.peer, self._candidates(reply.closer_peers, seen, now), reply)
        if follow_up is not None:
            query.asked(contact.peer, now + self._ask(query, contact, follow_up, now))
        self._advance(query, now)

    def on_failure(self, ask: int, now: float) -> None:
        """A peer could not be reached, did not answer in time or answered nonsense."""
        question = self._questions.pop(ask, None)
        if question is None:
            return
        contact = question.contact
        if question.verified:
            self.table.failed(contact.peer)
            self._avoided.failed(contact.peer, now)
        elif contact.peer not in self.table:
            self._avoided.failed((contact.peer, contact.addrs), now)
        self._drop(question, now)

    def misbehaved(self, peer: PeerId, now: float) -> None:
        """A peer broke the protocol: out of the table, neither asked nor answered for a while."""
        self.table.remove(peer)
        self._liars.failed(peer, now)

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to a peer broke: soon ask whether it still lives."""
        self.table.suspect(peer)

    # Time

    def next_timer(self) -> float:
        """When tick() wants to be called."""
        wakes = [query.wake for query in self._active.values() if query.wake is not None]
        return min([self._maintenance_at, *wakes])

    def tick(self, now: float, wall: float) -> None:
        """Move overdue lookups on; every 2 s look after leases, publications, newcomers, silent contacts and cache."""
        for query in list(self._active.values()):
            if query.wake is not None and query.wake <= now:
                self._advance(query, now)
        if now < self._maintenance_at:
            return
        self._maintenance_at = now + self._config.maintenance_s
        self.store.expire(now)
        self._republish(now, wall)
        self._hand_over(now)
        self._ping_silent(now)
        for key in self._cache.due(now):
            self._read(key, now)
        if now >= self._refresh_at:
            self.refresh(now)

    def refresh(self, now: float) -> list[int]:
        """Look for peers near ourselves and in a random direction. Returns the queries' ids."""
        self._refresh_at = now + self._config.refresh_s * (0.75 + 0.5 * self._rng.random())
        return [self.locate(self.own.raw, now), self.locate(self._rng.randbytes(32), now, width=self._config.width)]

    def actions(self) -> list[Ask | Finished]:
        """What is to be done since the last call, in order."""
        done = list(self._actions)
        self._actions.clear()
        return done

    # Queries

    def _number(self) -> int:
        self._ids += 1
        return self._ids

    def _lookup(self, key: bytes, width: int, now: float, seeds: Sequence[Contact] = ()) -> Lookup:
        target = position(key)
        near = self._usable(self.table.closest(target, self._config.k), now)
        return Lookup(target, [*seeds, *near], width=width, alpha=self._config.alpha, exclude=frozenset((self.own,)))

    def _usable(self, contacts: Sequence[Contact], now: float) -> list[Contact]:
        """Those worth asking: not avoided, and not silent on a question right now unless they all are."""
        overdue = {item.contact.peer for item in self._questions.values() if item.overdue_at <= now}
        good = [
            contact
            for contact in contacts
            if not self._avoided.avoided(contact.peer, now) and not self._liars.avoided(contact.peer, now)
        ]
        return [contact for contact in good if contact.peer not in overdue] or good

    def _start(self, query: Locate, now: float) -> int:
        if len(self._active) >= MAX_ACTIVE_QUERIES:
            self._backlog.append(query)
        else:
            self._active[query.id] = query
            self._advance(query, now)
        return query.id

    def _advance(self, query: Locate, now: float) -> None:
        while isinstance(step := query.step(now), Send):
            limit_s = self._ask(query, step.contact, step.request, now)
            query.asked(step.contact.peer, now + limit_s)
        if isinstance(step, Wait):
            query.wake = step.until
        elif self._active.pop(query.id, None) is not None:
            self._finish(query, now)

    def _finish(self, query: Locate, now: float) -> None:
        entries: list[SignedEntry] = []
        if isinstance(query, Read):
            cached = self._cache.entry(query.key, now)
            cached.held, cached.read_at, cached.reading = query.found, now, None
            entries = self._visible(query.key, query.found.values(), now)
        holders = query.acks if isinstance(query, Publish) else 0
        contacts = query.lookup.closest(self._config.k)
        self._actions.append(Finished(query.id, tuple(contacts), tuple(entries), holders))
        while self._backlog and len(self._active) < MAX_ACTIVE_QUERIES:
            self._start(self._backlog.popleft(), now)

    def _ask(self, query: Locate | None, contact: Contact, request: Message, now: float) -> float:
        """Queue a question; returns its soft limit."""
        known = self.table.get(contact.peer)
        number = self._number()
        soft_s = self.timeouts.soft_s(contact.peer)
        self._questions[number] = _Question(query, contact, known == contact, now, now + soft_s)
        request = self._signed_off(request, any(addr.is_loopback for addr in contact.addrs))
        self._actions.append(Ask(number, contact, request, self.timeouts.hard_s(contact.peer)))
        return soft_s

    def _signed_off(self, message: Message, local: bool) -> Message:
        """The message with our name and addresses, if we are a server that others may dial."""
        if not (self.server_mode and self.addrs):
            return message
        return replace(message, sender=KadPeer(self.own, wire_addrs(self.addrs, local)))

    def _drop(self, question: _Question, now: float) -> None:
        query = question.query
        if query is not None and query.id in self._active:
            query.on_failure(question.contact.peer)
            self._advance(query, now)

    def _candidates(self, told: Iterable[KadPeer], seen: Multiaddr | None, now: float) -> list[Contact]:
        found = []
        for peer in told:
            known = self.table.get(peer.peer)
            contact = known or heard_of(peer, is_local(seen))
            if known is None and (not contact.addrs or self._avoided.avoided((contact.peer, contact.addrs), now)):
                continue
            if contact.peer != self.own:
                found.append(contact)
        return self._usable(found, now)

    def _verified(self, query: Locate | None, reply: Message, now: float, wall: float) -> list[Held]:
        """The entries of a reply, checked. Raises RemoteProtocolError for a forgery; untimely ones are left out."""
        if not isinstance(query, Read):
            return []
        held = []
        for leased in reply.entries:
            entry = leased.entry
            if entry.key != query.key:
                raise RemoteProtocolError("entries of another key than was asked for")
            lease_s = entry.lease_s(wall, leased.lease_s)
            old = query.found.get(entry.subkey)
            if lease_s < MIN_LEASE_S or (old is not None and old.entry.seq >= entry.seq):
                continue
            if not self.verifier.check(entry):
                raise RemoteProtocolError(f"entry of {entry.subkey.short} is not signed by it")
            held.append(Held(entry, now + lease_s))
        return held

    # Peers

    def _heard_sender(self, remote: PeerId, seen: Multiaddr | None, sender: KadPeer, now: float) -> None:
        if sender.peer != remote:
            raise RemoteProtocolError(f"{remote.short} says it is {sender.peer.short}")
        contact = heard_of(sender, is_local(seen))
        if contact.addrs:
            self._avoided.succeeded(remote)
            self._enter(contact, seen, now)

    def _enter(self, contact: Contact, seen: Multiaddr | None, now: float) -> None:
        if self.table.heard(contact, now, seen) and len(self._newcomers) < MAX_NEWCOMERS:
            self._newcomers[contact.peer] = None

    def _ping_silent(self, now: float) -> None:
        busy = {question.contact.peer for question in self._questions.values()}
        for contact in self.table.silent(now - self._config.silence_s, self._config.pings):
            if contact.peer not in busy:
                self._ask(None, contact, Message(type=MessageType.PING), now)

    # Our own entries

    def _pace(self) -> float:
        return self._config.republish_s * (0.9 + 0.1 * self._rng.random())

    def _put_own(self, key: bytes, payload: bytes, ttl_s: int, now: float, wall: float) -> int:
        self._seq = next_seq(max(self._seq, self.store.known_seq(key, self.own)), wall)
        entry = sign_entry(self._key, key, payload, seq=self._seq, issued_ms=int(wall * 1000), ttl_s=ttl_s)
        self.store.put(entry, ttl_s, Source(self.own), now)
        lookup = self._lookup(key, self._config.width, now)
        return self._start(Publish(self._number(), lookup, LeasedEntry(entry, ttl_s), self._config.replicas), now)

    def _republish(self, now: float, wall: float) -> None:
        for key, publication in list(self._publications.items()):
            if publication.due <= now:
                publication.due = now + self._pace()
                self._put_own(key, publication.payload, publication.ttl_s, now, wall)

    def _learn_seq(self, reply: Message, now: float, wall: float) -> None:
        """Our clock went backwards: holders know a higher number of ours. Go on from there, at once."""
        for stale in reply.stale:
            plausible = stale.seq <= (wall + 2 * CLOCK_SKEW_S) * 1000
            if stale.subkey == self.own and self._seq < stale.seq and plausible:
                self._seq = stale.seq
                if (publication := self._publications.get(reply.key)) is not None:
                    publication.due = now

    def _hand_over(self, now: float) -> None:
        """Give newcomers the entries they are now among the nearest for, if we are the nearest who has them.

        Two holders do it, for one may be dying; they pass on what is left of each lease.
        """
        newcomers = [contact for peer in self._newcomers if (contact := self.table.get(peer)) is not None]
        self._newcomers.clear()
        keys = self.store.keys() if newcomers else []
        if len(keys) > MAX_HANDOVER_KEYS:
            start = self._handover_from % len(keys)
            self._handover_from = start + MAX_HANDOVER_KEYS
            keys = (keys[start:] + keys[:start])[:MAX_HANDOVER_KEYS]
        for key in keys:
            target = position(key)
            nearest = self.table.closest(target, self._config.replicas)
            ours = distance(self.own.kad_key, target)
            before_us = [c for c in nearest if c not in newcomers and distance(c.key, target) < ours]
            if len(before_us) >= 2:
                continue
            for contact in (contact for contact in nearest if contact in newcomers):
                self._give(key, contact, now)

    def _give(self, key: bytes, contact: Contact, now: float) -> None:
        for batch in iter_batches(self.store.live(key, now)):
            self._ask(None, contact, Message(type=MessageType.PUT_ENTRIES, key=key, entries=batch), now)

    # Reading

    def _read(self, key: bytes, now: float) -> int:
        cached = self._cache.entry(key, now)
        known: dict[PeerId, Held] = {}
        merge(known, self._local(key, now))
        merge(known, (held for held in cached.held.values() if held.expires_at > now))
        query = Read(self._number(), key, self._lookup(key, self._config.width, now), known)
        cached.reading = query.id
        return self._start(query, now)

    def _local(self, key: bytes, now: float) -> Iterable[Held]:
        """What we hold ourselves; live() leaves out leases of less than a second."""
        return (Held(leased.entry, now + leased.lease_s) for leased in self.store.live(key, now))

    def _visible(self, key: bytes, held: Iterable[Held], now: float) -> list[SignedEntry]:
        """Live entries of a read and of our own store together, tombstones having done their work."""
        merged: dict[PeerId, Held] = {}
        merge(merged, held)
        merge(merged, self._local(key, now))
        live = (one.entry for one in merged.values() if one.expires_at > now and not one.entry.tombstone)
        return sorted(live, key=lambda entry: entry.subkey)
