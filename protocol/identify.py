"""identify and identify-push: who a peer is, where it listens, what it speaks. Spec: docs/spec/identify.md.

Delimited protobuf messages on a stream of their own, then EOF: one, or several when one would be too long.
Everything in them is a claim, but for the addresses in a signed record: addresses must be dialed before they
are believed, and what we cannot parse in the lists is left out, for a peer may well listen on transports we
do not know.
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
"""Bytes of one identify message, as other implementations have it."""
MAX_MESSAGES: Final = 10
"""Messages read of one exchange, as other implementations have it."""
MAX_ADDRS: Final = 32
"""Listen addresses kept of one exchange."""
MAX_PROTOCOLS: Final = 128
"""Protocols kept of one exchange."""
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
    signed_record: bytes = b""
    """The peer's addresses in an envelope (envelope.py), not verified yet."""

    def encode(self) -> bytes:
        """The protobuf message, without length."""
        return protobuf.encode(self._fields())

    def messages(self) -> list[bytes]:
        """What to send: the message, in pieces of at most MAX_MESSAGE bytes that a reader puts together again.

        What does not fit into MAX_MESSAGES is left out.
        """
        found = [bytearray()]
        for field in self._fields():
            piece = protobuf.encode([field])
            if len(found[-1]) + len(piece) > MAX_MESSAGE:
                found.append(bytearray())
            found[-1] += piece
        return [protobuf.delimited(bytes(message)) for message in found[:MAX_MESSAGES]]

    def followed_by(self, later: Identify) -> Identify:
        """This message and the next one of the same exchange: lists add up, the later one of other fields counts."""
        addrs = dict.fromkeys((*self.listen_addrs, *later.listen_addrs))
        protocols = dict.fromkeys((*self.protocols, *later.protocols))
        return Identify(
            public_key=later.public_key or self.public_key,
            listen_addrs=tuple(addrs)[:MAX_ADDRS],
            protocols=tuple(protocols)[:MAX_PROTOCOLS],
            observed_addr=later.observed_addr or self.observed_addr,
            protocol_version=later.protocol_version or self.protocol_version,
            agent_version=later.agent_version or self.agent_version,
            signed_record=later.signed_record or self.signed_record,
        )

    def _fields(self) -> list[tuple[int, bytes | str]]:
        """What is short comes first: a reader may only get the first message."""
        fields: list[tuple[int, bytes | str]] = [(1, self.public_key)]
        if self.observed_addr is not None:
            fields.append((4, self.observed_addr.to_bytes()))
        fields += [(5, self.protocol_version), (6, self.agent_version)]
        fields += [(2, address.to_bytes()) for address in self.listen_addrs]
        fields += [(3, protocol) for protocol in self.protocols]
        fields.append((8, self.signed_record))
        return [(number, value) for number, value in fields if value]

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
            signed_record=protobuf.first_bytes(fields, 8),
        )


class Incoming:
    """What comes in on one identify stream. Sans-IO: feed bytes until the peer ends the stream, or `done`."""

    def __init__(self) -> None:
        self._splitter = protobuf.Delimited(MAX_MESSAGE)
        self._count = 0
        self.message: Identify | None = None
        """The messages so far, put together; None before the first is complete."""

    @property
    def done(self) -> bool:
        """More messages would not be looked at."""
        return self._count >= MAX_MESSAGES

    def feed(self, data: bytes) -> None:
        """Take the peer's bytes. Raises RemoteProtocolError."""
        for raw in self._splitter.feed(data):
            message = Identify.decode(raw)
            self.message = message if self.message is None else self.message.followed_by(message)
            self._count += 1
            if self.done:
                return


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
