"""Between the planner's hops and the protocol's: a chain as the planner sees it, and with what it planned put in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from ...protocol.chain import Hop
from ...protocol.ids import PeerId
from ...routing.cost import CostTerms
from ...routing.planner import Hop as PlannedHop
from ...routing.repair import Repair

_NOBODY: Final = PeerId(b"\x00\x06nobody")
"""Stands for a failed server in a plan that may choose it again."""


def as_planned(hops: Sequence[Hop], forgiven: Collection[Hop]) -> list[PlannedHop]:
    """The chain for the planner. The forgiven are in it under no name, so that they may be chosen again."""
    return [_planned(hop, _NOBODY if hop in forgiven else PeerId(hop.peer)) for hop in hops]


def with_repairs(hops: Sequence[Hop], repairs: Sequence[Repair], make: Callable[[PlannedHop], Hop]) -> list[Hop]:
    """The chain after these repairs."""
    after: list[Hop] = []
    for hop in hops:
        repair = next((repair for repair in repairs if repair.start <= hop.start < repair.end), None)
        if repair is None:
            after.append(hop)
        elif hop.start == repair.start:
            after += [make(planned) for planned in repair.hops]
    return after


def _planned(hop: Hop, peer: PeerId) -> PlannedHop:
    return PlannedHop(peer=peer, start=hop.start, end=hop.end, compute_class=hop.compute_class, terms=CostTerms())
