"""Kademlia messages: libp2p's protobuf on `/swarmnode/kad/1.0.0`, with an extension for signed entries.

A request and its reply are one Message each, uvarint-length-delimited, several requests after one another on a
stream. Fields 1 to 10 are libp2p's (specs, kad-dht), so its implementations can be tested against us; ours are 100
and up, which others skip as unknown:

    100 entries     repeated Entry, in PUT_ENTRIES requests and GET_ENTRIES replies
    101 sender      Peer: the speaker's own id and listen addresses. Absent: a client that must not be dialed back
    102 cursor      where the next page starts (request), or that there is one (reply)
    103 have        8-byte tags of entries the asker already holds and does not want again
    104 stale       repeated Stale, in PUT_ENTRIES replies: a higher sequence number is known for that subkey
    105 accepted    how many entries of a PUT_ENTRIES are held now; the rest were stale, untimely or over quota

Two traps: js-libp2p leaves out enum value 0, so an absent type is PUT_VALUE; and peers announce addresses of
transports we do not know, so addresses stay bytes here and the reader skips what it cannot parse. Everything has a
cap, checked while parsing; the stream reader checks MAX_MESSAGE_BYTES before it buffers anything.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from . import protobuf
from .errors import RemoteProtocolError
from .ids import PeerId
from .records import KEY_BYTES, MAX_SEQ, SIGNATURE_BYTES, TAG_BYTES, SignedEntry

PROTOCOL: Final = "/swarmnode/kad/1.0.0"
MAIN_SWARM: Final = "main"
MAX_MESSAGE_BYTES: Final = 128 * 1024
"""Longest message read. A full page of entries is half of it, 20 peers with 8 addresses each at most 82 KB."""
PAGE_BYTES: Final = 64 * 1024
"""Entries in one message add up to at most this."""
PAGE_ENTRIES: Final = 64
"""Most entries in one message: verifying them takes about 6 ms, which is what an event loop can spare."""
MAX_PEERS: Final = 20
MAX_ADDRS: Final = 8
MAX_ADDR_BYTES: Final = 512
MAX_KEY_BYTES: Final = 128
"""libp2p looks up peers by the raw bytes of an id and providers by multihash."""
MAX_HAVE_BYTES: Final = 4096 * TAG_BYTES
MAX_CURSOR_BYTES: Final = 64
MAX_VALUE_BYTES: Final = 16 * 1024
_COORDINATE: Final = struct.Struct("<4f")


def protocol_of(swarm: str) -> str:
    """The protocol id of a swarm's DHT. Each swarm but the main one has its own, so that their tables never mix."""
    return PROTOCOL if swarm == MAIN_SWARM else f"{PROTOCOL}/{swarm}"


class MessageType(IntEnum):
    """What a request asks; a reply repeats it."""

    PUT_VALUE = 0
    GET_VALUE = 1
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5
    PUT_ENTRIES = 64
    GET_ENTRIES = 65


UNANSWERED: Final = frozenset({MessageType.ADD_PROVIDER})
"""Requests without a reply, as in go-libp2p and js-libp2p."""


class Connection(IntEnum):
    """What the sender of a Peer knows about reaching it (libp2p's ConnectionType)."""

    NOT_CONNECTED = 0
    CONNECTED = 1
    CAN_CONNECT = 2
    CANNOT_CONNECT = 3


@dataclass(frozen=True, slots=True)
class KadPeer:
    """A peer and where it is said to listen."""

    peer: PeerId
    """Its id."""
    addrs: tuple[bytes, ...] = ()
    """Binary multiaddresses, unparsed, at most 8."""
    connection: Connection = Connection.NOT_CONNECTED
    """What the teller knows about reaching it."""


@dataclass(frozen=True, slots=True)
class Record:
    """A libp2p value record; what our own nodes announce is entries instead."""

    key: bytes
    """What it is filed under."""
    value: bytes
    """Opaque value."""


@dataclass(frozen=True, slots=True)
class LeasedEntry:
    """An entry as a holder gives it: with what is left of its lease there."""

    entry: SignedEntry
    """The signed entry."""
    lease_s: int
    """Whole seconds left, at least 1; never more than the entry's ttl."""


