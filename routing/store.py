"""Entries this node holds for the swarm, in bounded memory, each until its lease ends.

One entry per (key, signer); only a higher sequence number replaces it, and nothing a refused entry does may touch the
accepted one (hivemind's refused stores shorten the life of the newer value). When an entry's lease ends its sequence
number is remembered for a while, so that a replay of it cannot come back to life.

Floods: identities are free, addresses are not. So every entry counts against its source, the subnet it was put from
(or the peer, on local networks, where subnets mean nothing). A source has a byte quota; when the whole store or one
key is full, the fattest source loses its soonest-expiring entries first, so thin, honest sources stay. Signatures
are checked by the caller before put(); Verifier remembers the ones that were.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush, nsmallest
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.kad import PAGE_BYTES, PAGE_ENTRIES, LeasedEntry, entry_size
from ..protocol.records import CLOCK_SKEW_S, MAX_TTL_S, SignedEntry

ENTRY_OVERHEAD: Final = 1024
"""What an entry costs in Python objects beside its payload (measured with tracemalloc: about 0.9 KB)."""
MIN_LEASE_S: Final = 1.0
FLOOR_S: Final = MAX_TTL_S + 2 * CLOCK_SKEW_S
"""How long an ended entry's number is remembered: no replay is valid after it."""
EVICTION_SHARE: Final = 16
"""A full store frees 1/16 at once, so that a flood does not pay a search per entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Caps of a store; the defaults are a node's."""

    entries_per_key: int = 4096
    """Entries under one key."""
    total_bytes: int = 64 << 20
    """All entries, with their overhead."""
    peer_bytes: int = 4 << 20
    """What one peer may have put."""
    subnet_bytes: int = 16 << 20
    """What the peers of one public /24 or /48 may have put."""
    floors: int = 16_384
    """Ended entries whose sequence numbers are remembered."""


class Put(Enum):
    """What became of an entry."""

    ACCEPTED = "accepted"
    STALE = "an entry at least as new is or was here"
    QUOTA = "its source has used up its quota"
    EXPIRED = "its lease is over or lies in the future"


@dataclass(frozen=True, slots=True)
class Source:
    """Who put an entry."""

    peer: PeerId
    """The authenticated peer it came from; not always its signer."""
    subnet: str | None = None
    """Its public subnet; None on local networks."""

    @property
    def name(self) -> PeerId | str:
        """What the entry is counted against when room must be made."""
        return self.peer if self.subnet is None else self.subnet


@dataclass(slots=True, eq=False)
class _Held:
    entry: SignedEntry
    expires_at: float
    source: Source
    size: int


@dataclass(slots=True)
class _Account:
    size: int = 0
    held: dict[tuple[bytes, PeerId], _Held] = field(default_factory=dict)


@dataclass(slots=True)
class _Shelf:
    """The entries under one key; `order` keeps their subkeys sorted for paging."""

    held: dict[PeerId, _Held] = field(default_factory=dict)
    order: list[PeerId] = field(default_factory=list)


