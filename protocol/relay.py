"""Circuit relay v2: what a peer, a relay and who dials the peer through it say to each other. Spec: docs/spec/relay.md.

    hop    to the relay: RESERVE a place, or CONNECT to a peer that has one; it answers STATUS
    stop   from the relay to that peer: CONNECT from somebody; it answers STATUS

After the last STATUS the two streams are one link, on which the ends make an ordinary connection: the relay sees
noise. Messages are libp2p's, with a length in front. Sans-IO; who gets a place is decided in relay_ledger.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from . import protobuf
from .envelope import Envelope
from .errors import RemoteProtocolError
from .ids import PeerId, PrivateKey
from .multiaddr import Multiaddr

HOP: Final = "/libp2p/circuit/relay/0.2.0/hop"
STOP: Final = "/libp2p/circuit/relay/0.2.0/stop"
MAX_MESSAGE: Final = 4096
"""Bytes of one message, as other implementations have it."""
MAX_ADDRS: Final = 16
"""Addresses read of one message."""
VOUCHER_DOMAIN: Final = "libp2p-relay-rsvp"
VOUCHER_TYPE: Final = b"\x03\x02"
"""The multicodec of vouchers, as implementations write it: two plain bytes, not a varint."""
AMPLE_BYTES: Final = 64 << 20
AMPLE_S: Final = 600
"""A circuit limited to less than this is for finding another way, not for work."""
_MAX_32: Final = (1 << 32) - 1


class HopType(IntEnum):
    """Kinds of hop messages."""

    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class StopType(IntEnum):
    """Kinds of stop messages."""

    CONNECT = 0
    STATUS = 1


class Status(IntEnum):
    """What an answer says. Numbers we do not know are read as UNUSED: not OK."""

    UNUSED = 0
    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


_STATUSES: Final = {int(status): status for status in Status}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a relay lets one circuit carry. Zeros: any amount."""

    duration_s: int = 0
    data_bytes: int = 0
    """In each direction."""

    @property
    def is_ample(self) -> bool:
        """It hinders no ordinary use."""
        return (not self.duration_s or self.duration_s >= AMPLE_S) and (
            not self.data_bytes or self.data_bytes >= AMPLE_BYTES
        )

    def encode(self) -> bytes:
        """The protobuf message."""
        return protobuf.encode([(1, min(self.duration_s, _MAX_32)), (2, self.data_bytes)])

    @classmethod
    def decode(cls, data: bytes) -> Limit:
        """Parse a message. Raises RemoteProtocolError."""
        fields = protobuf.decode(data)
        return cls(duration_s=protobuf.first_int(fields, 1) & _MAX_32, data_bytes=protobuf.first_int(fields, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A place at a relay."""

    expires: int
    """Seconds since 1970, by the relay's clock."""
    addrs: tuple[Multiaddr, ...] = ()
    """Where the relay says it is, without /p2p-circuit."""
    voucher: bytes = b""
    """A sealed Voucher, not verified yet; empty where a relay gives none."""

    def encode(self) -> bytes:
        """The protobuf message."""
        fields: list[tuple[int, int | bytes]] = [(1, self.expires)]
        fields += [(2, address.to_bytes()) for address in self.addrs]
        return protobuf.encode([*fields, (3, self.voucher)] if self.voucher else fields)

    @classmethod
    def decode(cls, data: bytes) -> Reservation:
        """Parse a message; addresses of unknown transports are left out. Raises RemoteProtocolError."""
        fields = protobuf.decode(data)
        return cls(
            expires=protobuf.first_int(fields, 1),
            addrs=_addresses(protobuf.all_bytes(fields, 2)),
            voucher=protobuf.first_bytes(fields, 3),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HopMessage:
    """A message between a peer and its relay."""

    type: HopType
    peer: PeerId | None = None
    """CONNECT: to whom."""
    reservation: Reservation | None = None
    limit: Limit | None = None
    status: Status | None = None

    def encode(self) -> bytes:
        """The protobuf message, without length."""
        fields: list[tuple[int, int | bytes]] = [(1, int(self.type))]
        if self.peer is not None:
            fields.append((2, _peer_message(self.peer)))
        if self.reservation is not None:
            fields.append((3, self.reservation.encode()))
        if self.limit is not None:
            fields.append((4, self.limit.encode()))
        if self.status is not None:
            fields.append((5, int(self.status)))
        return protobuf.encode(fields)

    @classmethod
    def decode(cls, data: bytes) -> HopMessage:
        """Parse a message. A type left out is 0, for proto3 writers may leave zeros out. Raises RemoteProtocolError."""
        fields = protobuf.decode(data)
        return cls(
            type=_hop_type(protobuf.first_int(fields, 1)),
            peer=_peer_in(fields, 2),
            reservation=Reservation.decode(protobuf.first_bytes(fields, 3)) if 3 in fields else None,
            limit=Limit.decode(protobuf.first_bytes(fields, 4)) if 4 in fields else None,
            status=_status(fields, 5),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMessage:
    """A message between a relay and the peer that somebody dials through it."""

    type: StopType
    peer: PeerId | None = None
    """CONNECT: from whom, as the relay says."""
    limit: Limit | None = None
    status: Status | None = None

    def encode(self) -> bytes:
        """The protobuf message, without length."""
        fields: list[tuple[int, int | bytes]] = [(1, int(self.type))]
        if self.peer is not None:
            fields.append((2, _peer_message(self.peer)))
        if self.limit is not None:
            fields.append((3, self.limit.encode()))
        if self.status is not None:
            fields.append((4, int(self.status)))
        return protobuf.encode(fields)

    @classmethod
    def decode(cls, data: bytes) -> StopMessage:
        """Parse a message. A type left out is 0. Raises RemoteProtocolError."""
        fields = protobuf.decode(data)
        return cls(
            type=_stop_type(protobuf.first_int(fields, 1)),
            peer=_peer_in(fields, 2),
            limit=Limit.decode(protobuf.first_bytes(fields, 3)) if 3 in fields else None,
            status=_status(fields, 4),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Voucher:
    """A relay's word, signed, that it serves a peer."""

    relay: PeerId
    """Who signs."""
    peer: PeerId
    expires: int
    """Seconds since 1970."""

    def seal(self, key: PrivateKey) -> bytes:
        """The voucher in an envelope signed by the relay."""
        payload = protobuf.encode([(1, self.relay.raw), (2, self.peer.raw), (3, self.expires)])
        return Envelope.seal(key, VOUCHER_DOMAIN, VOUCHER_TYPE, payload).encode()

    @classmethod
    def open(cls, data: bytes, *, relay: PeerId, peer: PeerId) -> Voucher:
        """The voucher in an envelope of that relay for that peer, verified. Raises RemoteProtocolError."""
        envelope = Envelope.open(data, VOUCHER_DOMAIN, VOUCHER_TYPE, signer=relay)
        fields = protobuf.decode(envelope.payload)
        found = cls(
            relay=PeerId(protobuf.first_bytes(fields, 1)),
            peer=PeerId(protobuf.first_bytes(fields, 2)),
            expires=protobuf.first_int(fields, 3),
        )
        if (found.relay, found.peer) != (relay, peer):
            raise RemoteProtocolError(f"a voucher of {found.relay} for {found.peer} instead of {relay} for {peer}")
        return found


@dataclass(frozen=True, slots=True)
class CircuitAddress:
    """The parts of `<address of a relay>/p2p/<relay>/p2p-circuit[/p2p/<target>]`."""

    relay: PeerId
    relay_addr: Multiaddr
    """Where the relay is, without /p2p; without parts when only its id is known."""
    target: PeerId | None
    """Who is to be reached; None in an address to listen on."""

    @classmethod
    def of(cls, address: Multiaddr) -> CircuitAddress | None:
        """The parts of an address through one relay; None for any other, one through two relays too."""
        names = [name for name, _ in address.parts]
        if names.count("p2p-circuit") != 1:
            return None
        at = names.index("p2p-circuit")
        before, after = Multiaddr(address.parts[:at]), address.parts[at + 1 :]
        if before.peer_id is None or [name for name, _ in after] not in ([], ["p2p"]):
            return None
        return cls(before.peer_id, before.without_peer(), address.peer_id if after else None)


def through(relay_addr: Multiaddr, relay: PeerId) -> Multiaddr:
    """The address of whoever has a place at that relay, without its own /p2p."""
    return Multiaddr((*relay_addr.with_peer(relay).parts, ("p2p-circuit", "")))


def _hop_type(value: int) -> HopType:
    if value > HopType.STATUS:
        raise RemoteProtocolError(f"hop message of unknown type {value}")
    return HopType(value)


def _stop_type(value: int) -> StopType:
    if value > StopType.STATUS:
        raise RemoteProtocolError(f"stop message of unknown type {value}")
    return StopType(value)


def _status(fields: protobuf.Fields, number: int) -> Status | None:
    if number not in fields:
        return None
    value = protobuf.first_int(fields, number)
    return _STATUSES.get(value, Status.UNUSED)


def _peer_message(peer: PeerId) -> bytes:
    return protobuf.encode([(1, peer.raw)])


def _peer_in(fields: protobuf.Fields, number: int) -> PeerId | None:
    """The peer of a message. Addresses beside the id are for relays that dial, which none of ours does."""
    if number not in fields:
        return None
    return PeerId(protobuf.first_bytes(protobuf.decode(protobuf.first_bytes(fields, number)), 1))


def _addresses(raw: Iterable[bytes]) -> tuple[Multiaddr, ...]:
    found = []
    for data in list(raw)[:MAX_ADDRS]:
        try:
            found.append(Multiaddr.from_bytes(data))
        except RemoteProtocolError:
            continue  # a transport we do not know
    return tuple(found)
