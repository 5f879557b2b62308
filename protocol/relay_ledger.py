"""Who has a place at a relay, who is connected through it, and what that has cost: the books of a relay. Sans-IO.

    reservation    one per peer; counts in all, by address and by subnet; ends at its time or with its connection
    circuit        counts in all, for both its ends, and by the address and subnet of who opened it

`where` is the scopes of an address (node/limits.origin); none for loopback and in-memory addresses. Whatever is over
a limit raises OverLimit before anything is taken; bytes are let through to the last one that is allowed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from .errors import ConfigError, Refused
from .ids import PeerId
from .limits import SYSTEM, Amounts, Kind, Limiter, OverLimit, Reservation, Resource, Scope
from .pace import Buckets

DAY_S: Final = 86_400.0
_PLACE: Final = {Resource.RESERVATIONS: 1}
_CIRCUIT: Final = {Resource.CIRCUITS: 1}
_MAY_BE_ZERO: Final = frozenset(("circuit_s", "circuit_bytes", "day_bytes", "bytes_per_s"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """What a relay gives to strangers. Where zero is allowed, it means any amount."""

    reservations: int = 256
    """Peers that have a place here; each has one."""
    reservations_per_ip: int = 8
    """Of them from one IPv4 address or IPv6 /56; loopback is exempt."""
    reservations_per_subnet: int = 32
    """Of them from one IPv4 /24 or IPv6 /48."""
    reservation_s: int = 3600
    """How long a place lasts when it is not refreshed."""
    circuits: int = 512
    """Circuits at once."""
    circuits_per_peer: int = 32
    """Of them with one peer at either end."""
    circuits_per_ip: int = 32
    """Of them opened from one address; loopback is exempt."""
    circuits_per_subnet: int = 128
    requests_per_peer: float = 4.0
    """Reservations and circuits that a peer may ask for a second, after REQUESTS_BURST at once."""
    circuit_s: int = 86_400
    """Life of a circuit; 0: any."""
    circuit_bytes: int = 64 << 30
    """What one circuit carries in each direction; 0: any amount."""
    day_bytes: int = 1 << 40
    """What all circuits carry in 24 hours, both directions; 0: any amount."""
    bytes_per_s: int = 16 << 20
    """What all circuits carry a second, shared fairly between the addresses they were opened from; 0: no limit."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 0 or (not value and name not in _MAY_BE_ZERO):
                least = "zero (no limit) or more" if name in _MAY_BE_ZERO else "positive"
                raise ConfigError(f"RelayLimits.{name} is {value}: it must be {least}")

    @classmethod
    def parse(cls, texts: Iterable[str]) -> RelayLimits:
        """From `NAME=NUMBER` texts; what is not named keeps its default. Raises ConfigError."""
        values: dict[str, int] = {}
        for text in texts:
            name, _, number = text.partition("=")
            name = name.strip().replace("-", "_")
            if name not in cls.__slots__ or not number.strip().isdecimal() or len(number) > 20:
                raise ConfigError(f"relay limit {text[:60]!r}: use NAME=NUMBER, NAME one of {', '.join(cls.__slots__)}")
            values[name] = int(number)
        return cls(**values)


REQUESTS_BURST: Final = 64
"""Requests of one peer at once, beyond requests_per_peer."""


class NoReservation(Refused):
    """The peer asked for has no place here."""


class Rushed(Refused):
    """A peer asks too often."""


@dataclass(slots=True)
class _Place:
    expires: float
    room: Reservation


class Circuit:
    """One open circuit. Made by Ledger.connect(), ended by Ledger.disconnect()."""

    __slots__ = ("_ledger", "_limit", "_room", "carried", "key", "opened_at", "source", "target")

    def __init__(
        self, ledger: Ledger, room: Reservation, *, source: PeerId, target: PeerId, key: Scope, now: float
    ) -> None:
        self.source = source
        """Who opened it."""
        self.target = target
        self.key = key
        """Who pays for what it carries."""
        self.opened_at = now
        self.carried = [0, 0]
        """Bytes from the source, bytes to it."""
        self._ledger = ledger
        self._limit = ledger.limits.circuit_bytes
        self._room = room

    def allow(self, direction: int, size: int, now: float) -> int:
        """How many of `size` bytes may pass; they count as carried. Less than `size`: the circuit is over."""
        if self._limit:
            size = min(size, self._limit - self.carried[direction])
        size = self._ledger.spend(size, now)
        self.carried[direction] += size
        return size

    def release(self) -> None:
        """Give its room back. Idempotent."""
        self._room.release()


