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
from heapq import nsmallest
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from .keys import KEY_BITS, common_prefix_bits, distance

K: Final = 20
REPLACEMENTS: Final = 10
BUCKET_SUBNET_LIMIT: Final = 2
TABLE_SUBNET_LIMIT: Final = 10
MAX_FAILURES: Final = 2
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.peer.kad_key)


@dataclass(slots=True)
class _Row:
    contact: Contact
    subnet: str | None
    seen_at: float
    failures: int = 0


@dataclass(slots=True)
class _Bucket:
    rows: OrderedDict[PeerId, _Row] = field(default_factory=OrderedDict)
    """Live contacts, the one longest silent first."""
    spare: OrderedDict[PeerId, _Row] = field(default_factory=OrderedDict)
    """Replacements, the freshest last."""


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
        self._own_key = own_key
        self._k = k
        self._buckets: dict[int, _Bucket] = {}
        self._subnets: Counter[str] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, peer: PeerId) -> bool:
        return self.get(peer) is not None

    def __iter__(self) -> Iterator[Contact]:
        for index in sorted(self._buckets):
            yield from (row.contact for row in self._buckets[index].rows.values())

    def get(self, peer: PeerId) -> Contact | None:
        """The contact of a peer in the table, None when it is not there (replacements do not count)."""
        row = self._row(peer)
        return None if row is None else row.contact

    def seen_at(self, peer: PeerId) -> float | None:
        """When a contact last spoke to us."""
        row = self._row(peer)
        return None if row is None else row.seen_at

    def heard(self, contact: Contact, now: float, seen: Multiaddr | None = None) -> bool:
        """Note that a server spoke to us, from address `seen`. True when it newly entered the table."""
        if contact.key == self._own_key:
            return False
        bucket = self._buckets.setdefault(self._index(contact.key), _Bucket())
        row = bucket.rows.get(contact.peer)
        if row is not None:
            if contact.addrs:
                row.contact = contact
            row.seen_at = now
            row.failures = 0
            bucket.rows.move_to_end(contact.peer)
            return False
        bucket.spare.pop(contact.peer, None)
        return self._admit(bucket, _Row(contact, subnet_of(seen), now))

    def failed(self, peer: PeerId) -> bool:
        """Note that a contact did not answer. True when it left the table for it."""
        bucket = self._buckets.get(self._index(peer.kad_key))
        if bucket is None:
            return False
        bucket.spare.pop(peer, None)
        row = bucket.rows.get(peer)
        if row is None:
            return False
        row.failures += 1
        if row.failures < MAX_FAILURES and not bucket.spare:
            return False
        self.remove(peer)
        return True

    def remove(self, peer: PeerId) -> None:
        """Drop a contact at once and let the freshest replacement that fits take its place."""
        bucket = self._buckets.get(self._index(peer.kad_key))
        if bucket is None:
            return
        bucket.spare.pop(peer, None)
        row = bucket.rows.pop(peer, None)
        if row is None:
            return
        self._size -= 1
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
        found: list[Contact] = []
        for indices in self._near_to_far(self._index(key)):
            for index in indices:
                rows = self._buckets[index].rows.values()
                found += [row.contact for row in rows if not row.failures]
            if len(found) >= count:
                break
        return nsmallest(count, found, key=lambda contact: distance(contact.key, key))

    def silent(self, before: float, count: int) -> list[Contact]:
        """Up to `count` contacts that have not spoken since `before`, the longest silent first."""
        oldest = [
            (row.seen_at, row.contact.key, row.contact)
            for bucket in self._buckets.values()
            for row in bucket.rows.values()
            if row.seen_at < before
        ]
        return [contact for _, _, contact in nsmallest(count, oldest, key=lambda item: item[:2])]

    def suspect(self, peer: PeerId) -> None:
        """Make a contact the first to be asked whether it still lives (its connection broke, say)."""
        row = self._row(peer)
        if row is not None:
            row.seen_at = float("-inf")

    def depth(self) -> int:
        """Highest prefix length with a contact: how many bucket refreshes are worth it."""
        return max((index for index, bucket in self._buckets.items() if bucket.rows), default=0)

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
        bucket.rows[row.contact.peer] = row
        self._size += 1
        if row.subnet is not None:
            self._subnets[row.subnet] += 1

    def _fits(self, bucket: _Bucket, subnet: str | None) -> bool:
        if subnet is None:
            return True
        beside = sum(row.subnet == subnet for row in bucket.rows.values())
        return beside < BUCKET_SUBNET_LIMIT and self._subnets[subnet] < TABLE_SUBNET_LIMIT

    def _row(self, peer: PeerId) -> _Row | None:
        bucket = self._buckets.get(self._index(peer.kad_key))
        return None if bucket is None else bucket.rows.get(peer)

    def _index(self, key: bytes) -> int:
        return min(common_prefix_bits(self._own_key, key), KEY_BITS - 1)

    def _near_to_far(self, index: int) -> Iterator[Sequence[int]]:
        """Bucket groups in order of distance from a key in bucket `index`: it, all nearer to us, then outwards."""
        if index in self._buckets:
            yield (index,)
        yield [other for other in self._buckets if other > index]
        yield from ((other,) for other in sorted(self._buckets, reverse=True) if other < index)
