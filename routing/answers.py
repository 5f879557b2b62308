"""The serving half of the DHT: answers other peers' requests from the table and the store.

A request is answered or it is the asker's fault (RemoteProtocolError: the stream is reset, the peer avoided). What is
merely untimely (expired, future-dated, already known, over quota) is left out without a fuss: clocks differ, and
hand-overs overlap. Cheap checks come before signatures; one forged entry condemns the whole message.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from typing import Final

from ..protocol.errors import RemoteProtocolError
from ..protocol.ids import PeerId
from ..protocol.kad import MAX_ADDR_BYTES, MAX_ADDRS, MAX_PEERS, KadPeer, Message, MessageType, Stale
from ..protocol.multiaddr import Multiaddr
from ..protocol.records import KEY_BYTES, TAG_BYTES
from .content import Providers, Values
from .keys import position
from .store import MIN_LEASE_S, Put, Source, Store, Verifier
from .table import Contact, Table, subnet_of

ADDRESSES_CACHED: Final = 2048
"""The same peers come up in answer after answer; converting their addresses was half the work of a lookup."""


class Answers:
    """Reads and changes the node's table and stores on behalf of others."""

    def __init__(self, table: Table, store: Store, verifier: Verifier, *, k: int) -> None:
        self._table = table
        self._store = store
        self._verifier = verifier
        self._k = k
        self.values = Values()
        """libp2p's values, kept for others."""
        self.providers = Providers()
        """libp2p's providers."""

    def answer(self, remote: PeerId, seen: Multiaddr | None, request: Message, now: float, wall: float) -> Message:
        """The reply to a request of an authenticated peer (of UNANSWERED types, it stays here).

        Raises RemoteProtocolError when it broke the rules.
        """
        match request.type:
            case MessageType.PING:
                return Message(type=MessageType.PING)
            case MessageType.PUT_ENTRIES:
                return self._put(request, Source(remote, subnet_of(seen)), now, wall)
            case MessageType.GET_ENTRIES:
                return self._page(remote, seen, request, now)
            case MessageType.PUT_VALUE:
                return self._put_value(request, now)
            case MessageType.ADD_PROVIDER:
                self._add_provider(remote, seen, request, now)
                return Message(type=request.type, key=request.key)
            case MessageType.GET_VALUE:
                closer = self._closer(remote, seen, request)
                record = self.values.get(request.key, now)
                return Message(type=request.type, key=request.key, closer_peers=closer, record=record)
            case MessageType.GET_PROVIDERS:
                closer = self._closer(remote, seen, request)
                named = self._named(request.key, is_local(seen), now)
                return Message(type=request.type, key=request.key, closer_peers=closer, provider_peers=named)
            case _:
                return Message(type=request.type, key=request.key, closer_peers=self._closer(remote, seen, request))

    def _put_value(self, request: Message, now: float) -> Message:
        """The record comes back if it is kept; a value of another namespace is refused without a quarrel."""
        record = request.record
        if record is None or record.key != request.key:
            raise RemoteProtocolError("a value to keep comes in a record with the message's key")
        kept = record if self.values.put(record, now) else None
        return Message(type=request.type, key=request.key, record=kept)

    def _add_provider(self, remote: PeerId, seen: Multiaddr | None, request: Message, now: float) -> None:
        """Only what the asker says of itself counts."""
        own = next((peer for peer in request.provider_peers if peer.peer == remote), None)
        if own is not None:
            addrs = usable_addrs(own.addrs, is_local(seen))
            self.providers.add(request.key, KadPeer(remote, wire_addrs(addrs, True)), now)

    def _named(self, key: bytes, local: bool, now: float) -> tuple[KadPeer, ...]:
        """The freshest providers of a key, as one may hear of them."""
        found = islice(self.providers.get(key, now), MAX_PEERS)
        return tuple(KadPeer(peer.peer, wire_addrs(usable_addrs(peer.addrs, True), local)) for peer in found)

    def expire(self, now: float) -> None:
        """Forget values and providers whose time is over; the store of entries looks after itself."""
        self.values.expire(now)
        self.providers.expire(now)

    def _put(self, request: Message, source: Source, now: float, wall: float) -> Message:
        stale: list[Stale] = []
        accepted = 0
        for leased in request.entries:
            entry = leased.entry
            lease_s = entry.lease_s(wall, leased.lease_s)
            if lease_s < MIN_LEASE_S:
                continue
            known = self._store.known_seq(entry.key, entry.subkey)
            if known > entry.seq:
                stale.append(Stale(entry.subkey, known))
            elif known == entry.seq:
                accepted += 1
            elif not self._verifier.check(entry):
                raise RemoteProtocolError(f"entry of {entry.subkey.short} is not signed by it")
            else:
                accepted += self._store.put(entry, lease_s, source, now) is Put.ACCEPTED
        return Message(type=request.type, key=request.key, stale=tuple(stale), accepted=accepted)

    def _page(self, remote: PeerId, seen: Multiaddr | None, request: Message, now: float) -> Message:
        if len(request.key) != KEY_BYTES:
            raise RemoteProtocolError(f"entries have keys of {KEY_BYTES} bytes, not {len(request.key)}")
        entries, cursor = self._store.page(request.key, request.cursor, request.have, now)
        return Message(
            type=MessageType.GET_ENTRIES,
            key=request.key,
            entries=tuple(entries),
            cursor=cursor,
            closer_peers=() if request.cursor else self._closer(remote, seen, request),
        )

    def _closer(self, remote: PeerId, seen: Multiaddr | None, request: Message) -> tuple[KadPeer, ...]:
        """The nearest k but those the asker has, out of the nearest 3 k / 2: further ones are others' business."""
        have, local = request.have, is_local(seen)
        unwanted = {have[at : at + TAG_BYTES] for at in range(0, len(have), TAG_BYTES)}
        found = self._table.closest(position(request.key), self._k + 1 + (self._k // 2 if unwanted else 0))
        named = (c for c in found if c.peer != remote and peer_tag(c.key) not in unwanted)
        return tuple(told(contact, local) for contact in islice(named, self._k))


def peer_tag(key: bytes) -> bytes:
    """Short name of a peer, by its position, for telling another which peers one already knows."""
    return key[:TAG_BYTES]


@lru_cache(ADDRESSES_CACHED)
def is_local(seen: Multiaddr | None) -> bool:
    """True when the peer at this address shares our machine, so loopback addresses mean the same to it."""
    return seen is None or seen.is_loopback


def told(contact: Contact, local: bool) -> KadPeer:
    """A contact as others hear of it; loopback addresses are told on the same machine only."""
    return KadPeer(contact.peer, wire_addrs(contact.addrs, local))


@lru_cache(ADDRESSES_CACHED)
def wire_addrs(addrs: tuple[Multiaddr, ...], local: bool) -> tuple[bytes, ...]:
    """Binary addresses for a message, capped, without loopback ones unless both ends are on one machine."""
    chosen = (addr.without_peer().to_bytes() for addr in addrs if local or not addr.is_loopback)
    return tuple([raw for raw in chosen if len(raw) <= MAX_ADDR_BYTES][:MAX_ADDRS])


@lru_cache(ADDRESSES_CACHED)
def usable_addrs(raws: tuple[bytes, ...], local: bool) -> tuple[Multiaddr, ...]:
    """The addresses of a message we can parse, without those that would mean our own machine."""
    addrs = []
    for raw in raws:
        try:
            addr = Multiaddr.from_bytes(raw).without_peer()
        except RemoteProtocolError:
            continue  # a transport we do not know
        if local or not addr.is_loopback:
            addrs.append(addr)
    return tuple(dict.fromkeys(addrs))  # js-libp2p tells some twice, with and without /p2p


def heard_of(peer: KadPeer, local: bool) -> Contact:
    """A contact as others told us."""
    return Contact(peer.peer, usable_addrs(peer.addrs, local))


def self_told(contact: Contact, seen: Multiaddr | None, reply: Message) -> Contact:
    """The contact with the addresses it tells itself; of those others told, only one that just worked is kept."""
    if reply.sender is None or reply.sender.peer != contact.peer:
        return contact
    told = heard_of(reply.sender, is_local(seen))
    worked = [addr for addr in contact.addrs if addr == seen]
    return Contact(contact.peer, tuple(dict.fromkeys((*worked, *told.addrs)))) if told.addrs else contact
