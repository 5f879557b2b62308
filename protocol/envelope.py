"""Signed envelopes and the peer records in them: addresses that a peer has signed itself. Spec: docs/spec/envelopes.md.

An envelope says who signed (the key is inside), what for (the domain, which is signed but not sent) and what kind
of payload it is. Whoever passes one on cannot change it, and nothing signed for one purpose passes for another.
Peers of any key type may sign. Formats: libp2p RFC 0002 and 0003, with the domain and the payload type that
implementations really use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from . import protobuf
from .errors import RemoteProtocolError
from .ids import PeerId, PrivateKey, PublicKey
from .multiaddr import Multiaddr

MAX_BYTES: Final = 8192
"""Longest envelope read: more does not fit into an identify message."""
MAX_ADDRS: Final = 32
"""Addresses kept of one record; more are left out."""
RECORD_DOMAIN: Final = "libp2p-peer-record"
RECORD_TYPE: Final = b"\x03\x01"
"""The multicodec of libp2p peer records, as implementations write it: two plain bytes, not a varint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A payload and its signature. Made by seal() and open(), which make sure that they belong together."""

    key: PublicKey
    """The signer."""
    payload_type: bytes
    """What the payload is."""
    payload: bytes
    signature: bytes
    """Over domain, type and payload."""

    @classmethod
    def seal(cls, key: PrivateKey, domain: str, payload_type: bytes, payload: bytes) -> Envelope:
        """Sign a payload."""
        signature = key.sign(_signed(domain, payload_type, payload))
        return cls(key=key.public, payload_type=payload_type, payload=payload, signature=signature)

    @classmethod
    def open(cls, data: bytes, domain: str, payload_type: bytes, *, signer: PeerId | None = None) -> Envelope:
        """Read and verify one of a certain domain and type, and signer if given. Raises RemoteProtocolError.

        The signature is looked at last: a stranger's RSA key cannot keep us busy.
        """
        if len(data) > MAX_BYTES:
            raise RemoteProtocolError(f"envelope of {len(data)} bytes is over the limit of {MAX_BYTES}")
        fields = protobuf.decode(data)
        found = cls(
            key=PublicKey.unmarshal(protobuf.first_bytes(fields, 1)),
            payload_type=protobuf.first_bytes(fields, 2),
            payload=protobuf.first_bytes(fields, 3),
            signature=protobuf.first_bytes(fields, 5),
        )
        if found.payload_type != payload_type:
            raise RemoteProtocolError(
                f"envelope of type {found.payload_type[:16].hex()} instead of {payload_type.hex()}"
            )
        if signer is not None and found.key.peer_id != signer:
            raise RemoteProtocolError(f"an envelope of {found.key.peer_id} instead of {signer}")
        if not found.key.verify(_signed(domain, payload_type, found.payload), found.signature):
            raise RemoteProtocolError(f"the signature of the envelope of {found.key.peer_id} is not valid")
        return found

    def encode(self) -> bytes:
        """The protobuf message."""
        return protobuf.encode(
            [(1, self.key.marshal()), (2, self.payload_type), (3, self.payload), (5, self.signature)]
        )


def _signed(domain: str, payload_type: bytes, payload: bytes) -> bytes:
    """What the signature covers: each part behind its length, so that none can be moved into another."""
    return b"".join(map(protobuf.delimited, (domain.encode(), payload_type, payload)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRecord:
    """Where a peer says it listens."""

    peer: PeerId
    """Whose addresses they are."""
    seq: int
    """Grows with every record of this peer; of two the higher one counts. 64 bits."""
    addrs: tuple[Multiaddr, ...] = ()
    """Without /p2p."""

    def encode(self) -> bytes:
        """The protobuf message."""
        fields: list[tuple[int, bytes | int]] = [(1, self.peer.raw), (2, self.seq)]
        fields += [(3, protobuf.encode([(1, addr.to_bytes())])) for addr in self.addrs]
        return protobuf.encode(fields)

    @classmethod
    def decode(cls, data: bytes) -> PeerRecord:
        """Parse a message; addresses of unknown transports are left out. Raises RemoteProtocolError."""
        fields = protobuf.decode(data)
        infos = protobuf.all_bytes(fields, 3)[:MAX_ADDRS]
        return cls(
            peer=PeerId(protobuf.first_bytes(fields, 1)),
            seq=protobuf.first_int(fields, 2),
            addrs=tuple(_addresses(infos)),
        )

    def seal(self, key: PrivateKey) -> bytes:
        """The record in an envelope signed by its peer."""
        return Envelope.seal(key, RECORD_DOMAIN, RECORD_TYPE, self.encode()).encode()

    @classmethod
    def open(cls, data: bytes, *, peer: PeerId | None = None) -> PeerRecord:
        """The record in an envelope, both verified; only of that peer if given. Raises RemoteProtocolError."""
        envelope = Envelope.open(data, RECORD_DOMAIN, RECORD_TYPE, signer=peer)
        record = cls.decode(envelope.payload)
        if record.peer != envelope.key.peer_id:
            raise RemoteProtocolError(f"a record of {record.peer} is signed by {envelope.key.peer_id}")
        return record


def _addresses(infos: Iterable[bytes]) -> Iterable[Multiaddr]:
    for info in infos:
        raw = protobuf.first_bytes(protobuf.decode(info), 1)
        try:
            address = Multiaddr.from_bytes(raw).without_peer()
        except RemoteProtocolError:
            continue  # a transport we do not know
        if address.parts:
            yield address