@dataclass(frozen=True, slots=True)
class Stale:
    """A refused entry of a PUT: this holder knows a higher sequence number."""

    subkey: PeerId
    """Whose entry."""
    seq: int
    """The highest number known there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One request or reply."""

    type: MessageType
    """What is asked or answered."""
    key: bytes = b""
    """Target: a 32-byte DHT key for entries, raw peer id bytes or any key for FIND_NODE."""
    record: Record | None = None
    """libp2p value record."""
    closer_peers: tuple[KadPeer, ...] = ()
    """Peers the answerer knows nearest to the key."""
    provider_peers: tuple[KadPeer, ...] = ()
    """libp2p providers; those beyond the first 20 are not read."""
    entries: tuple[LeasedEntry, ...] = ()
    """Signed entries, put or found, all under `key`."""
    sender: KadPeer | None = None
    """The speaker, if it is a server."""
    cursor: bytes = b""
    """Position in a listing of several pages."""
    have: bytes = b""
    """Concatenated tags of entries not wanted again."""
    stale: tuple[Stale, ...] = ()
    """Entries refused because newer ones are known."""
    accepted: int = 0
    """Entries of a put that are held now."""
    coordinate: tuple[float, float, float, float] | None = None
    """x, y, height and error of the answerer, finite; the reader checks their bounds."""

    def encode(self) -> bytes:
        """Protobuf bytes, without the length in front."""
        fields: list[tuple[int, int | bytes | str | memoryview]] = [(1, int(self.type))]
        if self.key:
            fields.append((2, self.key))
        if self.record is not None:
            fields.append((3, protobuf.encode([(1, self.record.key), (2, self.record.value)])))
        fields.extend((8, _encode_peer(peer)) for peer in self.closer_peers)
        fields.extend((9, _encode_peer(peer)) for peer in self.provider_peers)
        fields.extend((100, encode_entry(leased)) for leased in self.entries)
        if self.sender is not None:
            fields.append((101, _encode_peer(self.sender)))
        if self.cursor:
            fields.append((102, self.cursor))
        if self.have:
            fields.append((103, self.have))
        fields.extend((104, protobuf.encode([(1, item.subkey.raw), (2, item.seq)])) for item in self.stale)
        if self.accepted:
            fields.append((105, self.accepted))
        if self.coordinate is not None:
            fields.append((106, _COORDINATE.pack(*self.coordinate)))
        return protobuf.encode(fields)

    @classmethod
    def decode(cls, data: bytes) -> Message:
        """Parse a message; signatures are not checked. Raises RemoteProtocolError when malformed or over a cap."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise RemoteProtocolError(f"kad message of {len(data)} bytes is over {MAX_MESSAGE_BYTES}")
        fields = protobuf.decode(data)
        key = _bounded(fields, 2, MAX_KEY_BYTES, "key")
        sender = protobuf.all_bytes(fields, 101)
        have = _bounded(fields, 103, MAX_HAVE_BYTES, "have")
        if len(have) % TAG_BYTES:
            raise RemoteProtocolError(f"kad have-list of {len(have)} bytes is not made of {TAG_BYTES}-byte tags")
        return cls(
            type=_message_type(protobuf.first_int(fields, 1)),
            key=key,
            record=_decode_record(protobuf.first_bytes(fields, 3)) if 3 in fields else None,
            closer_peers=tuple(map(_decode_peer, _repeated(fields, 8, MAX_PEERS))),
            provider_peers=tuple(map(_decode_peer, protobuf.all_bytes(fields, 9)[:MAX_PEERS])),
            entries=_decode_entries(key, _repeated(fields, 100, PAGE_ENTRIES)),
            sender=_decode_peer(sender[-1]) if sender else None,
            cursor=_bounded(fields, 102, MAX_CURSOR_BYTES, "cursor"),
            have=have,
            stale=tuple(map(_decode_stale, _repeated(fields, 104, PAGE_ENTRIES))),
            accepted=min(protobuf.first_int(fields, 105), PAGE_ENTRIES),
            coordinate=_decode_coordinate(protobuf.first_bytes(fields, 106)) if 106 in fields else None,
        )


def encode_entry(leased: LeasedEntry) -> bytes:
    """An entry without its key, which the message carries once."""
    entry = leased.entry
    return protobuf.encode(
        [
            (1, entry.subkey.raw),
            (2, entry.payload),
            (3, entry.seq),
            (4, entry.issued_ms),
            (5, entry.ttl_s),
            (6, entry.signature),
            (7, leased.lease_s),
        ]
    )


def entry_size(entry: SignedEntry) -> int:
    """Upper bound of an entry's bytes inside a message."""
    return len(entry.payload) + len(entry.subkey.raw) + SIGNATURE_BYTES + 44


