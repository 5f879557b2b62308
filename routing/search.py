"""The cheapest chain through a layered graph, exactly and fast in plain Python.

The graph has a node per (server, block border); a server runs one block from border to border, and between two blocks
the chain may change servers for the price of a hop. That is a DAG ordered by border, so Dijkstra needs no heap: borders
are taken left to right. What costs time is the edge between every pair of servers at every border: 1.1 million for
1,000 servers of 12 blocks, 12.7 million at 40. Two exact facts avoid nearly all of them.

*Early stop.* link(p, q) >= floor(p) + floor(q), see cost.floor_s. With the servers that can be left sorted by cost +
floor, the scan for q ends at the first one that cannot win.

*Only span ends matter.* Suppose links obey the triangle inequality and the chain changes from p to q in the middle of
both spans. If q's block is no faster, moving the change one block later costs nothing; else moving it earlier gains. So
an optimal chain exists that changes only where p's span ends or q's begins. The client's own links and the roles of
first and last hop obey no triangle, so one block after the start and one before the end all pairs are scanned; so they
are in a repair at an end that is the client. With measured links, limits
on a run, or windows (below), all pairs are scanned, with the early stop alone.

A chain names a server once. Shortest paths do not know that, so a chain that comes back to a server is split in two
smaller problems, "enters it before" and "enters it after", each with a window on where it may be entered; best first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf
from typing import Final

from .bounds import Bound
from .cost import Candidate, Links, floor_s

MAX_BRANCHES: Final = 128
"""Splits before the search gives up the proof and pins every repeated server to one entry."""
MAX_WORK: Final = 250_000
"""The same in (server, border) nodes looked at after the first search: about a quarter of a second."""

_Record = tuple[int, int, "_Record | None"]
"""(candidate, border entered, the record before): a chain as a linked list, shared between its extensions."""
_Windows = dict[int, tuple[int, int]]
"""Owner -> the first and last border where it may be entered."""


@dataclass(frozen=True, slots=True)
class Found:
    """A chain: its cost and (candidate index, start, end) of each hop."""

    cost: float
    runs: tuple[tuple[int, int, int], ...]


class Search:
    """One prepared search over candidates sorted by peer. Call best()."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        links: Links,
        start: int,
        end: int,
        *,
        first: Sequence[bool],
        last: Sequence[bool],
        limits: Sequence[int] | None = None,
        bound: Bound | None = None,
        metric_ends: tuple[bool, bool] = (False, False),
    ) -> None:
        self._start, self._end = start, end
        self._first, self._last, self._limits = first, last, limits
        self._starts = [c.start for c in candidates]
        self._ends = [c.end for c in candidates]
        self._block = [c.block_s for c in candidates]
        self._visit = [c.visit_s for c in candidates]
        self._entry = [c.entry.total_s for c in candidates]
        self._exit = [c.exit.total_s for c in candidates]
        self._floor = [floor_s(c.place) for c in candidates]
        self._half = [c.place.half_s for c in candidates]
        self._wire = [c.place.transfer_s for c in candidates]
        points = [c.place.coordinate for c in candidates]
        self._located = [p is not None for p in points]
        self._x = [p.x / 2 if p is not None else 0.0 for p in points]
        self._y = [p.y / 2 if p is not None else 0.0 for p in points]
        self._height = [p.height / 2 if p is not None else 0.0 for p in points]
        self._owner = _owners(candidates)
        self._special = _special_links(candidates, links)
        self._all_located = all(self._located)
        self._metric = not self._special and (self._all_located or not any(self._located))
        bound = bound or Bound(inf, (0.0,) * (end - start + 1), (0.0,) * len(candidates))
        self._room = [bound.cost - rest for rest in bound.rest]
        self._leave = bound.leave
        odd = zip((start + 1, end - 1), metric_ends, strict=True)
        self._odd_borders = [border for border, metric in odd if not metric]
        self._cover: list[list[int]] = [[] for _ in range(end - start)]
        self._size = sum(c.end - c.start for c in candidates)
        self._starting: list[list[int]] = [[] for _ in range(end - start)]
        for index, candidate in enumerate(candidates):
            self._starting[candidate.start - start].append(index)
            for column in self._cover[candidate.start - start : candidate.end - start]:
                column.append(index)

    def best(self) -> Found | None:
        """The cheapest chain that names no server twice, or None."""
        found = self._cheapest({})
        if found is None:
            return None
        heap: list[tuple[float, int, Found, _Windows]] = [(found.cost, 0, found, {})]
        branches = 0
        while heap:
            _, _, found, windows = heapq.heappop(heap)
            repeats = self._repeats(found)
            if not repeats:
                return found
            if branches > MAX_BRANCHES or branches * self._size > MAX_WORK:
                heap.clear()
                pinned = self._pinned(found, windows)
                if pinned is not None:
                    return pinned
            for half in self._split(repeats, windows):
                smaller = self._cheapest(half)
                branches += 1
                if smaller is not None:
                    heapq.heappush(heap, (smaller.cost, branches, smaller, half))
        return None

    def _pinned(self, found: Found, windows: _Windows) -> Found | None:
        """Give up the proof: each repeated server keeps the entry of its longest run, until none is repeated."""
        chain: Found | None = found
        while chain is not None:
            repeated = self._repeats(chain)
            if not repeated:
                return chain
            windows = windows | {owner: self._longest(chain, owner) for owner, _, _ in repeated}
            chain = self._cheapest(windows)
        return None

    def _longest(self, found: Found, owner: int) -> tuple[int, int]:
        _, start = max((stop - start, -start) for index, start, stop in found.runs if self._owner[index] == owner)
        return -start, -start

    def _repeats(self, found: Found) -> list[tuple[int, int, int]]:
        """(owner, border of its first entry, border of its second) of every server named twice."""
        entered: dict[int, int] = {}
        repeats = []
        for index, start, _ in found.runs:
            owner = self._owner[index]
            if owner in entered:
                repeats.append((owner, entered[owner], start))
            entered.setdefault(owner, start)
        return repeats

    def _split(self, repeats: list[tuple[int, int, int]], windows: _Windows) -> list[_Windows]:
        owner, early, late = repeats[0]
        low, high = windows.get(owner, (self._start, self._end))
        return [windows | {owner: (low, late - 1)}, windows | {owner: (early + 1, high)}]

    def _cheapest(self, windows: _Windows) -> Found | None:
        """The cheapest chain with every entry inside its window, servers possibly repeated."""
        cost = [inf] * len(self._starts)
        record: list[_Record | None] = [None] * len(self._starts)
        labels = _Labels(self._limits, self._block) if self._limits is not None else None
        general = bool(windows) or labels is not None or not self._metric
        for border in range(self._start, self._end):
            entries = self._entries(border, cost, record, general)
            for best, into, chain in entries:
                if windows and not self._inside(into, border, windows):
                    continue
                if labels is not None:
                    labels.add(into, border, best, chain)
                else:
                    cost[into], record[into] = best, chain
            cover = self._cover[border - self._start]
            if labels is not None:
                labels.advance(cover, border + 1, cost, record)
            else:
                for index in cover:
                    cost[index] += self._block[index]
        return self._finish(cost, record)

    def _entries(
        self, border: int, cost: list[float], record: list[_Record | None], general: bool
    ) -> list[tuple[float, int, _Record]]:
        """Every worthwhile entry at `border`: (cost including the visit, candidate, its chain)."""
        cover = self._cover[border - self._start]
        if border == self._start:
            return [(self._entry[q] + self._visit[q], q, (q, border, None)) for q in cover if self._first[q]]
        floor = self._floor
        room, leave = self._room[border - self._start], self._leave
        before = self._cover[border - 1 - self._start]
        leaving = [(cost[p] + floor[p], p) for p in before if cost[p] + leave[p] < room]
        ended = sorted([pair for pair in leaving if self._ends[pair[1]] == border])
        everyone = general or border in self._odd_borders
        starting = self._starting[border - self._start]
        if everyone or starting:
            leaving.sort()
        found = []
        for q in cover if everyone or ended else starting:
            sources = leaving if everyone or self._starts[q] == border else ended
            worst = room - leave[q]
            if self._limits is None and cost[q] < worst:
                worst = cost[q]
            hopeless = not sources or sources[0][0] + floor[q] + self._visit[q] >= worst
            if hopeless and q not in self._special:
                continue
            best, source = self._scan(q, border, worst, sources, cost)
            if source >= 0:
                found.append((best, q, (q, border, record[source])))
        return found

    def _scan(
        self, q: int, border: int, worst: float, sources: list[tuple[float, int]], cost: list[float]
    ) -> tuple[float, int]:
        """The cheapest way into q below `worst`: (cost, server left), server -1 when there is none."""
        special = self._special.get(q)
        if special is not None or not self._all_located:
            return self._scan_mixed(q, border, worst, sources, cost, special or {})
        xs, ys, heights, wires = self._x, self._y, self._height, self._wire
        x, y, wire, fixed = xs[q], ys[q], wires[q], heights[q] + self._visit[q]
        bar, source = worst - self._floor[q] - self._visit[q], -1
        for key, p in sources:
            if key >= bar:
                break
            other = wires[p]
            total = cost[p] + hypot(xs[p] - x, ys[p] - y) + heights[p] + fixed
            total += wire if wire > other else other
            if total < worst and p != q:
                worst, source = total, p
                bar = worst - self._floor[q] - self._visit[q]
        return worst, source

    def _scan_mixed(
        self,
        q: int,
        border: int,
        worst: float,
        sources: list[tuple[float, int]],
        cost: list[float],
        special: dict[int, float],
    ) -> tuple[float, int]:
        """_scan for servers without coordinates and links that are known better than their floor."""
        source, fixed = -1, self._visit[q]
        for p, link_s in special.items():
            alive = self._starts[p] < border <= self._ends[p]
            if alive and cost[p] + link_s + fixed < worst:
                worst, source = cost[p] + link_s + fixed, p
        for key, p in sources:
            if key + self._floor[q] + fixed >= worst:
                break
            if p == q or p in special:
                continue
            total = cost[p] + self._link_s(p, q) + fixed
            if total < worst:
                worst, source = total, p
        return worst, source

    def _link_s(self, p: int, q: int) -> float:
        wire = max(self._wire[p], self._wire[q])
        if self._located[p] and self._located[q]:
            return hypot(self._x[p] - self._x[q], self._y[p] - self._y[q]) + self._height[p] + self._height[q] + wire
        return max(self._half[p], self._half[q]) + wire

    def _inside(self, index: int, border: int, windows: _Windows) -> bool:
        low, high = windows.get(self._owner[index], (self._start, self._end))
        return low <= border <= high

    def _finish(self, cost: list[float], record: list[_Record | None]) -> Found | None:
        done = [
            (cost[p] + self._exit[p], p)
            for p in (self._cover[-1] if self._cover else ())
            if self._last[p] and cost[p] < inf
        ]
        if not done:
            return None
        total, last = min(done)
        runs, step, end = [], record[last], self._end
        while step is not None:
            index, start, step = step
            runs.append((index, start, end))
            end = start
        return Found(total, tuple(reversed(runs)))


