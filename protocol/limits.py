"""Who may hold how much: scopes with limits, and reservations that count in several scopes at once, all or nothing.

    system                            everything of this node
    transient                         not known yet: whose (connections), what for (streams)
    address, subnet                   where accepted connections come from
    relay                             the relay that accepted connections come through, instead of address and subnet
    peer, peer-transient              one proven identity; its streams without a protocol
    protocol, protocol-peer           one protocol; one peer's streams of it
    allowed, allowed-transient        trusted peers' own room, used when the room above is taken

A connection is reserved in system, transient, address and subnet. When its identity is proven it moves from transient
to peer. A stream starts in system, peer, transient and peer-transient, and moves to protocol and protocol-peer. In the
manner of go-libp2p's resource manager. Sans-IO: nothing here knows a socket, a task or the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from .errors import LocalProtocolError, Refused
from .yamux import Budget


class Resource(StrEnum):
    """What is counted."""

    CONNECTIONS = "connections"
    CONNECTIONS_IN = "connections-in"
    CONNECTIONS_OUT = "connections-out"
    STREAMS_IN = "streams-in"
    STREAMS_OUT = "streams-out"
    MEMORY = "memory"
    RESERVATIONS = "reservations"
    CIRCUITS = "circuits"


class Kind(StrEnum):
    """What a scope stands for; see the module's table."""

    SYSTEM = "system"
    TRANSIENT = "transient"
    ADDRESS = "address"
    SUBNET = "subnet"
    RELAY = "relay"
    PEER = "peer"
    PEER_TRANSIENT = "peer-transient"
    PROTOCOL = "protocol"
    PROTOCOL_PEER = "protocol-peer"
    ALLOWED = "allowed"
    ALLOWED_TRANSIENT = "allowed-transient"


class Scope(NamedTuple):
    """The name of one scope: a kind, and whose it is."""

    kind: Kind
    key: Hashable = None


Amounts = Mapping[Resource, int]
Limits = Callable[[Scope], Amounts]
"""The limits of a scope; a resource that is not in them is not limited there."""

SYSTEM: Final = Scope(Kind.SYSTEM)
TRANSIENT: Final = Scope(Kind.TRANSIENT)
ALLOWED: Final = Scope(Kind.ALLOWED)
ALLOWED_TRANSIENT: Final = Scope(Kind.ALLOWED_TRANSIENT)


class OverLimit(Refused):
    """A scope has no room for what was asked. `reason` is the stable name under which it is counted."""

    def __init__(self, scope: Scope, what: str, limit: float) -> None:
        self.scope = scope
        self.reason = f"{scope.kind}-{what}"
        whose = "" if scope.key is None else f" of {scope.key}"
        super().__init__(f"the limit of {limit:g} {what} for {scope.kind}{whose} is reached; try again later")


class Limiter:
    """The scopes that hold something now. A scope nobody uses takes no memory."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._scopes: dict[Scope, dict[Resource, int]] = {}

    def __len__(self) -> int:
        return len(self._scopes)

    def used(self, scope: Scope, resource: Resource) -> int:
        """How much of a resource the scope holds."""
        return self._scopes.get(scope, {}).get(resource, 0)

    def reserve(self, scopes: Iterable[Scope], amounts: Amounts) -> Reservation:
        """Take the amounts in every scope, or in none. Raises OverLimit naming the first that is full."""
        reservation = Reservation(self, tuple(scopes), {name: amount for name, amount in amounts.items() if amount})
        self._take(reservation.scopes, reservation.amounts)
        return reservation

    def _take(self, scopes: Iterable[Scope], amounts: Amounts) -> None:
        scopes = tuple(scopes)
        for scope in scopes:
            self._check(scope, amounts)
        for scope in scopes if amounts else ():
            used = self._scopes.setdefault(scope, {})
            for resource, amount in amounts.items():
                used[resource] = used.get(resource, 0) + amount

    def _check(self, scope: Scope, amounts: Amounts) -> None:
        limits = self._limits(scope)
        used = self._scopes.get(scope, {})
        for resource, amount in amounts.items():
            limit = limits.get(resource)
            if limit is not None and amount > 0 and used.get(resource, 0) + amount > limit:
                raise OverLimit(scope, resource, limit)

    def _give_back(self, scopes: Iterable[Scope], amounts: Amounts) -> None:
        for scope in scopes if amounts else ():
            used = self._scopes[scope]
            for resource, amount in amounts.items():
                used[resource] -= amount
                if not used[resource]:
                    del used[resource]
            if not used:
                del self._scopes[scope]


class Reservation:
    """What one connection or stream holds. Made by Limiter.reserve(); ends with release()."""

    __slots__ = ("_limiter", "amounts", "released", "scopes")

    def __init__(self, limiter: Limiter, scopes: tuple[Scope, ...], amounts: dict[Resource, int]) -> None:
        self._limiter = limiter
        self.scopes = scopes
        """Where it counts."""
        self.amounts = amounts
        """What it holds in each of them."""
        self.released = False

    def move(self, scopes: Iterable[Scope]) -> None:
        """Count in these scopes instead; what is in both stays. Raises OverLimit, and then nothing has moved."""
        if self.released:
            raise LocalProtocolError("the reservation was released: it cannot move")
        wanted = tuple(scopes)
        self._limiter._take((scope for scope in wanted if scope not in self.scopes), self.amounts)
        self._limiter._give_back((scope for scope in self.scopes if scope not in wanted), self.amounts)
        self.scopes = wanted

    def draw(self, resource: Resource, amount: int) -> bool:
        """Hold more of a resource, if every scope has room and this was not released."""
        if self.released or not amount:
            return not self.released
        try:
            self._limiter._take(self.scopes, {resource: amount})
        except OverLimit:
            return False
        self.amounts[resource] = self.amounts.get(resource, 0) + amount
        return True

    def give_back(self, resource: Resource, amount: int) -> None:
        """Hold less of a resource. After release() there is nothing left to give."""
        if self.released or not amount:
            return
        if not 0 <= amount <= self.amounts.get(resource, 0):
            raise LocalProtocolError(f"{amount} {resource} given back of {self.amounts.get(resource, 0)} held")
        self._limiter._give_back(self.scopes, {resource: amount})
        self.amounts[resource] -= amount
        if not self.amounts[resource]:
            del self.amounts[resource]

    def release(self) -> None:
        """Give everything back. Idempotent."""
        if not self.released:
            self._limiter._give_back(self.scopes, self.amounts)
            self.released = True


class WindowBudget(Budget):
    """Lets the receive windows of one connection draw on the memory of its reservation's scopes."""

    def __init__(self, reservation: Reservation, limit: int) -> None:
        super().__init__(limit)
        self._reservation = reservation

    def draw(self, size: int) -> bool:
        """Take `size` bytes if the connection, the peer and the node have them."""
        if self.used + size > self.limit or not self._reservation.draw(Resource.MEMORY, size):
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        """Return what was drawn."""
        self.used -= size
        self._reservation.give_back(Resource.MEMORY, size)