def _decode_entries(key: bytes, chunks: list[bytes]) -> tuple[LeasedEntry, ...]:
    if not chunks:
        return ()
    if len(key) != KEY_BYTES:
        raise RemoteProtocolError(f"kad entries need a key of {KEY_BYTES} bytes, not {len(key)}")
    if sum(map(len, chunks)) > PAGE_BYTES:
        raise RemoteProtocolError(f"kad page of entries is over {PAGE_BYTES} bytes")
    return tuple(_decode_entry(key, chunk) for chunk in chunks)


def _decode_entry(key: bytes, chunk: bytes) -> LeasedEntry:
    fields = protobuf.decode(chunk)
    entry = SignedEntry(
        key=key,
        subkey=PeerId(protobuf.first_bytes(fields, 1)),
        payload=protobuf.first_bytes(fields, 2),
        seq=protobuf.first_int(fields, 3),
        issued_ms=protobuf.first_int(fields, 4),
        ttl_s=protobuf.first_int(fields, 5),
        signature=protobuf.first_bytes(fields, 6),
    )
    lease_s = protobuf.first_int(fields, 7)
    if not 0 < lease_s <= entry.ttl_s:
        raise RemoteProtocolError(f"kad lease of {lease_s} s is outside 1..{entry.ttl_s}")
    return LeasedEntry(entry, lease_s)


def _encode_peer(peer: KadPeer) -> bytes:
    fields: list[tuple[int, int | bytes | str | memoryview]] = [(1, peer.peer.raw)]
    fields.extend((2, addr) for addr in peer.addrs)
    if peer.connection:
        fields.append((3, int(peer.connection)))
    return protobuf.encode(fields)


def _decode_peer(chunk: bytes) -> KadPeer:
    fields = protobuf.decode(chunk)
    addrs = protobuf.all_bytes(fields, 2)[:MAX_ADDRS]
    number = protobuf.first_int(fields, 3)
    return KadPeer(
        PeerId(protobuf.first_bytes(fields, 1)),
        tuple(addr for addr in addrs if len(addr) <= MAX_ADDR_BYTES),
        Connection(number) if number in Connection.__members__.values() else Connection.NOT_CONNECTED,
    )


def _decode_record(chunk: bytes) -> Record:
    fields = protobuf.decode(chunk)
    return Record(
        _bounded(fields, 1, MAX_KEY_BYTES, "record key"), _bounded(fields, 2, MAX_VALUE_BYTES, "record value")
    )


def _decode_stale(chunk: bytes) -> Stale:
    fields = protobuf.decode(chunk)
    seq = protobuf.first_int(fields, 2)
    if seq > MAX_SEQ:
        raise RemoteProtocolError(f"kad sequence number {seq} is over 63 bits")
    return Stale(PeerId(protobuf.first_bytes(fields, 1)), seq)


def _decode_coordinate(raw: bytes) -> tuple[float, float, float, float]:
    if len(raw) != _COORDINATE.size:
        raise RemoteProtocolError(f"kad coordinate has {len(raw)} bytes, not {_COORDINATE.size}")
    x, y, height, error = _COORDINATE.unpack(raw)
    if not all(map(math.isfinite, (x, y, height, error))):
        raise RemoteProtocolError("kad coordinate is not made of finite numbers")
    return x, y, height, error


def _message_type(number: int) -> MessageType:
    try:
        return MessageType(number)
    except ValueError:
        raise RemoteProtocolError(f"unknown kad message type {number}") from None


def _bounded(fields: protobuf.Fields, number: int, limit: int, name: str) -> bytes:
    value = protobuf.first_bytes(fields, number)
    if len(value) > limit:
        raise RemoteProtocolError(f"kad {name} of {len(value)} bytes is over {limit}")
    return value


def _repeated(fields: protobuf.Fields, number: int, limit: int) -> list[bytes]:
    chunks = protobuf.all_bytes(fields, number)
    if len(chunks) > limit:
        raise RemoteProtocolError(f"kad field {number} is repeated {len(chunks)} times, over {limit}")
    return chunks
