"""What we have been told about peers: addresses, protocols, software. Bounded; the least recently used peer
goes first, and so do addresses that nobody repeats.

Everything in it is a claim, good for choosing what to dial; only a handshake makes an identity true. An address
is worth as much as its source: best one behind which we found the peer, then one the peer has signed, then what
anybody says.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ..protocol.envelope import PeerRecord
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr

MAX_PEERS: Final = 4096
"""Peers remembered."""
MAX_ADDRS: Final = 8
"""Addresses kept of one peer, the best of them."""
ADDR_TTL_S: Final = 24 * 3600.0
"""How long an address is kept that nobody repeats, not counting the time the peer is connected. A wrong one costs
a dial a quarter of a second, a missing one costs the peer: hence a day, and not an hour."""


class _Known(NamedTuple):
    """What we know of one address; neither proven nor certified: somebody said so."""

    told_at: float
    proven: bool = False
    """We dialed it, and the handshake found the peer there."""
    certified: bool = False
    """It is in the newest record the peer signed."""

    @property
    def rank(self) -> int:
        return 0 if self.proven else 1 if self.certified else 2


@dataclass(slots=True)
class PeerInfo:
    """One peer's entry."""

    addrs: tuple[Multiaddr, ...] = ()
    """Without /p2p, the best first, newest first among equals."""
    protocols: frozenset[str] = frozenset()
    """From identify; empty before it."""
    agent: str = ""
    """The peer's software, from identify."""
    record_seq: int | None = None
    """Of the newest record the peer signed."""
    connected: bool = False
    """It has identified itself and not left since: its addresses do not age."""
    known: dict[Multiaddr, _Known] = field(default_factory=dict, repr=False)
    """Where the addresses are from, the one heard of last at the end."""

    @property
    def certified(self) -> tuple[Multiaddr, ...]:
        """Those of the addresses that the peer has signed."""
        return tuple(addr for addr in self.addrs if self.known[addr].certified)


class PeerBook:
    """Peer id -> PeerInfo. `now` is the clock that addresses age by."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._peers: OrderedDict[PeerId, PeerInfo] = OrderedDict()

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peer: PeerId, addrs: Iterable[Multiaddr]) -> None:
        """Remember what somebody said; a /p2p part must name the peer or the address is ignored."""
        self._told(peer, addrs)

    def proven(self, peer: PeerId, addr: Multiaddr) -> None:
        """We dialed the address, and found the peer."""
        self._told(peer, (addr,), proven=True)

    def certify(self, record: PeerRecord) -> bool:
        """Take over a verified record; its addresses replace those of the one before.

        False, and nothing changes, when the peer has signed a newer one.
        """
        info = self._entry(record.peer)
        if info.record_seq is not None and record.seq < info.record_seq:
            return False
        info.record_seq = record.seq
        info.known = {
            addr: known._replace(certified=False)
            for addr, known in info.known.items()
            if known.proven or not known.certified
        }
        self._told(record.peer, record.addrs, certified=True)
        return True

    def get(self, peer: PeerId) -> PeerInfo:
        """What is known; an empty entry for a stranger, which is not kept."""
        info = self._peers.get(peer)
        if info is None:
            return PeerInfo()
        self._peers.move_to_end(peer)
        if not info.connected:
            self._forget_old(info)
        return info

    def identified(self, peer: PeerId, protocols: Iterable[str], agent: str) -> None:
        """Take over what a connected peer's identify said; empty values leave what was known."""
        info = self._entry(peer)
        info.protocols = frozenset(protocols) or info.protocols
        info.agent = agent or info.agent
        info.connected = True

    def left(self, peer: PeerId) -> None:
        """The peer is gone. When it comes back it may be another version; its addresses age from now on."""
        info = self._peers.get(peer)
        if info is None:
            return
        info.protocols = frozenset()
        if info.connected:
            info.connected = False
            now = self._now()
            info.known = {addr: known._replace(told_at=now) for addr, known in info.known.items()}

    def _told(self, peer: PeerId, addrs: Iterable[Multiaddr], *, proven: bool = False, certified: bool = False) -> None:
        """Newest first in `addrs`. A mere claim makes nothing younger that is more than a claim."""
        info = self._entry(peer)
        now = self._now()
        for addr in reversed([a.without_peer() for a in addrs if a.peer_id in (None, peer)]):
            old = info.known.get(addr, _Known(now))
            if addr.parts and (proven or certified or old.rank == _Known(now).rank):
                info.known.pop(addr, None)
                info.known[addr] = _Known(now, proven or old.proven, certified or old.certified)
        if not info.connected:
            self._forget_old(info)
        _rank(info)

    def _forget_old(self, info: PeerInfo) -> None:
        oldest = min((known.told_at for known in info.known.values()), default=math.inf)
        horizon = self._now() - ADDR_TTL_S
        if oldest <= horizon:
            info.known = {addr: known for addr, known in info.known.items() if known.told_at > horizon}
            _rank(info)

    def _entry(self, peer: PeerId) -> PeerInfo:
        info = self._peers.setdefault(peer, PeerInfo())
        self._peers.move_to_end(peer)
        while len(self._peers) > MAX_PEERS:
            self._peers.popitem(last=False)
        return info


def _rank(info: PeerInfo) -> None:
    """Put the addresses in order and drop what is too much."""
    newest_first = list(reversed(info.known))
    info.addrs = tuple(sorted(newest_first, key=lambda addr: info.known[addr].rank)[:MAX_ADDRS])
    info.known = {addr: known for addr, known in info.known.items() if addr in info.addrs}
