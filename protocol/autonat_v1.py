"""AutoNAT version 1, answered for peers that know no other: they name addresses, we say whether one could be dialed.

One message each way. Only addresses with the IP that we see the asker at are dialed, so nobody else can be made a
target; hence there is nothing to pay. Nothing is proven to the asker either, which is why we do not ask this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from . import protobuf
from .errors import RemoteProtocolError
from .ids import PeerId
from .multiaddr import Multiaddr
from .reachability import is_public, place

PROTOCOL: Final = "/libp2p/autonat/1.0.0"
MAX_MESSAGE: Final = 8192
MAX_ADDRS: Final = 16
"""Addresses dialed for one request, as go-libp2p has it."""
_DIAL, _RESPONSE = 0, 1


class Status(IntEnum):
    """What an answer says."""

    OK = 0
    DIAL_ERROR = 100
    DIAL_REFUSED = 101
    BAD_REQUEST = 200
    INTERNAL_ERROR = 300


@dataclass(frozen=True, slots=True)
class Dial:
    """A request: dial me."""

    peer: PeerId | None
    addrs: tuple[Multiaddr, ...]

    def encode(self) -> bytes:
        """The message, without length."""
        info = [(2, addr.to_bytes()) for addr in self.addrs]
        own = [(1, self.peer.raw)] if self.peer else []
        return protobuf.encode([(1, _DIAL), (2, protobuf.encode([(1, protobuf.encode([*own, *info]))]))])

    @classmethod
    def decode(cls, data: bytes) -> Dial:
        """Parse a request. Raises RemoteProtocolError."""
        fields = protobuf.decode(data)
        if protobuf.first_int(fields, 1) != _DIAL or 2 not in fields:
            raise RemoteProtocolError("an AutoNAT request without a dial in it")
        info = protobuf.decode(protobuf.first_bytes(protobuf.decode(protobuf.first_bytes(fields, 2)), 1))
        raw = protobuf.first_bytes(info, 1)
        return cls(PeerId(raw) if raw else None, tuple(_addresses(protobuf.all_bytes(info, 2)[:MAX_ADDRS])))


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it."""

    status: Status
    text: str = ""
    addr: Multiaddr | None = None
    """The one that was dialed, when one was."""

    def encode(self) -> bytes:
        """The message, without length."""
        fields: list[tuple[int, int | str | bytes]] = [(1, int(self.status))]
        if self.text:
            fields.append((2, self.text))
        if self.addr is not None:
            fields.append((3, self.addr.to_bytes()))
        return protobuf.encode([(1, _RESPONSE), (3, protobuf.encode(fields))])

    @classmethod
    def decode(cls, data: bytes) -> Answer:
        """Parse an answer. Raises RemoteProtocolError."""
        fields = protobuf.decode(data)
        if protobuf.first_int(fields, 1) != _RESPONSE:
            raise RemoteProtocolError("an AutoNAT answer without a response in it")
        body = protobuf.decode(protobuf.first_bytes(fields, 3))
        status = protobuf.first_int(body, 1)
        addrs = _addresses(protobuf.all_bytes(body, 3)[-1:])
        return cls(
            Status(status) if status in frozenset(Status) else Status.INTERNAL_ERROR,
            protobuf.text(protobuf.first_bytes(body, 2)[:256]),
            addrs[0] if addrs else None,
        )


def wanted(request: Dial, asker: PeerId, seen: Multiaddr) -> tuple[tuple[Multiaddr, ...], Answer | None]:
    """The addresses to dial for a request, or the answer when none may be.

    An address with another IP than the asker's is dialed at the asker's, as go-libp2p does: the port may be right.
    """
    if request.peer not in (None, asker):
        return (), Answer(Status.BAD_REQUEST, "peer id mismatch")
    if seen.is_relayed or not is_public(seen):
        return (), Answer(Status.DIAL_REFUSED, "no public address of yours is seen here")
    found = [addr if place(addr) == place(seen) else _moved(addr, seen) for addr in request.addrs]
    usable = tuple(dict.fromkeys(addr for addr in found if addr is not None and is_public(addr)))
    return usable, None if usable else Answer(Status.DIAL_REFUSED, "no dialable addresses")


def _moved(addr: Multiaddr, seen: Multiaddr) -> Multiaddr | None:
    """The same port at another IP."""
    if seen.ip is None or not addr.is_tcp or addr.ip is None or addr.ip.version != seen.ip.version:
        return None
    return Multiaddr((seen.parts[0], *addr.parts[1:]))


def _addresses(raw: Sequence[bytes]) -> list[Multiaddr]:
    found = []
    for data in raw:
        try:
            found.append(Multiaddr.from_bytes(data).without_peer())
        except RemoteProtocolError:
            continue
    return found
