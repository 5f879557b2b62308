"""The DHT as one machine without I/O: requests, answers and the time go in, questions to peers and results come out.

    in     locate, read, publish, withdraw     what our node wants; each returns the id of a query
           handle                              another peer's request; returns the reply
           on_reply, on_failure                what became of an Ask
           tick                                call it when next_timer() has come
    out    actions()                           Ask: put this to that peer; Finished: a query's result

node/discovery.py executes this over streams; tests/sim runs thousands of them on a simulated clock. Queries are in
queries.py, the answering half in answers.py, our announcements in publications.py, the questions in flight and whom to
trust in questions.py, the rounds of maintenance in upkeep.py; this file brings them together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import Final

from ..protocol.errors import RemoteProtocolError
from ..protocol.ids import PeerId, PrivateKey
from ..protocol.kad import MAX_PEERS, KadPeer, LeasedEntry, Message, MessageType
from ..protocol.multiaddr import Multiaddr
from ..protocol.records import SignedEntry
from .actions import Ask, Finished
from .answers import Answers, heard_of, is_local, self_told, wire_addrs
from .cache import FRESH_S, ReadCache
from .content_queries import FindProviders, GetValue
from .keys import position
from .lookup import Lookup, Wait
from .parameters import DhtConfig
from .publications import Publications
from .queries import Deliver, Held, Locate, Publish, Read, Send, merge
from .questions import Question, Questions
from .store import Source, Store, StoreLimits, Verifier
from .table import Contact, Table
from .upkeep import Upkeep
from .whereabouts import Whereabouts

MAX_ACTIVE_QUERIES: Final = 32
"""Queries stepping at once; more wait their turn."""
REACH: Final = 1.3
"""Candidates within the distance of so many times the wanted peers are asked without restraint."""
REGION: Final = 0.7
"""Reads and publications go to all within the distance of so many times the wanted peers, if there are more."""


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
        self.whereabouts = Whereabouts(Random(key.peer_id.raw))
        self._answers = Answers(self.table, self.store, self.verifier, k=self._config.k)
        self.values, self.providers = self._answers.values, self._answers.providers
        self.questions = Questions(key.peer_id, self.table, rng)
        """Those in flight, and the peers not worth one."""
        self._ids = 0
        self._actions: deque[Ask | Finished] = deque()
        self._active: dict[int, Locate] = {}
        self._backlog: deque[Locate] = deque()
        self._publications = Publications(key, rng=rng, republish_s=self._config.republish_s, last_seq=last_seq)
        self.upkeep = Upkeep(self.own, self.table, self.store, self._config, rng=rng, now=now)
        """What is done unasked."""
        self._cache = ReadCache()

    # What our node wants

    def locate(
        self, key: bytes, now: float, *, seeds: Sequence[Contact] = (), width: int | None = None, paths: int = 1
    ) -> int:
        """Find the `width` (k) live peers nearest to a key. Returns the query's id."""
        lookup = self._lookup(key, now, width or self._config.k, paths, seeds)
        return self._start(Locate(self._number(), key, lookup), now)

    def read(self, key: bytes, now: float, *, paths: int | None = None) -> int:
        """Read the entries under a key from its holders. Reads of one key share one query.

        `paths` > 1: over so many disjoint paths, for records that matter; dearer, and harder to hide.
        """
        cached = self._cache.use(key, now)
        return self._read(key, now, paths or self._config.paths) if cached.reading is None else cached.reading

    def recent(self, key: bytes, now: float) -> list[SignedEntry] | None:
        """The entries under a key as of the last seconds, without asking anybody; None: read() it."""
        if now - self._cache.entry(key, now).read_at > FRESH_S:
            return None
        cached = self._cache.use(key, now)
        return self._visible(key, cached.held.values(), now)

    def publish(
        self, key: bytes, payload: bytes, ttl_s: int, now: float, wall: float, *, paths: int | None = None
    ) -> int:
        """Announce a payload under a key until withdraw(); it is signed and put anew every 40 s, and held here too.

        Returns the id of the first round's query. Raises LocalProtocolError for a payload or ttl out of bounds.
        """
        paths = paths or self._config.paths
        entry = self._publications.sign(key, payload, ttl_s, self.store.known_seq(key, self.own), wall)
        self._publications.add(key, payload, ttl_s, paths, now)
        return self._put_own(entry, paths, now)

    def withdraw(self, key: bytes, now: float, wall: float) -> int | None:
        """Put a tombstone over our entry. Returns the query's id, None when nothing was published under the key."""
        publication = self._publications.withdraw(key)
        if publication is None:
            return None
        known_seq = self.store.known_seq(key, self.own)
        entry = self._publications.sign_tombstone(key, publication, known_seq, wall)
        return self._put_own(entry, publication.paths, now)

    def launch(self, make: Callable[[int, Lookup], Locate], key: bytes, now: float, paths: int | None = None) -> int:
        """Start a query about a key: `make` gets its id and its lookup. Returns the id."""
        width, per_subnet = self._config.width, self._config.per_subnet
        lookup = self._lookup(key, now, width, paths or self._config.paths, per_subnet=per_subnet)
        return self._start(make(self._number(), lookup), now)

    def greet(self, contact: Contact, now: float) -> None:
        """Ask a peer that is connected, and said to be a server, whether it is one; it enters the table by answering.

        Earlier silence is no reason not to: perhaps it is the connection that took so long.
        """
        if contact.peer not in self.table and not self.questions.is_liar(contact.peer, now):
            self._ask(None, contact, Message(type=MessageType.PING), now)

    @property
    def published(self) -> list[bytes]:
        """Keys under which we announce something."""
        return self._publications.keys()

    @property
    def last_seq(self) -> int:
        """Highest sequence number we signed; give it to the next run if clocks may go backwards."""
        return self._publications.last_seq

    # What the network says

    def handle(self, remote: PeerId, seen: Multiaddr | None, request: Message, now: float, wall: float) -> Message:
        """Answer an authenticated peer. Raises RemoteProtocolError when it broke the rules: reset its stream."""
        if self.questions.is_liar(remote, now):
            raise RemoteProtocolError(f"{remote.short} sent forgeries lately and is not answered")
        try:
            if request.sender is not None:
                self._heard_sender(remote, seen, request.sender, now)
            reply = self._answers.answer(remote, seen, request, now, wall)
        except RemoteProtocolError:
            self.misbehaved(remote, now)
            raise
        reply = self._signed_off(replace(reply, coordinate=self.whereabouts.told()), is_local(seen))
        if request.key == self.own.raw and reply.sender is not None:  # for implementations that do not read `sender`
            reply = replace(reply, closer_peers=(reply.sender, *reply.closer_peers[: MAX_PEERS - 1]))
        return reply

    def on_reply(
        self, ask: int, seen: Multiaddr | None, reply: Message, now: float, wall: float, rtt_s: float | None = None
    ) -> None:
        """A peer answered. A forged answer counts as none. `rtt_s`: without what it took to reach the peer."""
        question = self.questions.take(ask)
        if question is None:
            return
        contact, query = self_told(question.contact, seen, reply), question.query
        self.questions.timeouts.observe(contact.peer, now - question.asked_at)
        if query is not None and query.id not in self._active:
            query = None  # it could not wait for this answer
        try:
            held = query.verified(reply, self.verifier, now, wall) if isinstance(query, Read) else []
            self.whereabouts.heard(contact.peer, reply.coordinate, rtt_s or now - question.asked_at, now)
        except RemoteProtocolError:
            self.misbehaved(contact.peer, now)
            self._drop(question, now)
            return
        self._enter(contact, seen, now)
        for stale in reply.stale:
            if stale.subkey == self.own:
                self._publications.learn(reply.key, stale, now, wall)
        if question.around:
            for stranger in self.upkeep.neighbours.strangers(self._candidates(reply, seen, now)):
                self._ask(None, stranger, Message(type=MessageType.PING), now)
        if query is None:
            return
        if isinstance(query, Read):
            merge(query.found, held)
        follow_up = query.on_reply(contact, self._candidates(reply, seen, now), reply, seen)
        if follow_up is not None:
            self._ask(query, contact, follow_up, now)
        self._advance(query, now)

    def on_sent(self, ask: int, now: float) -> None:
        """A question of which no answer comes (kad.UNANSWERED) went out."""
        question = self.questions.take(ask)
        if question is not None and question.query is not None and question.query.id in self._active:
            query, contact = question.query, question.contact
            query.on_reply(contact, [], Message(type=MessageType.ADD_PROVIDER, key=query.key), None)
            self._advance(query, now)

    def on_failure(self, ask: int, now: float) -> None:
        """A peer could not be reached, did not answer in time or answered nonsense."""
        question = self.questions.take(ask)
        if question is None:
            return
        if self.questions.failed(question, now):
            self.upkeep.left(question.contact, now)
        self._drop(question, now)

    def misbehaved(self, peer: PeerId, now: float) -> None:
        """A peer broke the protocol: out of the table, neither asked nor answered for a while."""
        self.table.remove(peer)
        self.questions.lied(peer, now)

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to a peer broke: soon ask whether it still lives."""
        self.table.suspect(peer)

    # Time

    def next_timer(self) -> float:
        """When tick() wants to be called."""
        wakes = [query.wake for query in self._active.values() if query.wake is not None]
        return min([self.upkeep.due_at, *wakes])

    def tick(self, now: float, wall: float) -> None:
        """Move overdue lookups on; every 2 s look after leases, publications, newcomers, silent contacts and cache."""
        for query in list(self._active.values()):
            if query.wake is not None and query.wake <= now:
                self._advance(query, now)
        if not self.upkeep.begin(now):
            return
        self.store.expire(now)
        self._answers.expire(now)
        for key, publication in self._publications.due(now):
            known_seq = self.store.known_seq(key, self.own)
            entry = self._publications.sign(key, publication.payload, publication.ttl_s, known_seq, wall)
            self._put_own(entry, publication.paths, now)
        for contact, request in self.upkeep.questions(self.questions.busy, now):
            self._ask(None, contact, request, now)
        if self.server_mode and (around := self.upkeep.neighbours.due(now)) is not None:
            self._ask(None, *around, now, around=True)
        for key in self._cache.due(now):
            self._read(key, now, self._config.paths)
        if self.upkeep.wants_refresh(now):
            self.refresh(now)

    def refresh(self, now: float) -> list[int]:
        """Look for peers near ourselves and in a random direction. Returns the queries' ids."""
        self.upkeep.refreshing(now)
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

    def _lookup(
        self,
        key: bytes,
        now: float,
        width: int,
        paths: int,
        seeds: Sequence[Contact] = (),
        per_subnet: int | None = None,
    ) -> Lookup:
        target = position(key)
        near = self.table.closest(target, self._config.k)
        near = self.questions.usable(near, now) or near  # all silent: perhaps it was us who could not hear
        return Lookup(
            target,
            [*seeds, *near],
            width=width,
            alpha=self._config.alpha,
            near=self.table.reach(int(REACH * width)),
            paths=paths,
            per_subnet=per_subnet,
            region=0 if per_subnet is None else self._region(width),
            exclude=frozenset((self.own,)),
        )

    def _region(self, width: int) -> int:
        """Where REGION x `width` peers are expected; nowhere while we know too few to tell."""
        return int(REGION * self.table.reach(width)) if len(self.table) >= self._config.k else 0

    def _crowding(self, query: Locate) -> float:
        contacts = query.lookup.closest(self._config.width)
        if len(self.table) < self._config.k or not contacts:
            return 1.0
        farthest = max(contact.place ^ int.from_bytes(query.lookup.target, "big") for contact in contacts)
        return self.table.reach(len(contacts)) / max(1, farthest)

    def _start(self, query: Locate, now: float) -> int:
        if len(self._active) >= MAX_ACTIVE_QUERIES:
            self._backlog.append(query)
        else:
            self._active[query.id] = query
            self._advance(query, now)
        return query.id

    def _advance(self, query: Locate, now: float) -> None:
        while isinstance(step := query.step(now), Send):
            self._ask(query, step.contact, step.request, now)
        if isinstance(step, Wait):
            query.wake = step.until
        elif self._active.pop(query.id, None) is not None:
            self._finish(query, now)

    def _finish(self, query: Locate, now: float) -> None:
        entries: list[SignedEntry] = []
        untimely = 0
        if isinstance(query, Read):
            cached = self._cache.entry(query.key, now)
            cached.held, cached.read_at, cached.reading = query.found, now, None
            entries = self._visible(query.key, query.found.values(), now)
            untimely = len(query.untimely)
        contacts = tuple(query.lookup.closest(self._config.k))
        finished = Finished(query.id, contacts, query.asked, tuple(entries), untimely)
        if isinstance(query, GetValue | FindProviders):
            finished = query.outcome(finished)
        if isinstance(query, Deliver):
            finished = replace(
                finished, holding=tuple(query.holding), subnets=len(query.subnets), crowding=self._crowding(query)
            )
        self._actions.append(finished)
        while self._backlog and len(self._active) < MAX_ACTIVE_QUERIES:
            self._start(self._backlog.popleft(), now)

    def _ask(
        self, query: Locate | None, contact: Contact, request: Message, now: float, *, around: bool = False
    ) -> None:
        """Queue a question."""
        number = self._number()
        limits = self.questions.put(number, query, contact, now, around=around)
        request = self._signed_off(request, any(map(is_local, contact.addrs)))
        self._actions.append(Ask(number, contact, request, limits.hard_s))
        if query is not None:
            query.went_out(contact, limits, now)

    def _signed_off(self, message: Message, local: bool) -> Message:
        """The message with our name and addresses, if we are a server that others may dial."""
        if not (self.server_mode and self.addrs):
            return message
        return replace(message, sender=KadPeer(self.own, wire_addrs(self.addrs, local)))

    def _drop(self, question: Question, now: float) -> None:
        query = question.query
        if query is not None and query.id in self._active:
            query.on_failure(question.contact)
            self._advance(query, now)

    def _candidates(self, reply: Message, seen: Multiaddr | None, now: float) -> list[Contact]:
        return self.questions.candidates(reply.closer_peers, seen, now)

    # Peers

    def _heard_sender(self, remote: PeerId, seen: Multiaddr | None, sender: KadPeer, now: float) -> None:
        if sender.peer != remote:
            raise RemoteProtocolError(f"{remote.short} says it is {sender.peer.short}")
        contact = heard_of(sender, is_local(seen))
        if contact.addrs:
            self._enter(contact, seen, now)

    def _enter(self, contact: Contact, seen: Multiaddr | None, now: float) -> None:
        self.questions.spoke(contact.peer)
        self.upkeep.spoke(contact.peer, now, entered=self.table.heard(contact, now, seen))

    # Our own entries

    def _put_own(self, entry: SignedEntry, paths: int, now: float) -> int:
        self.store.put(entry, entry.ttl_s, Source(self.own), now)
        leased, replicas = LeasedEntry(entry, entry.ttl_s), self._config.replicas
        return self.launch(lambda number, lookup: Publish(number, lookup, leased, replicas), entry.key, now, paths)

    # Reading

    def _read(self, key: bytes, now: float, paths: int) -> int:
        cached = self._cache.entry(key, now)
        known: dict[PeerId, Held] = {}
        merge(known, self._local(key, now))
        merge(known, (held for held in cached.held.values() if held.expires_at > now))
        lookup = self._lookup(key, now, self._config.width, paths, per_subnet=self._config.per_subnet)
        query = Read(self._number(), key, lookup, known)
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
