"""What to change after servers of a running chain have died: the dead spans and who takes them over.

Only the dead blocks are planned anew; the live hops keep their KV caches. Neighbouring dead hops are one span. The
replacement must be of the same compute class block by block, for otherwise the replayed cache would differ in bits and
the text could change; another class is taken only when the caller allows it. A server still in the chain is no
replacement, because a session knows it once; if nothing else is left the whole chain is planned anew, live hops too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from ..protocol.errors import NoRoute
from ..protocol.ids import PeerId
from .cost import PlanRequest
from .metrics import Metrics
from .planner import Hop, plan
from .swarm import SwarmView


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """One dead span and its replacement."""

    start: int
    """First block to be taken over."""
    end: int
    """One past the last block to be taken over."""
    hops: tuple[Hop, ...]
    """The servers that take over, in order."""
    class_changed: bool
    """True when some block goes to another compute class: the text may differ from here on."""
    banned_used: bool
    """True when only a banned server was left for it."""


def plan_repair(
    chain: Sequence[Hop],
    failed: Collection[PeerId],
    view: SwarmView,
    metrics: Metrics,
    request: PlanRequest,
    *,
    now: float,
    any_class: bool = False,
) -> tuple[Repair, ...]:
    """Replacements for every hop of `chain` whose peer is in `failed`, in chain order; empty when none is.

    `request` is the one the chain was planned with (its classes are replaced by the dead hops' own). Failed peers are
    never chosen; banned ones only when nobody else is left. With `any_class` other compute classes are taken, after
    the same class and before banned servers. Raises NoRoute naming the blocks nobody can take over.
    """
    runs = list(_dead_runs(chain, failed))
    if not runs:
        return ()
    context = _Context(chain, failed, view, metrics, request, now, any_class)
    try:
        return tuple(context.repairs(runs))
    except NoRoute:
        whole = context.whole_chain()
        if whole is None:
            raise
        return (whole,)


def _dead_runs(chain: Sequence[Hop], failed: Collection[PeerId]) -> Iterator[tuple[int, int]]:
    """(first, one past last) chain index of each maximal run of dead hops."""
    first: int | None = None
    for index, hop in enumerate(chain):
        if hop.peer in failed:
            first = index if first is None else first
        elif first is not None:
            yield first, index
            first = None
    if first is not None:
        yield first, len(chain)


class _Context:
    """What all spans of one repair have in common."""

    def __init__(
        self,
        chain: Sequence[Hop],
        failed: Collection[PeerId],
        view: SwarmView,
        metrics: Metrics,
        request: PlanRequest,
        now: float,
        any_class: bool,
    ) -> None:
        self._chain, self._failed, self._view = chain, frozenset(failed), view
        self._metrics, self._request, self._now, self._any_class = metrics, request, now, any_class

    def repairs(self, runs: Sequence[tuple[int, int]]) -> Iterator[Repair]:
        """One repair per run; a server chosen for one run is not offered to the next."""
        busy = {hop.peer for hop in self._chain} - self._failed
        for first, stop in runs:
            repair = self._repair(first, stop, busy)
            busy |= {hop.peer for hop in repair.hops}
            yield repair

    def whole_chain(self) -> Repair | None:
        """A new chain from scratch, live servers included, or None."""
        try:
            return self._repair(0, len(self._chain), ())
        except NoRoute:
            return None

    def _repair(self, first: int, stop: int, in_use: Collection[PeerId]) -> Repair:
        """Plan chain[first:stop] anew: the same class first, then what the caller allows, banned peers last."""
        dead = self._chain[first:stop]
        strict = replace(
            self._request,
            start=dead[0].start,
            end=dead[-1].end,
            need_embed=self._request.need_embed and first == 0,
            need_head=self._request.need_head and stop == len(self._chain),
            upstream=self._chain[first - 1].peer if first else self._request.upstream,
            downstream=self._chain[stop].peer if stop < len(self._chain) else self._request.downstream,
            classes=tuple((hop.start, hop.end, hop.compute_class) for hop in dead),
            failed=self._failed,
            in_use=frozenset(in_use),
        )
        loose = replace(strict, classes=self._request.classes)
        attempts = [strict, loose] if self._any_class else [strict]
        if self._request.banned:
            attempts += [replace(attempt, banned=frozenset()) for attempt in attempts]
        hops = self._first_route(attempts)
        return Repair(
            start=strict.start,
            end=dead[-1].end,
            hops=hops,
            class_changed=not all(_same_class(hop, dead) for hop in hops),
            banned_used=any(hop.peer in self._request.banned for hop in hops),
        )

    def _first_route(self, attempts: Sequence[PlanRequest]) -> tuple[Hop, ...]:
        refusal: NoRoute | None = None
        for attempt in attempts:
            try:
                return plan(attempt, self._view, self._metrics, now=self._now).hops
            except NoRoute as exc:
                refusal = refusal or exc
        raise refusal or NoRoute("nothing to plan")


def _same_class(hop: Hop, dead: Sequence[Hop]) -> bool:
    return all(old.compute_class == hop.compute_class for old in dead if old.start < hop.end and hop.start < old.end)