class Ledger:
    """The books of one relay."""

    def __init__(self, limits: RelayLimits) -> None:
        self.limits = limits
        self.refused: Counter[str] = Counter()
        """Requests turned away and circuits cut, by reason."""
        self.bytes = 0
        """Carried so far."""
        self.opened = 0
        """Circuits so far."""
        self._limiter = Limiter(_Rules(limits))
        self._places: dict[PeerId, _Place] = {}
        self._circuits: dict[Circuit, None] = {}
        self._asked = Buckets(rate=limits.requests_per_peer, burst=REQUESTS_BURST)
        self._day_began = 0.0
        self._day_bytes = 0

    @property
    def reservations(self) -> int:
        """Places taken."""
        return len(self._places)

    @property
    def circuits(self) -> tuple[Circuit, ...]:
        """Those that are open."""
        return tuple(self._circuits)

    # -- places --

    def reserve(self, peer: PeerId, where: Sequence[Scope], now: float) -> float:
        """Give or renew the peer's place; returns when it ends. Raises OverLimit or Rushed."""
        self.expire(now)
        self._may_ask(peer, now)
        scopes = (SYSTEM, *where)
        place = self._places.get(peer)
        try:
            if place is None:
                place = self._places[peer] = _Place(now, self._limiter.reserve(scopes, _PLACE))
            else:
                place.room.move(scopes)
        except OverLimit as exc:
            self.refused[exc.reason] += 1
            raise
        place.expires = now + self.limits.reservation_s
        return place.expires

    def release(self, peer: PeerId) -> bool:
        """The peer is gone, and so is its place. Whether it had one."""
        place = self._places.pop(peer, None)
        if place is not None:
            place.room.release()
        return place is not None

    def expire(self, now: float) -> list[PeerId]:
        """End the places whose time is over; whose they were."""
        over = [peer for peer, place in self._places.items() if place.expires <= now]
        for peer in over:
            self.release(peer)
        return over

    def has(self, peer: PeerId, now: float) -> bool:
        """Whether the peer has a place now."""
        place = self._places.get(peer)
        return place is not None and place.expires > now

    # -- circuits --

    def connect(self, source: PeerId, target: PeerId, where: Sequence[Scope], now: float) -> Circuit:
        """Room for a circuit. Raises NoReservation, OverLimit or Rushed."""
        self._may_ask(source, now)
        if not self.has(target, now):
            self.refused["no-reservation"] += 1
            raise NoReservation(f"{target} has no reservation here")
        ends = [Scope(Kind.PEER, peer) for peer in {source, target}]
        try:
            if self._day_is_over_its_bytes(now):
                raise OverLimit(SYSTEM, "day-bytes", self.limits.day_bytes)
            room = self._limiter.reserve((SYSTEM, *ends, *where), _CIRCUIT)
        except OverLimit as exc:
            self.refused[exc.reason] += 1
            raise
        key = where[0] if where else Scope(Kind.PEER, source)
        circuit = Circuit(self, room, source=source, target=target, key=key, now=now)
        self._circuits[circuit] = None
        return circuit

    def disconnect(self, circuit: Circuit, reason: str = "") -> None:
        """A circuit has ended; `reason` names our limit that ended it, if one did."""
        if reason:
            self.refused[reason] += 1
        self._circuits.pop(circuit, None)
        circuit.release()

    def spend(self, size: int, now: float) -> int:
        """How many of so many bytes the day still has; they count."""
        if self._day_is_over_its_bytes(now):
            return 0
        if self.limits.day_bytes:
            size = min(size, self.limits.day_bytes - self._day_bytes)
        self._day_bytes += size
        self.bytes += size
        return size

    def _day_is_over_its_bytes(self, now: float) -> bool:
        if now - self._day_began >= DAY_S:
            self._day_began, self._day_bytes = now, 0
        return bool(self.limits.day_bytes) and self._day_bytes >= self.limits.day_bytes

    def _may_ask(self, peer: PeerId, now: float) -> None:
        if not self._asked.take(peer, now):
            self.refused["peer-rate"] += 1
            raise Rushed(f"{peer} asks more than {self.limits.requests_per_peer:g} times a second")


class _Rules:
    """The limits of each scope, for a Limiter."""

    def __init__(self, limits: RelayLimits) -> None:
        self._table: dict[Kind, Amounts] = {
            Kind.SYSTEM: {Resource.RESERVATIONS: limits.reservations, Resource.CIRCUITS: limits.circuits},
            Kind.PEER: {Resource.CIRCUITS: limits.circuits_per_peer},
            Kind.ADDRESS: {
                Resource.RESERVATIONS: limits.reservations_per_ip,
                Resource.CIRCUITS: limits.circuits_per_ip,
            },
            Kind.SUBNET: {
                Resource.RESERVATIONS: limits.reservations_per_subnet,
                Resource.CIRCUITS: limits.circuits_per_subnet,
            },
        }

    def __call__(self, scope: Scope) -> Amounts:
        return self._table[scope.kind]
