"""What our own node announces: payloads by key, signed anew well before their lease ends, numbered without gaps back.

Sequence numbers are wall milliseconds, so that a restart without memory still moves on. A clock that went backwards is
noticed by what holders answer: they know a higher number of ours, and we go on from there at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ..protocol.ids import PrivateKey
from ..protocol.kad import Stale
from ..protocol.records import CLOCK_SKEW_S, MAX_TTL_S, SignedEntry, next_seq, sign_entry


@dataclass(slots=True)
class Publication:
    """One payload we announce."""

    payload: bytes
    """What is said."""
    ttl_s: int
    """Its lease."""
    paths: int
    """Disjoint paths of the lookups that place it."""
    due: float
    """When it is put anew."""


class Publications:
    """Everything our node announces, until withdrawn."""

    def __init__(self, key: PrivateKey, *, rng: Random, republish_s: float, last_seq: int) -> None:
        self._key = key
        self._rng = rng
        self._republish_s = republish_s
        self._held: dict[bytes, Publication] = {}
        self.last_seq = last_seq
        """Highest sequence number signed."""

    def keys(self) -> list[bytes]:
        """Keys under which something is announced."""
        return list(self._held)

    def add(self, key: bytes, payload: bytes, ttl_s: int, paths: int, now: float) -> None:
        """Announce a payload from now on; it has just been put for the first time."""
        self._held[key] = Publication(payload, ttl_s, paths, now + self._pace_s())

    def withdraw(self, key: bytes) -> Publication | None:
        """Announce no longer."""
        return self._held.pop(key, None)

    def due(self, now: float) -> list[tuple[bytes, Publication]]:
        """What is to be put anew; the next time is set."""
        found = [(key, publication) for key, publication in self._held.items() if publication.due <= now]
        for _, publication in found:
            publication.due = now + self._pace_s()
        return found

    def sign(self, key: bytes, payload: bytes, ttl_s: int, known_seq: int, wall: float) -> SignedEntry:
        """An entry newer than `known_seq` and all before. Raises LocalProtocolError for a field out of bounds."""
        self.last_seq = next_seq(max(self.last_seq, known_seq), wall)
        issued_ms = int(wall * 1000)
        return sign_entry(self._key, key, payload, seq=self.last_seq, issued_ms=issued_ms, ttl_s=ttl_s)

    def sign_tombstone(self, key: bytes, withdrawn: Publication, known_seq: int, wall: float) -> SignedEntry:
        """An entry that outlives whatever it withdraws."""
        ttl_s = min(MAX_TTL_S, withdrawn.ttl_s + 2 * int(CLOCK_SKEW_S))
        return self.sign(key, b"", ttl_s, known_seq, wall)

    def learn(self, key: bytes, stale: Stale, now: float, wall: float) -> None:
        """A holder knows this higher number of ours. Implausible ones are lies."""
        if self.last_seq < stale.seq <= (wall + 2 * CLOCK_SKEW_S) * 1000:
            self.last_seq = stale.seq
            if (publication := self._held.get(key)) is not None:
                publication.due = now

    def _pace_s(self) -> float:
        return self._republish_s * (0.9 + 0.1 * self._rng.random())
