"""How fast a chain is planned, against plain Dijkstra and networkx on the same swarm and the same costs.

    python tests/bench/planner.py [--quick]

All figures are process seconds of one run on one core; the ratios are what carries over to other machines.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
from pathlib import Path

import networkx

sys.path.insert(0, str(Path(__file__).parents[1] / "routing"))

from swarmnode.routing.coordinates import Coordinate
from swarmnode.routing.cost import Pricing
from swarmnode.routing.metrics import Metrics
from swarmnode.routing.placement import next_move
from swarmnode.routing.planner import PlanRequest, Policy, plan
from swarmnode.routing.repair import plan_repair
from worlds import planet

BLOCKS = 126
REQUEST = PlanRequest(bytes_per_token=8192)


def timed(work, repeats=1):
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def textbook(swarm, metrics):
    """Dijkstra with a heap over (server, border), every pair of servers at every border an edge."""
    pricing = Pricing(REQUEST, swarm, metrics, 0.0)
    candidates, _ = pricing.candidates()
    links = pricing.links
    holders = [[] for _ in range(BLOCKS + 1)]
    for index, c in enumerate(candidates):
        for border in range(c.start, c.end):
            holders[border].append(index)
    heap = [(c.entry.total_s + c.visit_s + c.block_s, i, 1) for i, c in enumerate(candidates) if c.start == 0]
    heapq.heapify(heap)
    done, best = set(), float("inf")
    while heap:
        cost, index, border = heapq.heappop(heap)
        if cost >= best:
            return best
        if (index, border) in done:
            continue
        done.add((index, border))
        here = candidates[index]
        if border == BLOCKS:
            best = min(best, cost + here.exit.total_s)
            continue
        for other in holders[border]:
            if (other, border + 1) in done:
                continue
            step = here.block_s
            if other != index:
                there = candidates[other]
                step = links.leg(here.place, there.place).total_s + there.visit_s + there.block_s
            heapq.heappush(heap, (cost + step, other, border + 1))
    return best


def with_networkx(swarm, metrics):
    """The same graph built for networkx, and its Dijkstra: (seconds to build, seconds to search, cost)."""
    pricing = Pricing(REQUEST, swarm, metrics, 0.0)
    candidates, _ = pricing.candidates()

    def build():
        graph = networkx.DiGraph()
        holders = [[] for _ in range(BLOCKS + 1)]
        for index, c in enumerate(candidates):
            for border in range(c.start, c.end):
                holders[border].append(index)
                graph.add_edge((index, border), (index, border, "ran"), weight=c.block_s)
                graph.add_edge((index, border, "ran"), (index, border + 1), weight=0.0) if border + 1 < c.end else None
            if c.start == 0:
                graph.add_edge("in", (index, 0), weight=c.entry.total_s + c.visit_s)
            if c.end == BLOCKS:
                graph.add_edge((index, BLOCKS - 1, "ran"), "out", weight=c.exit.total_s)
        for border in range(1, BLOCKS):
            for p in holders[border - 1]:
                for q in holders[border]:
                    if p != q:
                        leg = pricing.links.leg(candidates[p].place, candidates[q].place)
                        weight = leg.total_s + candidates[q].visit_s
                        graph.add_edge((p, border - 1, "ran"), (q, border), weight=weight)
        return graph

    build_s, graph = timed(build)
    search_s, cost = timed(lambda: networkx.dijkstra_path_length(graph, "in", "out"))
    return build_s, search_s, cost


def row(name, seconds, ours, note=""):
    print(f"  {name:<44} {seconds * 1e3:>10.2f} ms {seconds / ours:>9.1f}x  {note}")


def planning(servers, held, rivals):
    swarm, metrics = planet(random.Random(1), servers, BLOCKS, held), Metrics(coordinate=Coordinate(height=0.005))
    print(f"{servers} servers x {BLOCKS} blocks, {held} blocks a server")
    ours, found = timed(lambda: plan(REQUEST, swarm, metrics, now=0.0), repeats=5)
    row("plan, min-latency", ours, ours, f"{len(found.hops)} hops, {found.total_s * 1e3:.0f} ms a step")
    repairs = []
    for hop in found.hops:
        failed = {hop.peer}
        repairs.append(
            timed(lambda f=failed: plan_repair(found.hops, f, swarm, metrics, REQUEST, now=0.0), repeats=3)[0]
        )
    repairs.sort()
    row("repair after one failure, median", repairs[len(repairs) // 2], ours)
    row("repair after one failure, slowest hop", repairs[-1], ours)
    if "textbook" in rivals:
        seconds, cost = timed(lambda: textbook(swarm, metrics))
        row("plain Python Dijkstra", seconds, ours, "same cost" if abs(cost - found.total_s) < 1e-9 else f"COST {cost}")
    if "networkx" in rivals:
        build_s, search_s, cost = with_networkx(swarm, metrics)
        row("networkx, graph built", build_s, ours)
        row("networkx, search", search_s, ours, "same cost" if abs(cost - found.total_s) < 1e-9 else f"COST {cost}")


def throughput(servers, held):
    swarm, metrics = planet(random.Random(1), servers, BLOCKS, held), Metrics(coordinate=Coordinate(height=0.005))
    request = PlanRequest(bytes_per_token=8192, tokens=128, policy=Policy.MAX_THROUGHPUT)
    seconds, found = timed(lambda: plan(request, swarm, metrics, now=0.0))
    print(f"max-throughput, {servers} servers, {held} blocks: {seconds * 1e3:.0f} ms, {found.steps_per_s:.2f} steps/s")


def placing(servers):
    swarm = planet(random.Random(1), servers, 80, 12)
    seconds, move = timed(lambda: next_move(swarm, reload_s=80.0))
    print(f"next move of {servers} servers x 80 blocks: {seconds * 1e3:.0f} ms ({'a move' if move else 'none'})")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small swarms only")
    if parser.parse_args().quick:
        planning(300, 12, {"textbook", "networkx"})
        return
    planning(1000, 12, {"textbook", "networkx"})
    planning(1000, 40, {"textbook"})
    planning(200, 40, {"textbook", "networkx"})
    throughput(1000, 12)
    placing(40)
    placing(1000)


if __name__ == "__main__":
    main()