class Store:
    """Signed entries by key and signer. `own` never counts as fat: a node keeps its own announcements."""

    def __init__(self, own: PeerId, limits: StoreLimits | None = None) -> None:
        self._own = own
        self._limits = limits or StoreLimits()
        self._shelves: dict[bytes, _Shelf] = {}
        self._accounts: dict[PeerId | str, _Account] = {}
        self._peer_bytes: dict[PeerId, int] = {}
        self._floors: OrderedDict[tuple[bytes, PeerId], tuple[int, float]] = OrderedDict()
        self._expiries: list[tuple[float, int, _Held]] = []
        self._count = 0
        self._size = 0
        self._serial = 0

    def __len__(self) -> int:
        return self._count

    @property
    def size_bytes(self) -> int:
        """Bytes held, overhead included."""
        return self._size

    def keys(self) -> list[bytes]:
        """Keys with at least one entry."""
        return list(self._shelves)

    def known_seq(self, key: bytes, subkey: PeerId) -> int:
        """Highest sequence number known for a signer under a key, -1 when none."""
        shelf = self._shelves.get(key)
        held = None if shelf is None else shelf.held.get(subkey)
        floor = self._floors.get((key, subkey), (-1, 0.0))[0]
        return floor if held is None else max(floor, held.entry.seq)

    def put(self, entry: SignedEntry, lease_s: float, source: Source, now: float) -> Put:
        """Take in a verified entry for `lease_s` seconds from now. A refusal changes nothing."""
        if lease_s < MIN_LEASE_S:
            return Put.EXPIRED
        if entry.seq <= self.known_seq(entry.key, entry.subkey):
            return Put.STALE
        held = _Held(entry, now + lease_s, source, len(entry.payload) + ENTRY_OVERHEAD)
        old = self._held(entry.key, entry.subkey)
        if not self._within_quota(held, old):
            return Put.QUOTA
        if old is not None:
            self._drop(old)
        self._add(held)
        self._make_room(entry.key)
        return Put.ACCEPTED if self._held(entry.key, entry.subkey) is held else Put.QUOTA

    def live(self, key: bytes, now: float) -> list[LeasedEntry]:
        """Every live entry under a key, tombstones included, in order of subkey."""
        shelf = self._shelves.get(key)
        if shelf is None:
            return []
        return [
            LeasedEntry(held.entry, int(held.expires_at - now))
            for held in map(shelf.held.__getitem__, shelf.order)
            if held.expires_at - now >= MIN_LEASE_S
        ]

    def page(self, key: bytes, cursor: bytes, have: bytes, now: float) -> tuple[list[LeasedEntry], bytes]:
        """One page of live entries after `cursor` whose tags are not in `have`, and the cursor of the next page.

        An empty cursor starts, and is returned at the end.
        """
        shelf = self._shelves.get(key)
        if shelf is None:
            return [], b""
        unwanted = {have[at : at + 8] for at in range(0, len(have), 8)}
        start = bisect_right(shelf.order, cursor, key=lambda subkey: subkey.raw)
        found: list[LeasedEntry] = []
        size = 0
        for subkey in shelf.order[start:]:
            held = shelf.held[subkey]
            lease_s = int(held.expires_at - now)
            if lease_s < MIN_LEASE_S or held.entry.tag in unwanted:
                continue
            size += entry_size(held.entry)
            if size > PAGE_BYTES or len(found) == PAGE_ENTRIES:
                return found, found[-1].entry.subkey.raw
            found.append(LeasedEntry(held.entry, lease_s))
        return found, b""

    def expire(self, now: float) -> None:
        """Drop what has outlived its lease; remember its numbers for as long as replays could be valid."""
        while self._expiries and self._expiries[0][0] <= now:
            held = heappop(self._expiries)[2]
            name = (held.entry.key, held.entry.subkey)
            if self._held(*name) is not held:
                continue
            self._drop(held)
            self._floors[name] = (held.entry.seq, now + FLOOR_S)
            self._floors.move_to_end(name)
        while self._floors:
            _, until = next(iter(self._floors.values()))
            if until > now and len(self._floors) <= self._limits.floors:
                break
            self._floors.popitem(last=False)

    def next_expiry(self) -> float | None:
        """When the next lease ends."""
        return self._expiries[0][0] if self._expiries else None

    def _within_quota(self, held: _Held, old: _Held | None) -> bool:
        source = held.source
        if source.peer == self._own:
            return True
        spared = old.size if old is not None and old.source == source else 0
        growth = held.size - spared
        if self._peer_bytes.get(source.peer, 0) + growth > self._limits.peer_bytes:
            return False
        if source.subnet is None:
            return True
        account = self._accounts.get(source.subnet)
        return growth + (0 if account is None else account.size) <= self._limits.subnet_bytes

    def _held(self, key: bytes, subkey: PeerId) -> _Held | None:
        shelf = self._shelves.get(key)
        return None if shelf is None else shelf.held.get(subkey)

    def _add(self, held: _Held) -> None:
        entry, source = held.entry, held.source
        shelf = self._shelves.setdefault(entry.key, _Shelf())
        shelf.held[entry.subkey] = held
        insort(shelf.order, entry.subkey)
        account = self._accounts.setdefault(source.name, _Account())
        account.held[entry.key, entry.subkey] = held
        account.size += held.size
        self._peer_bytes[source.peer] = self._peer_bytes.get(source.peer, 0) + held.size
        self._count += 1
        self._size += held.size
        self._serial += 1
        heappush(self._expiries, (held.expires_at, self._serial, held))
        if len(self._expiries) > 2 * self._count + 1024:  # replaced entries leave their times behind
            self._expiries = [item for item in self._expiries if self._is_held(item[2])]
            heapify(self._expiries)

    def _is_held(self, held: _Held) -> bool:
        return self._held(held.entry.key, held.entry.subkey) is held

    def _drop(self, held: _Held) -> None:
        entry, source = held.entry, held.source
        shelf = self._shelves[entry.key]
        del shelf.held[entry.subkey]
        del shelf.order[bisect_right(shelf.order, entry.subkey) - 1]
        if not shelf.held:
            del self._shelves[entry.key]
        account = self._accounts[source.name]
        del account.held[entry.key, entry.subkey]
        account.size -= held.size
        if not account.held:
            del self._accounts[source.name]
        self._peer_bytes[source.peer] -= held.size
        if not self._peer_bytes[source.peer]:
            del self._peer_bytes[source.peer]
        self._count -= 1
        self._size -= held.size

    def _make_room(self, key: bytes) -> None:
        shelf = self._shelves[key]
        if len(shelf.held) > self._limits.entries_per_key:
            self._drop(self._victim_on(shelf))
        if self._size > self._limits.total_bytes:
            goal = self._limits.total_bytes - self._limits.total_bytes // EVICTION_SHARE
            while self._size > goal and (account := self._fattest()) is not None:
                self._shrink(account, self._size - goal)

    def _victim_on(self, shelf: _Shelf) -> _Held:
        """The soonest-expiring entry of the source with most entries under this key."""
        counts: dict[PeerId | str, int] = {}
        for held in shelf.held.values():
            counts[held.source.name] = counts.get(held.source.name, 0) + 1
        counts.pop(self._own, None)
        fattest = max(counts, key=counts.__getitem__)
        return min(
            (held for held in shelf.held.values() if held.source.name == fattest),
            key=lambda held: held.expires_at,
        )

    def _fattest(self) -> _Account | None:
        others = (account for name, account in self._accounts.items() if name != self._own)
        return max(others, key=lambda account: account.size, default=None)

    def _shrink(self, account: _Account, excess: int) -> None:
        """Drop up to half of an account, soonest-expiring first; stop when `excess` bytes are free."""
        half = (len(account.held) + 1) // 2
        for held in nsmallest(half, account.held.values(), key=lambda held: held.expires_at):
            if excess <= 0:
                return
            excess -= held.size
            self._drop(held)


class Verifier:
    """Checks signatures, each entry once: republished reads and hand-overs bring the same entry many times."""

    def __init__(self, capacity: int = 8192) -> None:
        self._capacity = capacity
        self._known: OrderedDict[bytes, SignedEntry] = OrderedDict()
        self.checked = 0
        """Signatures really verified."""

    def check(self, entry: SignedEntry) -> bool:
        """True when the signature is the signer's."""
        if self._known.get(entry.signature) == entry:
            self._known.move_to_end(entry.signature)
            return True
        self.checked += 1
        if not entry.verify():
            return False
        self._known[entry.signature] = entry
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return True


def iter_batches(entries: list[LeasedEntry]) -> Iterator[tuple[LeasedEntry, ...]]:
    """Cut entries into messages' worth: at most a page of bytes and of entries each."""
    batch: list[LeasedEntry] = []
    size = 0
    for leased in entries:
        cost = entry_size(leased.entry)
        if batch and (size + cost > PAGE_BYTES or len(batch) == PAGE_ENTRIES):
            yield tuple(batch)
            batch, size = [], 0
        batch.append(leased)
        size += cost
    if batch:
        yield tuple(batch)
