"""Seeded bad weather for a MemoryNetwork.

Gentle weather keeps TCP's promises: writes are cut and joined anywhere, delayed, held up for seconds. Harmful
weather breaks them, as a hostile middlebox or a bug of ours would: pieces of the byte stream are lost, doubled,
swapped, changed, or invented. Under gentle weather everything must arrive; under harmful weather nothing wrong may.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

PIECES = (1, 9, 200, 1460, 20_000)
"""Mean sizes that writes are cut into: between single bytes and more than most writes."""
GRID_S = 0.003
"""Arrivals are rounded up to a multiple of this, so that pieces of several writes arrive as one."""
HARMS = ("drop", "duplicate", "swap", "corrupt", "insert", "silence")


class Gentle:
    """Cuts, joins, delays and stalls. Set it as `network.weather`."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.piece = self.rng.choice(PIECES)
        self.jitter_s = self.rng.choice((0.0, 0.001, 0.02))
        self.stall = self.rng.choice((0.0, 0.02))
        self.joined = self.rng.random() < 0.5

    def __call__(self, source: object, target: object, data: bytes) -> Iterator[tuple[float, bytes]]:
        """The pieces that a write becomes, each with the seconds it takes longer."""
        for piece in self._cut(data):
            yield self._late(), piece

    def _cut(self, data: bytes) -> Iterator[bytes]:
        while data:
            size = 1 + int(self.rng.expovariate(1 / self.piece))
            yield data[:size]
            data = data[size:]

    def _late(self) -> float:
        extra = self.rng.random() * self.jitter_s
        if self.rng.random() < self.stall / 10:
            extra += self.rng.random() * 2.0
        if self.joined:
            now = asyncio.get_running_loop().time()
            extra += -(now + extra) % GRID_S
        return extra


class Harmful(Gentle):
    """Does one kind of harm to what goes one way, once, after `after` bytes; `struck` says whether it has."""

    def __init__(self, seed: int, harm: str, source: object, after: int) -> None:
        super().__init__(seed)
        self.harm = harm
        self.source = source
        self.left = after
        self.struck = False
        self._kept: bytes | None = None  # the first half of a swap, until the next piece comes

    def __call__(self, source: object, target: object, data: bytes) -> Iterator[tuple[float, bytes]]:
        """The pieces that a write becomes, each with the seconds it takes longer."""
        for piece in self._cut(data):
            for damaged in self._harmed(piece) if source is self.source else (piece,):
                yield self._late(), damaged

    def _harmed(self, piece: bytes) -> list[bytes]:
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return [piece, kept]
        self.left -= len(piece)
        if self.left >= 0:
            return [piece]
        if self.harm == "silence":  # this way is dead from now on
            self.struck = True
            return []
        return [piece] if self.struck else self._strike(piece)

    def _strike(self, piece: bytes) -> list[bytes]:
        self.struck = True
        rng = self.rng
        match self.harm:
            case "drop":
                start = rng.randrange(len(piece))
                return [piece[:start], piece[rng.randint(start + 1, len(piece)) :]]
            case "duplicate":
                return [piece, piece]
            case "swap":
                self._kept = piece
                return []
            case "insert":
                at = rng.randint(0, len(piece))
                return [piece[:at], rng.randbytes(rng.randint(1, 100)), piece[at:]]
        spoiled = bytearray(piece)
        spoiled[rng.randrange(len(piece))] ^= 1 << rng.randrange(8)
        return [bytes(spoiled)]
