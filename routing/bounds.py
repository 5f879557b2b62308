"""Leave out what cannot be part of the best chain, before the exact search looks at it.

A repair plans a few blocks between two live neighbours, but in a big swarm a thousand servers hold some of them. A
quick search among the few most promising gives a chain, so an upper bound; every server through which no chain can be
cheaper than that is dropped. The exact search then finds the same optimum among what is left: 60 ms become 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import inf
from typing import Final

from .cost import Candidate, floor_s

SAMPLE: Final = 24
"""Servers in the quick search."""
WORTHWHILE: Final = 2 * SAMPLE
"""With fewer candidates than this the exact search is quick anyway."""
_ROUNDING: Final = 1 + 1e-9
"""Sums in another order differ in the last bits; a bound must not cut the optimum for that."""


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound on the best chain, and lower bounds on what is still to come."""

    cost: float
    """No chain dearer than this is of interest."""
    rest: tuple[float, ...]
    """Least compute from each border of the span to its end, whoever runs it."""
    leave: tuple[float, ...]
    """Per candidate, least network from it to the downstream end."""


def sample(
    candidates: Sequence[Candidate], start: int, end: int, first: Sequence[bool], last: Sequence[bool]
) -> list[int]:
    """The candidates most likely to make a good chain: near both ends, fast, and holding much of the span."""
    length = end - start

    def score(index: int) -> float:
        c = candidates[index]
        visits = length / (c.end - c.start)
        return (c.entry.network_s + c.visit_s + c.exit.network_s) * visits + length * c.block_s

    everyone = range(len(candidates))
    chosen = set(nsmallest(SAMPLE, everyone, key=score))
    chosen |= set(nsmallest(SAMPLE // 2, filter(first.__getitem__, everyone), key=score))
    chosen |= set(nsmallest(SAMPLE // 2, filter(last.__getitem__, everyone), key=score))
    return sorted(chosen)


def narrowed(
    candidates: Sequence[Candidate], start: int, end: int, cost: float, metric_ends: tuple[bool, bool]
) -> tuple[list[int], Bound]:
    """The candidates that some chain no dearer than `cost` may go through, and the bound for the rest of the search.

    `metric_ends` says whether links from the upstream end, and to the downstream end, obey the triangle inequality, so
    that no way round beats the direct one; otherwise only the floors of links are used.
    """
    arrive = _reach([c.entry.total_s for c in candidates], candidates, metric_ends[0])
    leave = _reach([c.exit.total_s for c in candidates], candidates, metric_ends[1])
    rest = _rest(candidates, start, end)
    cost *= _ROUNDING
    kept = [index for index, c in enumerate(candidates) if arrive[index] + c.visit_s + rest[0] + leave[index] <= cost]
    return kept, Bound(cost, rest, tuple(leave[index] for index in kept))


def _reach(direct: list[float], candidates: Sequence[Candidate], metric: bool) -> list[float]:
    """Least network between one end and each candidate, whatever lies between."""
    if metric:
        return direct
    floors = [floor_s(c.place) for c in candidates]
    around = min(direct) + min(floors)
    return [min(cost, around + floor) for cost, floor in zip(direct, floors, strict=True)]


def _rest(candidates: Sequence[Candidate], start: int, end: int) -> tuple[float, ...]:
    fastest = [inf] * (end - start)
    for c in sorted(candidates, key=lambda candidate: candidate.block_s, reverse=True):
        fastest[c.start - start : c.end - start] = [c.block_s] * (c.end - c.start)
    rest = [0.0]
    for block_s in reversed(fastest):
        rest.append(rest[-1] + block_s)
    return tuple(reversed(rest))