class _Labels:
    """For runs of limited length: per server, the entries that may still be the best one, as a sliding minimum.

    An entry at border a with cost c costs c + (b - a) * block at border b, so entries compare by c - a * block; an
    older and dearer one never wins again, an older and cheaper one wins until its run is full.
    """

    def __init__(self, limits: Sequence[int], block: Sequence[float]) -> None:
        self._limits, self._block = limits, block
        self._entries: dict[int, list[tuple[float, int, _Record]]] = {}

    def add(self, index: int, border: int, cost: float, chain: _Record) -> None:
        offset = cost - border * self._block[index]
        entries = self._entries.setdefault(index, [])
        while entries and entries[-1][0] >= offset:
            entries.pop()
        entries.append((offset, border, chain))

    def advance(self, cover: Sequence[int], border: int, cost: list[float], record: list[_Record | None]) -> None:
        """Set every covering server's cost and chain at `border`, dropping the runs that are too long for it."""
        for index in cover:
            entries = self._entries.get(index, [])
            while entries and border - entries[0][1] > self._limits[index]:
                entries.pop(0)
            cost[index] = entries[0][0] + border * self._block[index] if entries else inf
            record[index] = entries[0][2] if entries else None


def _owners(candidates: Sequence[Candidate]) -> list[int]:
    """The same number for every candidate of one peer."""
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(c.place.peer.raw, len(numbers)) for c in candidates]


def _special_links(candidates: Sequence[Candidate], links: Links) -> dict[int, dict[int, float]]:
    """receiver -> sender -> seconds, for the candidate pairs whose link is not estimated."""
    special: dict[int, dict[int, float]] = {}
    if not links.special:
        return special
    by_peer: dict[bytes, list[int]] = {}
    for index, candidate in enumerate(candidates):
        by_peer.setdefault(candidate.place.peer.raw, []).append(index)
    for sender, receiver in links.special:
        for p in by_peer.get(sender.raw, ()):
            for q in by_peer.get(receiver.raw, ()):
                leg = links.leg(candidates[p].place, candidates[q].place)
                special.setdefault(q, {})[p] = leg.total_s
    return special
