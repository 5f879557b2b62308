"""Which servers run which blocks: the best chain for a request, with its reasons.

plan() is pure: the same request, view, metrics and time give the same chain, whatever the order servers were met in.
The search itself is in search.py, the prices in cost.py; here are the two policies, the answer, and the words for the
case that there is none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..protocol.errors import ConfigError, NoRoute
from ..protocol.ids import PeerId
from .announce import State
from .bounds import WORTHWHILE, Bound, narrowed, sample
from .cost import HOP_OVERHEAD_S, Candidate, CostTerms, Links, PlanRequest, Policy, Pricing, Reason, wire_s
from .metrics import Metrics
from .search import Found, Search
from .swarm import SwarmView, coverage, gaps

__all__ = ["Hop", "Plan", "PlanRequest", "Policy", "plan"]

_ROUNDING: Final = 1 + 1e-12
"""A run of exactly the bottleneck's length must count as within it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One server of a chain and the blocks it runs."""

    peer: PeerId
    start: int
    """First block."""
    end: int
    """One past the last block."""
    compute_class: bytes
    terms: CostTerms
    """What this hop adds to a step, from the moment the previous hop has its result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A chain for a request, and why it costs what it costs."""

    hops: tuple[Hop, ...]
    back: CostTerms
    """The way from the last hop back to the client (or to the downstream server)."""
    total_s: float
    """Predicted time of one step: all hops and the way back."""
    steps_per_s: float
    """Steps a second when stages overlap: one over the slowest stage or link."""

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The servers in order."""
        return tuple(hop.peer for hop in self.hops)


def plan(request: PlanRequest, view: SwarmView, metrics: Metrics, *, now: float) -> Plan:
    """The best chain under the request's policy.

    Raises NoRoute naming the blocks that cannot be had and why, ConfigError for a span outside the model.
    """
    pricing = Pricing(request, view, metrics, now)
    if not 0 <= pricing.start < pricing.end <= view.num_blocks:
        raise ConfigError(
            f"blocks {pricing.start}:{pricing.end} are not a span of {view.model}, which has {view.num_blocks} blocks"
        )
    candidates, ruled_out = pricing.candidates()
    roles = _Roles(request, candidates, pricing.start, pricing.end)
    found = _find(request.policy, candidates, pricing, roles)
    if found is None:
        raise _no_route(request, view, pricing, candidates, ruled_out, roles)
    return _explain(found, candidates, pricing.links)


class _Roles:
    """Which candidates may open and close the chain."""

    def __init__(self, request: PlanRequest, candidates: Sequence[Candidate], start: int, end: int) -> None:
        self.first = [
            c.start == start and (not request.need_embed or (c.server.announcement.embed and start == 0))
            for c in candidates
        ]
        self.last = [c.end == end and (not request.need_head or c.server.announcement.head) for c in candidates]


def _find(policy: Policy, candidates: Sequence[Candidate], pricing: Pricing, roles: _Roles) -> Found | None:
    if policy is Policy.MAX_THROUGHPUT:
        return _Widest(candidates, pricing.links, pricing.start, pricing.end, roles).best()
    return _Fastest(candidates, pricing, roles).best()


class _Fastest:
    """The chain of least latency: a quick search for an upper bound, then the exact one among what may beat it."""

    def __init__(self, candidates: Sequence[Candidate], pricing: Pricing, roles: _Roles) -> None:
        self._candidates, self._pricing, self._roles = candidates, pricing, roles
        self._metric_ends = pricing.metric_ends(candidates)

    def best(self) -> Found | None:
        everyone = range(len(self._candidates))
        start, end = self._pricing.start, self._pricing.end
        if len(everyone) < WORTHWHILE or self._pricing.links.special:
            return self._among(everyone)
        quick = self._among(sample(self._candidates, start, end, self._roles.first, self._roles.last))
        if quick is None:
            return self._among(everyone)
        kept, bound = narrowed(self._candidates, start, end, quick.cost, self._metric_ends)
        return self._among(kept, bound)

    def _among(self, indices: Sequence[int], bound: Bound | None = None) -> Found | None:
        found = Search(
            [self._candidates[index] for index in indices],
            self._pricing.links,
            self._pricing.start,
            self._pricing.end,
            first=[self._roles.first[index] for index in indices],
            last=[self._roles.last[index] for index in indices],
            bound=bound,
            metric_ends=self._metric_ends,
        ).best()
        if found is None:
            return None
        return replace(found, runs=tuple((indices[number], start, end) for number, start, end in found.runs))


class _Widest:
    """The chain whose slowest stage is fastest; among those, the one of least latency.

    A stage's time is its run's blocks times its block time, or its link's transfer if that is longer. The best
    bottleneck is one of finitely many values: binary search for the smallest under which the end can be reached at
    all, then a latency search with runs limited to it. Reaching ignores that a chain names a server once, so the
    second search may fail; then the next larger bottleneck is tried.
    """

    def __init__(self, candidates: Sequence[Candidate], links: Links, start: int, end: int, roles: _Roles) -> None:
        self._candidates, self._links = candidates, links
        self._start, self._end, self._roles = start, end, roles

    def best(self) -> Found | None:
        bottlenecks = sorted(self._bottlenecks())
        index = bisect_left(bottlenecks, True, key=self._reaches)
        while index < len(bottlenecks):
            found = self._within(bottlenecks[index])
            if found is not None:
                return found
            index += 1
        return None

    def _bottlenecks(self) -> set[float]:
        values = {length * c.block_s for c in self._candidates for length in range(1, c.end - c.start + 1)}
        for c in self._candidates:
            values |= {c.place.transfer_s, c.entry.transfer_s, c.exit.transfer_s}
        return values

    def _limit(self, candidate: Candidate, bottleneck_s: float) -> int:
        length = candidate.end - candidate.start
        if length * candidate.block_s <= bottleneck_s:
            return length
        return int(bottleneck_s * _ROUNDING / candidate.block_s)

    def _usable(self, bottleneck_s: float) -> list[tuple[Candidate, int, bool, bool, bool]]:
        """(candidate, longest run, may be first, may be last, may be entered from or left to a server)."""
        return [
            (
                c,
                self._limit(c, bottleneck_s),
                first and c.entry.transfer_s <= bottleneck_s,
                last and c.exit.transfer_s <= bottleneck_s,
                c.place.transfer_s <= bottleneck_s,
            )
            for c, first, last in zip(self._candidates, self._roles.first, self._roles.last, strict=True)
        ]

    def _reaches(self, bottleneck_s: float) -> bool:
        """True when runs within the bottleneck can cover all blocks; reachable borders form one interval."""
        usable = [entry for entry in self._usable(bottleneck_s) if entry[1] > 0]
        far = self._start
        for c, limit, first, last, linked in usable:
            if first and last and limit >= self._end - self._start:
                return True
            if first and linked:
                far = max(far, min(self._start + limit, c.end))
        return far > self._start and self._extends(far, usable)

    def _extends(self, far: int, usable: list[tuple[Candidate, int, bool, bool, bool]]) -> bool:
        while True:
            reach = far
            for c, limit, _, last, linked in usable:
                if not linked or c.start > far:
                    continue
                reached = min(min(far, c.end - 1) + limit, c.end)
                if last and reached >= self._end:
                    return True
                reach = max(reach, min(reached, self._end - 1))
            if reach == far:
                return False
            far = reach

    def _within(self, bottleneck_s: float) -> Found | None:
        """The chain of least latency whose stages and links all keep within the bottleneck."""
        usable, length = self._usable(bottleneck_s), self._end - self._start
        options = [
            Found(_alone_s(c, length), ((index, self._start, self._end),))
            for index, (c, limit, first, last, _) in enumerate(usable)
            if first and last and limit >= length
        ]
        kept = [index for index, (_, limit, _, _, linked) in enumerate(usable) if linked and limit > 0]
        search = Search(
            [usable[index][0] for index in kept],
            self._links,
            self._start,
            self._end,
            first=[usable[index][2] for index in kept],
            last=[usable[index][3] for index in kept],
            limits=[usable[index][1] for index in kept],
        )
        found = search.best()
        if found is not None:
            runs = tuple((kept[number], start, end) for number, start, end in found.runs)
            options.append(replace(found, runs=runs))
        return min(options, key=lambda option: option.cost, default=None)


def _alone_s(candidate: Candidate, blocks: int) -> float:
    """The step time of a chain of one server."""
    on_the_way = candidate.entry.total_s + candidate.exit.total_s
    return on_the_way + candidate.visit_s + blocks * candidate.block_s


def _explain(found: Found, candidates: Sequence[Candidate], links: Links) -> Plan:
    """The plan of a found chain, each hop with its terms."""
    hops: list[Hop] = []
    before: Candidate | None = None
    slowest_s = candidates[found.runs[-1][0]].exit.transfer_s
    for index, start, end in found.runs:
        candidate = candidates[index]
        leg = candidate.entry if before is None else links.leg(before.place, candidate.place)
        terms = CostTerms(
            network_s=leg.network_s,
            transfer_s=leg.transfer_s,
            overhead_s=HOP_OVERHEAD_S,
            queue_s=candidate.server.queue_s,
            compute_s=(end - start) * candidate.block_s,
            risk_s=candidate.risk_s,
        )
        hops.append(
            Hop(
                peer=candidate.place.peer,
                start=start,
                end=end,
                compute_class=candidate.server.announcement.compute_class,
                terms=terms,
            )
        )
        # a relayed hop is two links, each busy with its own frame while the other carries the next
        wire = leg.transfer_s if before is None else wire_s(before.place, candidate.place)
        slowest_s = max(slowest_s, wire, terms.compute_s)
        before = candidate
    way_back = candidates[found.runs[-1][0]].exit
    back = CostTerms(network_s=way_back.network_s, transfer_s=way_back.transfer_s)
    total_s = sum(hop.terms.total_s for hop in hops) + back.total_s
    return Plan(hops=tuple(hops), back=back, total_s=total_s, steps_per_s=1.0 / slowest_s)


def _no_route(
    request: PlanRequest,
    view: SwarmView,
    pricing: Pricing,
    candidates: Sequence[Candidate],
    ruled_out: Counter[Reason],
    roles: _Roles,
) -> NoRoute:
    """Why there is no chain, and what would help, in one line."""
    missing = view.where(states=(State.ONLINE, State.DRAINING)).missing(pricing.start, pricing.end)
    if missing:
        return NoRoute(_nobody_holds(view, missing), missing)
    counts = coverage(view.num_blocks, ((c.start, c.end) for c in candidates))
    missing = gaps(counts, pricing.start, pricing.end)
    if missing:
        return NoRoute(_ruled_out(request, view, missing, ruled_out), missing)
    if not any(roles.first):
        return NoRoute(_no_role(view, "turns token ids into hidden states", (pricing.start, pricing.start + 1)))
    if not any(roles.last):
        return NoRoute(_no_role(view, "runs the LM head", (pricing.end - 1, pricing.end)))
    return NoRoute(
        f"no chain covers blocks {pricing.start}:{pricing.end} of {view.model} without using a server twice; "
        f"start another with: swarmnode join {view.model} --serve {pricing.start}:{pricing.end}"
    )


def _nobody_holds(view: SwarmView, missing: tuple[tuple[int, int], ...]) -> str:
    joining = view.where(states=(State.JOINING,))
    soon = all(not gaps(joining.coverage(), start, end) for start, end in missing)
    if soon:
        return f"servers of blocks {_words(missing)} of {view.model} are still loading weights; try again shortly"
    first = missing[0]
    return (
        f"no server holds blocks {_words(missing)} of {view.model}; "
        f"start one with: swarmnode join {view.model} --serve {first[0]}:{first[1]}"
    )


def _ruled_out(
    request: PlanRequest, view: SwarmView, missing: tuple[tuple[int, int], ...], ruled_out: Counter[Reason]
) -> str:
    reasons = ", ".join(f"{count} {reason.value}" for reason, count in sorted(ruled_out.items(), key=_by_name))
    room = f" (a session of {request.kv_tokens} tokens)" if ruled_out[Reason.KV] else ""
    first = missing[0]
    return (
        f"no server of blocks {_words(missing)} of {view.model} can be used: {reasons}{room}; wait, relax the request, "
        f"or start another with: swarmnode join {view.model} --serve {first[0]}:{first[1]}"
    )


def _no_role(view: SwarmView, what: str, span: tuple[int, int]) -> str:
    return (
        f"no server of blocks {span[0]}:{span[1]} of {view.model} {what}; start one with: "
        f"swarmnode join {view.model} --serve {span[0]}:{span[1]}, or give this client the model's files"
    )


def _by_name(entry: tuple[Reason, int]) -> str:
    return entry[0].value


def _words(spans: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{start}:{end}" for start, end in spans)
