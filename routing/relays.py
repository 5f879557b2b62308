"""Which relays to take places at: near ones, in different networks, those the user named before all."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from math import inf

from ..protocol.ids import PeerId
from .keys import content_key


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayCandidate:
    """A relay that may be asked for a place."""

    peer: PeerId
    rtt_s: float | None
    """Its round trip; None: not measured, and so after all that were."""
    network: Hashable
    """What it may fail together with: its subnet, or itself where that says nothing."""
    named: bool = False
    """The user named it."""


def choose(candidates: Iterable[RelayCandidate], held: Collection[Hashable]) -> list[RelayCandidate]:
    """All of them, the best first: named ones, then by round trip, but a second one of a network after all networks.

    `held` are the networks of the relays that one has places at.
    """
    rest = sorted(candidates, key=lambda c: (not c.named, inf if c.rtt_s is None else c.rtt_s, c.peer))
    seen, order, later = set(held), [], []
    for candidate in rest:
        if candidate.named or candidate.network not in seen:
            order.append(candidate)
            seen.add(candidate.network)
        else:
            later.append(candidate)
    return order + later


def relays_key(swarm: str) -> bytes:
    """Key under which the relays of a swarm are named as providers."""
    return content_key(sha256(b"swarmnode relays of " + swarm.encode()).digest())
