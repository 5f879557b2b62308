"""The routing table: the live servers a node knows, many near itself and few far away.

Buckets by shared prefix length (Kademlia section 2.4, without the tree), k contacts each, plus a replacement cache:
a newcomer never pushes out a contact that works, which is what makes tables hard to flood. Only peers we talked to
enter; what others tell about third parties is for lookups alone. A contact that failed once is no longer told to
others and goes when a replacement waits or on its second failure.

Sybil limits: at most 2 contacts of one /24 (IPv6: /48) in a bucket and 10 in the table, by the address the peer was
really seen at. Loopback, in-memory and private networks are exempt: a laboratory or home swarm is one subnet.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from heapq import nsmallest
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from .keys import KEY_BITS

K: Final = 20
REPLACEMENTS: Final = 10
BUCKET_SUBNET_LIMIT: Final = 2
TABLE_SUBNET_LIMIT: Final = 10
MAX_FAILURES: Final = 2
RECHECK_S: Final = 5.0
"""A contact that failed is asked again after this: it is told to nobody until it answers, and goes if it does not."""
SILENCE_FACTOR: Final = 10
"""How much longer than a new contact an old one may be silent before it is asked whether it lives."""
SEEN_CACHED: Final = 8192
"""Addresses whose subnet is remembered: parsing one takes longer than answering a ping."""
_LOCAL_NETWORKS: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16",
        "::1/128", "fc00::/7", "fe80::/10",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contact:
    """A peer and how to reach it."""

    peer: PeerId
    """Its id."""
    addrs: tuple[Multiaddr, ...] = ()
    """Where it listens; may be empty while a connection to it is open."""
    key: bytes = field(init=False, repr=False, compare=False)
    """Its position in the key space."""
    place: int = field(init=False, repr=False, compare=False)
    """The same as a number: distances are taken thousands of times a second."""

    def __post_init__(self) -> None:
        key = self.peer.kad_key
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "place", int.from_bytes(key, "big"))


@dataclass(slots=True)
class _Row:
    contact: Contact
    bucket: int
    subnet: str | None
    since: float
    seen_at: float
    failures: int = 0
    failed_at: float = 0.0


@dataclass(slots=True)
class _Bucket:
    rows: OrderedDict[PeerId, _Row] = field(default_factory=OrderedDict)
    """Live contacts, the one longest silent first."""
    spare: OrderedDict[PeerId, _Row] = field(default_factory=OrderedDict)
    """Replacements, the freshest last."""


@lru_cache(SEEN_CACHED)
def subnet_of(addr: Multiaddr | None) -> str | None:
    """The /24 or /48 an address belongs to; None for what is not counted (local networks, memory, names)."""
    address = None if addr is None else addr.ip
    if address is None:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if any(address in network for network in _LOCAL_NETWORKS if network.version == address.version):
        return None
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 48), strict=False))


class Table:
    """Contacts by distance from our own key. All methods take the time as `now`, monotonic seconds."""

    def __init__(self, own_key: bytes, *, k: int = K) -> None:
        self._own_place = int.from_bytes(own_key, "big")
        self._k = k
        self._buckets: dict[int, _Bucket] = {}
        self._rows: dict[PeerId, _Row] = {}
        self._subnets: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._rows

    def __iter__(self) -> Iterator[Contact]:
        for index in sorted(self._buckets):
            yield from (row.contact for row in self._buckets[index].rows.values())

    def get(self, peer: PeerId) -> Contact | None:
        """The contact of a peer in the table, None when it is not there (replacements do not count)."""
        row = self._rows.get(peer)
        return None if row is None else row.contact

    def seen_at(self, peer: PeerId) -> float | None:
        """When a contact last spoke to us."""
        row = self._rows.get(peer)
        return None if row is None else row.seen_at

    def known_since(self, peer: PeerId) -> float | None:
        """When a contact entered the table."""
        row = self._rows.get(peer)
        return None if row is None else row.since

    def heard(self, contact: Contact, now: float, seen: Multiaddr | None = None) -> bool:
        """Note that a server spoke to us, from address `seen`. True when it newly entered the table."""
        row = self._rows.get(contact.peer)
        if row is not None:
            if contact.addrs:
                row.contact = contact
            row.seen_at = now
            row.failures = 0
            self._buckets[row.bucket].rows.move_to_end(contact.peer)
            return False
        if contact.place == self._own_place:
            return False
        index = self._index(contact.place)
        bucket = self._buckets.setdefault(index, _Bucket())
        bucket.spare.pop(contact.peer, None)
        return self._admit(bucket, _Row(contact, index, subnet_of(seen), now, now))

    def failed(self, peer: PeerId, now: float) -> bool:
        """Note that a contact did not answer. True when it left the table for it."""
        row = self._rows.get(peer)
        if row is None:
            self._forget_spare(peer)
            return False
        row.failures += 1
        row.failed_at = now
        if row.failures < MAX_FAILURES and not self._buckets[row.bucket].spare:
            return False
        self.remove(peer)
        return True

    def remove(self, peer: PeerId) -> None:
        """Drop a contact at once and let the freshest replacement that fits take its place."""
        row = self._rows.pop(peer, None)
        if row is None:
            self._forget_spare(peer)
            return
        bucket = self._buckets[row.bucket]
        del bucket.rows[peer]
        if row.subnet is not None:
            self._subnets[row.subnet] -= 1
            if not self._subnets[row.subnet]:
                del self._subnets[row.subnet]
        for name in reversed(bucket.spare):
            if self._fits(bucket, bucket.spare[name].subnet):
                self._enter(bucket, bucket.spare.pop(name))
                return

    def closest(self, key: bytes, count: int) -> list[Contact]:
        """The `count` contacts without failures that are nearest to a key, nearest first."""
        place = int.from_bytes(key, "big")
        found: list[Contact] = []
        for indices in self._near_to_far(self._index(place)):
            for index in indices:
                found += [row.contact for row in self._buckets[index].rows.values() if not row.failures]
            if len(found) >= count:
                break
        found.sort(key=lambda contact: contact.place ^ place)
        return found[:count]

    def reach(self, count: int) -> int:
        """Distance within which, at the density of peers near ourselves, about `count` peers lie around any key.

        The largest number when we know fewer than k peers: then there may be no others.
        """
        near: list[int] = []
        for index in sorted(self._buckets, reverse=True):
            near += [row.contact.place ^ self._own_place for row in self._buckets[index].rows.values()]
            if len(near) >= self._k:
                return sorted(near)[self._k - 1] * count // self._k
        return 1 << KEY_BITS

    def silent(self, now: float, base_s: float, count: int) -> list[Contact]:
        """Up to `count` contacts due to be asked whether they still live, the longest silent first.

        One is due after `base_s` of silence, but after half the time it has been known if that is longer: peers that
        have stayed long tend to stay (Kademlia section 4.1), and asking 200 of them every minute is most of the traffic
        of an idle node. One that failed is due after RECHECK_S.
        """
        silent = [
            (row.seen_at, row.contact.place, row.contact)
            for row in self._rows.values()
            if now - row.seen_at > min(max(base_s, (row.seen_at - row.since) / 2), SILENCE_FACTOR * base_s)
            or (row.failures and now - row.failed_at > RECHECK_S)
        ]
        return [contact for _, _, contact in nsmallest(count, silent, key=lambda item: item[:2])]

    def suspect(self, peer: PeerId) -> None:
        """Make a contact the first to be asked whether it still lives (its connection broke, say)."""
        row = self._rows.get(peer)
        if row is not None:
            row.seen_at = float("-inf")
            self._buckets[row.bucket].rows.move_to_end(peer, last=False)

    def _admit(self, bucket: _Bucket, row: _Row) -> bool:
        if self._fits(bucket, row.subnet):
            if len(bucket.rows) < self._k:
                self._enter(bucket, row)
                return True
            failing = next((peer for peer, old in bucket.rows.items() if old.failures), None)
            if failing is not None:
                bucket.spare[row.contact.peer] = row
                self.remove(failing)
                return row.contact.peer in bucket.rows
        bucket.spare[row.contact.peer] = row
        if len(bucket.spare) > REPLACEMENTS:
            bucket.spare.popitem(last=False)
        return False

    def _enter(self, bucket: _Bucket, row: _Row) -> None:
        bucket.rows[row.contact.peer] = self._rows[row.contact.peer] = row
        if row.subnet is not None:
            self._subnets[row.subnet] += 1

    def _fits(self, bucket: _Bucket, subnet: str | None) -> bool:
        if subnet is None:
            return True
        beside = sum(row.subnet == subnet for row in bucket.rows.values())
        return beside < BUCKET_SUBNET_LIMIT and self._subnets[subnet] < TABLE_SUBNET_LIMIT

    def _forget_spare(self, peer: PeerId) -> None:
        bucket = self._buckets.get(self._index(int.from_bytes(peer.kad_key, "big")))
        if bucket is not None:
            bucket.spare.pop(peer, None)

    def _index(self, place: int) -> int:
        return min(KEY_BITS - (place ^ self._own_place).bit_length(), KEY_BITS - 1)

    def _near_to_far(self, index: int) -> Iterator[Sequence[int]]:
        """Bucket groups in order of distance from a key in bucket `index`: it, all nearer to us, then outwards."""
        if index in self._buckets:
            yield (index,)
        yield [other for other in self._buckets if other > index]
        yield from ((other,) for other in sorted(self._buckets, reverse=True) if other < index)
