"""identify and identify-push: who a peer is, where it listens, what it speaks. Spec: docs/spec/identify.md.

One delimited protobuf message on a stream of its own, then EOF. Everything in it but the connection's own
peer id is a claim: addresses must be dialed before they are believed, and what we cannot parse in the lists
is left out, for a peer may well listen on transports we do not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from . import protobuf
from .errors import RemoteProtocolError
from .multiaddr import Multiaddr

PROTOCOL: Final = "/ipfs/id/1.0.0"
PUSH_PROTOCOL: Final = "/ipfs/id/push/1.0.0"
PROTOCOL_VERSION: Final = "swarmnode/1.0.0"
MAX_MESSAGE: Final = 8192
"""Bytes of one identify message (libp2p identify specification)."""
MAX_ADDRS: Final = 32
"""Listen addresses kept of one peer's message."""
MAX_PROTOCOLS: Final = 128
"""Protocols kept of one peer's message."""
MAX_AGENT: Final = 128
"""Characters kept of an agent string; it ends up in tables and logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identify:
    """One identify message. In a push, empty fields mean: as before."""

    public_key: bytes = b""
    """Marshalled identity key; the connection's handshake has proven it already."""
    listen_addrs: tuple[Multiaddr, ...] = ()
    """Addresses the peer claims to listen on, without /p2p."""
    protocols: tuple[str, ...] = ()
    """Protocols the peer has handlers for."""
    observed_addr: Multiaddr | None = None
    """The address the peer sees us under."""
    protocol_version: str = ""
    agent_version: str = ""
    """The peer's software, printable characters only."""

    def encode(self) -> bytes:
        """The protobuf message, without length."""
        fields: list[tuple[int, bytes | str]] = [(1, self.public_key)]
        fields += [(2, address.to_bytes()) for address in self.listen_addrs]
        fields += [(3, protocol) for protocol in self.protocols]
        if self.observed_addr is not None:
            fields.append((4, self.observed_addr.to_bytes()))
        fields += [(5, self.protocol_version), (6, self.agent_version)]
        return protobuf.encode((number, value) for number, value in fields if value)

    @classmethod
    def decode(cls, data: bytes) -> Identify:
        """Parse a message. Raises RemoteProtocolError."""
        fields = protobuf.decode(data)
        observed = _addresses(protobuf.all_bytes(fields, 4)[-1:])
        return cls(
            public_key=protobuf.first_bytes(fields, 1),
            listen_addrs=_addresses(protobuf.all_bytes(fields, 2)[:MAX_ADDRS]),
            protocols=tuple(map(protobuf.text, protobuf.all_bytes(fields, 3)[:MAX_PROTOCOLS])),
            observed_addr=observed[0] if observed else None,
            protocol_version=_printable(protobuf.first_bytes(fields, 5)),
            agent_version=_printable(protobuf.first_bytes(fields, 6)),
        )


def _addresses(raw: Iterable[bytes]) -> tuple[Multiaddr, ...]:
    found = []
    for data in raw:
        try:
            found.append(Multiaddr.from_bytes(data).without_peer())
        except RemoteProtocolError:
            continue
    return tuple(address for address in found if address.parts)


def _printable(raw: bytes) -> str:
    """A peer's text for our tables: control characters would let it draw on the user's terminal."""
    text = raw.decode("utf-8", "replace")[:MAX_AGENT]
    return "".join(letter if letter.isprintable() else "?" for letter in text)
