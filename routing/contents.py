"""What our own node does with libp2p's kinds of records: put and get values, provide and find providers.

A part of the DHT machine beside dht.py, which starts the queries made here and keeps what others give us. What we
provide is told anew every REPROVIDE_S until withdrawn: those near the key come and go.
"""

from __future__ import annotations

from random import Random
from typing import Final

from ..protocol.errors import LocalProtocolError
from ..protocol.kad import KadPeer, Record
from .answers import heard_of, wire_addrs
from .content import MAX_KEY_BYTES
from .content_queries import FindProviders, GetValue, Provide, PutValue
from .dht import Dht

REPLICAS: Final = 8
"""Peers that are given a value or told of a provider."""
REPROVIDE_S: Final = 600.0
"""Should half of the peers leave in this time, three or four of the eight still know. Holders keep it 2 h."""
MAX_OWN_KEYS: Final = 1024
"""Keys one node provides; others would not keep more (content.KEYS_PER_PROVIDER)."""


class Contents:
    """See the module's docstring. Every method returns the id of a query of `dht`."""

    def __init__(self, dht: Dht, rng: Random) -> None:
        self._dht = dht
        self._rng = rng
        self._due: dict[bytes, float] = {}

    def put_value(self, key: bytes, value: bytes, now: float) -> int:
        """Give a value to the peers nearest to its key. Raises LocalProtocolError unless the key proves it."""
        record = Record(key, value)
        if not self._dht.values.put(record, now):
            raise LocalProtocolError("nobody keeps a value that its key does not prove: /pk/<peer id>, its public key")
        return self._dht.launch(lambda number, lookup: PutValue(number, lookup, record, REPLICAS), key, now)

    def get_value(self, key: bytes, now: float) -> int:
        """Find the value of a key."""
        known = self._dht.values.get(_checked(key), now)
        return self._dht.launch(lambda number, lookup: GetValue(number, key, lookup, known), key, now)

    def provide(self, key: bytes, now: float) -> int:
        """Say that we have what a key names, until withdraw(). Raises LocalProtocolError beyond MAX_OWN_KEYS."""
        if len(self._due) >= MAX_OWN_KEYS and key not in self._due:
            raise LocalProtocolError(f"a node provides at most {MAX_OWN_KEYS} keys: withdraw one first")
        self._due[_checked(key)] = now + REPROVIDE_S * (0.9 + 0.1 * self._rng.random())
        dht = self._dht
        dht.providers.add(key, KadPeer(dht.own, wire_addrs(dht.addrs, True)), now)
        return dht.launch(lambda number, lookup: Provide(number, key, lookup, dht.own, dht.addrs, REPLICAS), key, now)

    def withdraw(self, key: bytes) -> None:
        """Provide a key no longer. Others forget it when their time for it is over: libp2p has no word for this."""
        if self._due.pop(key, None) is not None:
            self._dht.providers.remove(key, self._dht.own)

    def find_providers(self, key: bytes, now: float) -> int:
        """Find out who has what a key names."""
        known = [heard_of(peer, True) for peer in self._dht.providers.get(_checked(key), now)]
        return self._dht.launch(lambda number, lookup: FindProviders(number, key, lookup, known), key, now)

    @property
    def provided(self) -> list[bytes]:
        """Keys we provide."""
        return list(self._due)

    def tick(self, now: float) -> None:
        """Provide anew what is due."""
        for key, due in list(self._due.items()):
            if due <= now:
                self.provide(key, now)


def _checked(key: bytes) -> bytes:
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise LocalProtocolError(f"a key has 1 to {MAX_KEY_BYTES} bytes, not {len(key)}")
    return key
