"""libp2p's own two kinds of DHT records, kept for others in bounded memory: values and providers.

Values are accepted only where their key proves them. `/pk/<peer id>` holds the public key whose hash the id is, for ids
too short to carry their key (RSA): nothing can be forged under it. Every other namespace is refused, for whoever could
write there could fill it. Providers are peers that say of themselves that they have something; who has not heard from
them within PROVIDER_S forgets it. What our own nodes announce is neither: it is signed entries (store.py).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from ..protocol.errors import RemoteProtocolError
from ..protocol.ids import PeerId, PublicKey
from ..protocol.kad import KadPeer, Record

MAX_VALUES: Final = 4096
MAX_VALUE_BYTES: Final = 1024
"""An RSA-4096 public key takes 550."""
VALUE_S: Final = 36 * 3600.0
"""A value is kept this long after it was last put (go-libp2p's figure)."""
MAX_KEY_BYTES: Final = 80
"""A multihash of 64 bytes, or /pk/ and a peer id, and room."""
MAX_PROVIDED: Final = 8192
"""Keys with providers."""
PROVIDERS_PER_KEY: Final = 64
KEYS_PER_PROVIDER: Final = 1024
EXPIRY_EVERY_S: Final = 60.0
"""Memory of what nobody asks for any more is given back this often; what expired is never told."""
PROVIDER_S: Final = 2 * 3600.0
"""Providers put themselves down anew every hour."""
_PUBLIC_KEY: Final = b"/pk/"


def is_proven(record: Record) -> bool:
    """Whether a value is the only one its key admits."""
    if not record.key.startswith(_PUBLIC_KEY) or len(record.value) > MAX_VALUE_BYTES:
        return False
    try:
        claimed = PeerId(record.key[len(_PUBLIC_KEY) :])
        return PeerId.from_public_key(PublicKey.unmarshal(record.value)) == claimed
    except RemoteProtocolError:
        return False


class Values:
    """Proven values by key; the one put longest ago goes first when they are too many."""

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def put(self, record: Record, now: float) -> bool:
        """Keep a value if its key proves it."""
        if not is_proven(record):
            return False
        self._held[record.key] = record.value, now + VALUE_S
        self._held.move_to_end(record.key)
        while len(self._held) > MAX_VALUES:
            self._held.popitem(last=False)
        return True

    def get(self, key: bytes, now: float) -> Record | None:
        """The value under a key."""
        value, until = self._held.get(key, (b"", 0.0))
        return Record(key, value) if until > now else None

    def expire(self, now: float) -> None:
        """Drop what nobody put anew."""
        while self._held and next(iter(self._held.values()))[1] <= now:
            self._held.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Provider:
    peer: KadPeer
    until: float


class Providers:
    """Who says that it has what a key names. Bounded by keys, by providers of a key, and by keys of a provider."""

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, OrderedDict[PeerId, _Provider]] = OrderedDict()
        self._keys_of: dict[PeerId, int] = {}
        self._expiry_at = float("-inf")

    def __len__(self) -> int:
        return len(self._held)

    def add(self, key: bytes, peer: KadPeer, now: float) -> bool:
        """A peer provides a key. False when one of the bounds leaves no room for it."""
        if not 0 < len(key) <= MAX_KEY_BYTES:
            return False
        shelf = self._held.get(key, OrderedDict())
        fresh = peer.peer not in shelf
        if fresh and (self._keys_of.get(peer.peer, 0) >= KEYS_PER_PROVIDER or len(shelf) >= PROVIDERS_PER_KEY):
            return False
        if fresh:
            self._keys_of[peer.peer] = self._keys_of.get(peer.peer, 0) + 1
        shelf[peer.peer] = _Provider(peer, now + PROVIDER_S)
        shelf.move_to_end(peer.peer)
        self._held[key] = shelf
        self._held.move_to_end(key)
        while len(self._held) > MAX_PROVIDED:
            self._drop(next(iter(self._held)))
        return True

    def get(self, key: bytes, now: float) -> tuple[KadPeer, ...]:
        """Live providers of a key, the freshest first."""
        return tuple(item.peer for item in reversed(self._held.get(key, {}).values()) if item.until > now)

    def remove(self, key: bytes, peer: PeerId) -> None:
        """A peer provides a key no longer."""
        shelf = self._held.get(key)
        if shelf is None or shelf.pop(peer, None) is None:
            return
        self._forget(peer)
        if not shelf:
            del self._held[key]

    def expire(self, now: float) -> None:
        """Drop who did not put itself down anew."""
        if now < self._expiry_at:
            return  # walking thousands of keys is not for every tick
        self._expiry_at = now + EXPIRY_EVERY_S
        for key in list(self._held):
            shelf = self._held[key]
            while shelf and next(iter(shelf.values())).until <= now:
                self._forget(shelf.popitem(last=False)[0])
            if not shelf:
                del self._held[key]

    def _drop(self, key: bytes) -> None:
        for peer in self._held.pop(key):
            self._forget(peer)

    def _forget(self, peer: PeerId) -> None:
        self._keys_of[peer] -= 1
        if not self._keys_of[peer]:
            del self._keys_of[peer]
