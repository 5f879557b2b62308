"""An invite: one word that gets somebody into a swarm, to be pasted into a chat or read out of a QR code.

    sn1 + base58( fields | first 4 bytes of sha256(fields) )
    fields, as a protocol buffer: 1 = swarm name, 2 = repeated {1 = peer id, 2 = repeated address without /p2p}

It carries no secret: whoever has it knows where to knock. The checksum finds typing errors, not forgeries; the peer
ids in it do that, for only their owners can answer a handshake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from . import protobuf
from .errors import ConfigError, RemoteProtocolError
from .ids import PeerId, base58_decode, base58_encode
from .multiaddr import Multiaddr

PREFIX: Final = "sn1"
MAX_TEXT: Final = 2048
"""Characters of an invite; base58 takes quadratic time."""
MAX_PEERS: Final = 4
MAX_ADDRS: Final = 6
"""Addresses of one peer."""
SWARM_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CHECKSUM: Final = 4
_SWARM, _PEER = 1, 2
_ID, _ADDR = 1, 2


@dataclass(frozen=True, slots=True)
class Invite:
    """A swarm and ways into it."""

    swarm: str
    """Its name."""
    addrs: tuple[Multiaddr, ...]
    """Addresses of live nodes, each with /p2p/<id>."""

    @classmethod
    def of(cls, swarm: str, addrs: Iterable[Multiaddr]) -> Invite:
        """An invite of the first MAX_ADDRS addresses of the first MAX_PEERS peers. Raises ConfigError if none is."""
        kept: list[Multiaddr] = []
        for peer, known in _by_peer(addrs).items():
            kept += [addr.with_peer(peer) for addr in known]
        if not kept:
            raise ConfigError("an invite needs an address that ends in /p2p/<peer id>: is the node listening?")
        return cls(swarm, tuple(kept))

    def __str__(self) -> str:
        """The word to pass on."""
        body = protobuf.encode([(_SWARM, self.swarm), *((_PEER, peer) for peer in self._peers())])
        return PREFIX + base58_encode(body + _checksum(body))

    def _peers(self) -> Iterable[bytes]:
        for peer, addrs in _by_peer(self.addrs).items():
            yield protobuf.encode([(_ID, peer.raw), *((_ADDR, addr.to_bytes()) for addr in addrs)])

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Read an invite. Raises ConfigError saying what is wrong with it."""
        if not is_invite(text) or len(text) > MAX_TEXT:
            raise ConfigError(f"{text[:24]!r} is not an invite: one starts with {PREFIX} (see swarmnode invite)")
        try:
            data = base58_decode(text[len(PREFIX) :])
        except ValueError as exc:
            raise ConfigError(f"broken invite: {exc}; copy it again") from None
        body, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
        if checksum != _checksum(body):
            raise ConfigError("broken invite: a letter is wrong or missing; copy it again")
        try:
            return cls._decode(body)
        except RemoteProtocolError as exc:
            raise ConfigError(f"this invite cannot be used: {exc}; ask for a new one") from None

    @classmethod
    def _decode(cls, body: bytes) -> Invite:
        fields = protobuf.decode(body)
        swarm = protobuf.text(protobuf.first_bytes(fields, _SWARM))
        if not SWARM_NAME.fullmatch(swarm):
            raise RemoteProtocolError("its swarm has no proper name")
        addrs = [addr for peer in protobuf.all_bytes(fields, _PEER)[:MAX_PEERS] for addr in _addresses(peer)]
        if not addrs:
            raise RemoteProtocolError("it has no addresses")
        return cls(swarm, tuple(addrs))


def is_invite(text: str) -> bool:
    """Whether a text is meant as an invite, right or wrong: multiaddrs start with a slash."""
    return text.startswith(PREFIX)


def _by_peer(addrs: Iterable[Multiaddr]) -> dict[PeerId, list[Multiaddr]]:
    """Addresses without /p2p by the peer they name, the bounds kept."""
    found: dict[PeerId, list[Multiaddr]] = {}
    for addr in addrs:
        peer = addr.peer_id
        if peer is None or (peer not in found and len(found) == MAX_PEERS):
            continue
        known = found.setdefault(peer, [])
        if len(known) < MAX_ADDRS and addr.without_peer() not in known:
            known.append(addr.without_peer())
    return found


def _addresses(raw: bytes) -> list[Multiaddr]:
    fields = protobuf.decode(raw)
    peer = PeerId(protobuf.first_bytes(fields, _ID))
    return [Multiaddr.from_bytes(data).with_peer(peer) for data in protobuf.all_bytes(fields, _ADDR)[:MAX_ADDRS]]


def _checksum(body: bytes) -> bytes:
    return sha256(body).digest()[:_CHECKSUM]
