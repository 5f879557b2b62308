"""Who may come in: takes the room of each connection, by where it comes from and then by who it proves to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..protocol.ids import PeerId
from ..protocol.limits import (
    ALLOWED,
    ALLOWED_TRANSIENT,
    SYSTEM,
    TRANSIENT,
    Kind,
    Limiter,
    OverLimit,
    Reservation,
    Resource,
    Scope,
)
from ..protocol.multiaddr import Multiaddr
from ..protocol.pace import Buckets
from .limits import CONNECTION_MEMORY, AllowList, HostLimits, origin

BLAME: Final = 8
"""Accepted connections that one cut for breaking the rules counts as."""
_FLEETING: Final = (TRANSIENT, ALLOWED_TRANSIENT)
_INBOUND: Final = {Resource.CONNECTIONS: 1, Resource.CONNECTIONS_IN: 1, Resource.MEMORY: CONNECTION_MEMORY}
_OUTBOUND: Final = {Resource.CONNECTIONS: 1, Resource.CONNECTIONS_OUT: 1, Resource.MEMORY: CONNECTION_MEMORY}


@dataclass(frozen=True, slots=True)
class Ticket:
    """A connection's room."""

    reservation: Reservation
    subnet: Scope | None
    """Where it came from, coarsely; None for loopback and dialed ones."""
    unless_trusted: OverLimit | None = None
    """It was let in without room, only to see whether it is a trusted peer. Why there was none."""


class Gate:
    """Gives out tickets. The limits themselves are in limits.py, the counting in protocol/limits.py."""

    def __init__(self, limiter: Limiter, limits: HostLimits, allow: AllowList, *, now: Callable[[], float]) -> None:
        self._limiter = limiter
        self._limits = limits
        self._allow = allow
        self._now = now
        self._rates = {
            Kind.ADDRESS: Buckets(rate=limits.accepts_per_ip, burst=limits.connections_per_ip),
            Kind.SUBNET: Buckets(rate=limits.accepts_per_subnet, burst=limits.connections_per_subnet),
            Kind.RELAY: Buckets(rate=limits.accepts_per_relay, burst=limits.connections_per_relay),
        }

    def admit(self, address: Multiaddr) -> Ticket:
        """Room for an accepted connection. Raises OverLimit.

        Trusted addresses have room of their own. When trusted peers may come from anywhere, some strangers more are
        let in as far as their handshake.
        """
        where = origin(address, limit_loopback=self._limits.limit_loopback)
        subnet = where[-1] if where else None
        try:
            return Ticket(self._reserve(where), subnet)
        except OverLimit as exc:
            if self._allow.has_address(address):
                return Ticket(self._limiter.reserve((ALLOWED, ALLOWED_TRANSIENT), _INBOUND), subnet)
            if not self._allow.names_peers:
                raise
            return Ticket(self._limiter.reserve((ALLOWED_TRANSIENT,), _INBOUND), subnet, exc)

    def _reserve(self, where: tuple[Scope, ...]) -> Reservation:
        """Room for a stranger, unless its source has had too many lately: handshakes cost, however short."""
        room = self._limiter.reserve((SYSTEM, *where, TRANSIENT), _INBOUND)
        now = self._now()
        for scope in where:
            buckets = self._rates[scope.kind]
            if not buckets.take(scope.key, now):
                room.release()
                raise OverLimit(scope, "rate", buckets.rate)
        return room

    def blame(self, address: Multiaddr) -> None:
        """A connection from there was cut for what it did: it counts as several."""
        for scope in origin(address, limit_loopback=self._limits.limit_loopback):
            self._rates[scope.kind].charge(scope.key, BLAME, self._now())

    def subnet(self, address: Multiaddr) -> Scope | None:
        """The group of an address; None for loopback."""
        where = origin(address, limit_loopback=self._limits.limit_loopback)
        return where[-1] if where else None

    def admit_dial(self, expected: PeerId | None) -> Ticket:
        """Room for a connection that we make. Raises OverLimit."""
        try:
            return Ticket(self._limiter.reserve((SYSTEM, TRANSIENT), _OUTBOUND), None)
        except OverLimit:
            if expected is None or not self._allow.has_peer(expected):
                raise
            return Ticket(self._limiter.reserve((ALLOWED,), _OUTBOUND), None)

    def prove(self, ticket: Ticket, peer: PeerId) -> None:
        """The connection's identity is known now. Raises OverLimit."""
        owner = Scope(Kind.PEER, peer)
        if ticket.unless_trusted is None:
            kept = tuple(scope for scope in ticket.reservation.scopes if scope not in _FLEETING)
            ticket.reservation.move((*kept, owner))
        elif self._allow.has_peer(peer):
            ticket.reservation.move((ALLOWED, owner))
        else:
            raise ticket.unless_trusted
