"""What we have been told about peers: addresses, protocols, software. Bounded; the least recently used peer
goes first.

Everything in it is a claim, good for choosing what to dial; only a handshake makes an identity true.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr

MAX_PEERS: Final = 4096
"""Peers remembered."""
MAX_ADDRS: Final = 8
"""Addresses kept of one peer, newest first."""


@dataclass(slots=True)
class PeerInfo:
    """One peer's entry."""

    addrs: tuple[Multiaddr, ...] = ()
    """Without /p2p, newest first."""
    protocols: frozenset[str] = frozenset()
    """From identify; empty before it."""
    agent: str = ""
    """The peer's software, from identify."""


class PeerBook:
    """Peer id -> PeerInfo."""

    def __init__(self) -> None:
        self._peers: OrderedDict[PeerId, PeerInfo] = OrderedDict()

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peer: PeerId, addrs: Iterable[Multiaddr]) -> None:
        """Remember addresses, in front of those known; a /p2p part must name the peer or the address is
        ignored."""
        fresh = [addr.without_peer() for addr in addrs if addr.peer_id in (None, peer) and addr.parts]
        info = self._entry(peer)
        info.addrs = tuple(dict.fromkeys((*fresh, *info.addrs)))[:MAX_ADDRS]

    def get(self, peer: PeerId) -> PeerInfo:
        """What is known; an empty entry for a stranger, which is not kept."""
        info = self._peers.get(peer)
        if info is None:
            return PeerInfo()
        self._peers.move_to_end(peer)
        return info

    def identified(self, peer: PeerId, protocols: Iterable[str], agent: str) -> None:
        """Take over what identify said; empty values leave what was known."""
        info = self._entry(peer)
        info.protocols = frozenset(protocols) or info.protocols
        info.agent = agent or info.agent

    def forget_protocols(self, peer: PeerId) -> None:
        """The peer is gone; when it comes back it may be another version."""
        if peer in self._peers:
            self._peers[peer].protocols = frozenset()

    def _entry(self, peer: PeerId) -> PeerInfo:
        info = self._peers.setdefault(peer, PeerInfo())
        self._peers.move_to_end(peer)
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return info
