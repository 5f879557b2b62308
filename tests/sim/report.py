"""`make sim`: runs the experiments large, prints their tables (Markdown) and draws docs/sim/*.svg.

python -m sim.report               everything: hours of one core
python -m sim.report lookups size  some of it
--quick                            small, a few minutes: to see that it works
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

from sim.plots import chart
from sim.scenarios import (
    LIES,
    churn,
    eclipse,
    heavy_tailed,
    lookups,
    mean,
    partition,
    places,
    quantile,
    siege,
    size,
)
from sim.villains import STRATEGIES

PLOTS = Path(__file__).parents[2] / "docs" / "sim"
RIVALS = (
    {"name": "kademlia, 5 s", "with": {}},
    {"name": "kademlia, 1 s", "with": {"timeout_s": 1.0}},
    {"name": "kademlia, 1 s, k = 26", "with": {"timeout_s": 1.0, "width": 26}},
    {"name": "kademlia, 1 s, its own tables", "with": {"timeout_s": 1.0}, "own": True},
)


def table(*rows):
    """Print rows, the first being the head."""
    head, *body = rows
    print("| " + " | ".join(head) + " |")
    print("|" + "|".join(" --- " for _ in head) + "|")
    for row in body:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
    print(flush=True)


def plot(name, *what, **options):
    PLOTS.mkdir(exist_ok=True)
    (PLOTS / f"{name}.svg").write_text(chart(*what, **options))


def run_lookups(quick):
    count, tries = (200, 20) if quick else (1000, 300)
    rows = [("silent dead", "look-up", "recall", "round trips, mean", "95 %", "longest", "questions")]
    curves = {}
    for dead in (0.0, 0.1, 0.2, 0.3, 0.4):
        rivals = RIVALS if dead in (0.0, 0.2) else RIVALS[1:2]
        for name, seen in lookups(count, dead, tries=tries, rivals=rivals[:2] if quick else rivals).items():
            named = {"locate": "ours, 20 nearest", "read": "ours, a read (10 nearest)"}.get(name, name)
            curves.setdefault(named, []).append((100 * dead, mean(seen.rtts)))
            rows.append(
                (
                    f"{dead:.0%}",
                    named,
                    f"{mean(seen.recalls):.3f}",
                    f"{mean(seen.rtts):.1f}",
                    f"{quantile(seen.rtts, 0.95):.1f}",
                    f"{max(seen.rtts):.1f}",
                    f"{mean(seen.asked):.1f}",
                )
            )
    table(*rows)
    shown = ("ours, 20 nearest", "ours, a read (10 nearest)", "kademlia, 1 s")
    plot(
        "dead",
        f"Look-ups among {count} nodes, some silently dead",
        "dead, %",
        "mean round trips",
        {name: curves[name] for name in shown},
    )
    rows = [("handshakes", "look-up", "recall", "round trips, mean", "questions")]
    for name, seen in lookups(count, 0.2, tries=tries // 3, handshake=2).items():
        rows.append(
            ("2 round trips", name, f"{mean(seen.recalls):.3f}", f"{mean(seen.rtts):.1f}", f"{mean(seen.asked):.1f}")
        )
    table(*rows)


CHURN_HEAD = (
    "nodes",
    "churn",
    "runs",
    "reads complete",
    "live servers missed",
    "dead seen after 2 min",
    "longest",
    "read, mean s",
    "95 %",
    "questions a minute and node",
    "kB/h a node",
)


def churn_row(count, name, seen):
    """A row of CHURN_HEAD out of some runs."""
    reads, expected = sum(one.reads for one in seen), sum(one.expected for one in seen)
    took = [took_s for one in seen for took_s in one.took_s]
    return (
        count,
        name,
        len(seen),
        f"{sum(one.complete for one in seen)} of {reads}",
        f"{sum(one.missing for one in seen)} of {expected}",
        sum(one.ghosts for one in seen),
        f"{max(one.oldest_ghost_s for one in seen):.0f} s",
        f"{mean(took):.2f}",
        f"{quantile(took, 0.95):.2f}",
        f"{mean(one.questions_per_minute for one in seen):.0f}",
        f"{mean(one.kilobytes_per_hour for one in seen):,.0f}",
    )


def plot_churn(by_rate):
    """{share a minute: runs of 100 nodes} as a chart."""
    curves = {
        "reads complete, %": lambda seen: 100 * sum(one.complete for one in seen) / sum(one.reads for one in seen),
        "dead seen, at most s": lambda seen: max(one.oldest_ghost_s for one in seen),
        "questions a minute": lambda seen: mean(one.questions_per_minute for one in seen),
    }
    plot(
        "churn",
        "100 servers, some replaced every minute",
        "replaced a minute, %",
        "",
        {name: [(100 * rate, value(seen)) for rate, seen in by_rate.items()] for name, value in curves.items()},
    )


def run_churn(quick):
    minutes = 2.0 if quick else 10.0
    rows, by_rate = [CHURN_HEAD], {}
    for rate in (0.1, 0.3) if quick else (0.1, 0.3, 0.6, 1.0):
        by_rate[rate] = [churn(100, share_per_minute=rate, minutes=minutes)]
        rows.append(churn_row(100, f"{100 * rate:.0f} %/min", by_rate[rate]))
        gc.collect()
    plot_churn(by_rate)
    plans = [
        (100, "30 %/min", 20, {}),
        (100, "30 %/min, 1 % of messages lost", 3, {"loss": 0.005}),
        (100, "30 %/min, a third behind NAT", 3, {"client_share": 0.33}),
        (100, "30 %/min, clocks up to 40 s off", 3, {"skew_s": 40.0}),
        (100, "Weibull 0.6, mean 200 s", 3, {"lifetime": heavy_tailed(200.0)}),
        (1000, "30 %/min", 10, {"keys": 10, "every_s": 1.0}),
    ]
    for count, name, runs, options in plans[:1] if quick else plans:
        seen = []
        for seed in range(2 if quick else runs):
            seen.append(churn(count, seed=seed, minutes=minutes, **options))
            gc.collect()
        rows.append(churn_row(count, name, seen))
        print("|", *rows[-1], sep=" | ", flush=True)
    table(*rows)


SIZE_HEAD = (
    "nodes",
    "recall",
    "round trips, mean",
    "95 %",
    "questions",
    "read, mean s",
    "lost",
    "held by nearest 4",
    "from memory",
    "questions a minute and node",
    "kB/h a node",
    "of that puts",
)


def size_row(seen):
    """A row of SIZE_HEAD."""
    return (
        seen.nodes,
        f"{mean(seen.lookup.recalls):.3f}",
        f"{mean(seen.lookup.rtts):.2f}",
        f"{quantile(seen.lookup.rtts, 0.95):.2f}",
        f"{mean(seen.lookup.asked):.1f}",
        f"{mean(seen.read_s):.2f}",
        f"{seen.lost} of {seen.entries}",
        f"{seen.held:.1%}",
        f"{seen.cached:.0%}",
        f"{seen.questions_per_minute:.0f}",
        f"{seen.kilobytes_per_hour:,.0f}",
        f"{seen.put_share:.0%}",
    )


def plot_size(sizes):
    """Growth with the size, as a chart."""
    plot(
        "size",
        "A look-up of the 20 nearest, by size of the network",
        "nodes",
        "",
        {
            "questions": [(one.nodes, mean(one.lookup.asked)) for one in sizes],
            "round trips x 10": [(one.nodes, 10 * mean(one.lookup.rtts)) for one in sizes],
        },
        log_x=True,
    )


def run_size(quick):
    rows, sizes = [SIZE_HEAD], []
    for count in (100, 300) if quick else (100, 300, 1000, 3000, 10_000):
        sizes.append(size(count))
        gc.collect()
        rows.append(size_row(sizes[-1]))
        print("|", *rows[-1], sep=" | ", flush=True)
    table(*rows)
    plot_size(sizes)


ECLIPSE_HEAD = (
    "ids next to the key",
    "/24s",
    "paths",
    "reads right",
    "told: holders",
    "told: /24s",
    "told: crowding",
    "honest holders",
    "of one /24 in a bucket, a table",
)


def eclipse_row(subnets, paths, seen):
    """A row of ECLIPSE_HEAD."""
    return (
        40,
        subnets,
        paths,
        f"{seen.read} of {seen.tries}",
        f"{mean(seen.holders):.1f}",
        f"{mean(seen.subnets):.1f}",
        f"{mean(seen.crowding):.1f}, at most {max(seen.crowding):.1f}",
        f"{mean(seen.honest_holders):.1f}, at least {min(seen.honest_holders)}",
        f"{seen.most_per_bucket}, {seen.most_per_table}",
    )


def plot_villains(curves):
    """{paths: [(share of villains, what was seen)]} as a chart."""
    plot(
        "villains",
        "Reads among villains who name only each other",
        "villains, %",
        "reads right, %",
        {
            f"{paths} path{'s' * (paths > 1)}": [(100 * share, 100 * seen.read / seen.tries) for share, seen in sieges]
            for paths, sieges in curves.items()
        },
    )


def run_enemies(quick):
    count, tries = (200, 10) if quick else (1000, 100)
    rows = [
        (
            "villains",
            "what they do",
            "paths",
            "reads right",
            "announcements held by an honest node",
            "false entries",
            "read, mean s",
            "questions",
        )
    ]
    curves = {}
    for share in (0.2, 0.4):
        for strategies in (STRATEGIES, *((name,) for name in STRATEGIES)):
            for paths in (1, 3):
                gc.collect()
                seen = siege(count, share, strategies, paths=paths, tries=tries)
                name = "all of it" if len(strategies) > 1 else strategies[0]
                rows.append(
                    (
                        f"{share:.0%}",
                        name,
                        paths,
                        f"{seen.read / seen.tries:.0%}",
                        f"{seen.held / seen.tries:.0%}",
                        seen.false,
                        f"{mean(seen.took_s):.2f}",
                        f"{mean(seen.asked):.1f}",
                    )
                )
    table(*rows)
    for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        for paths in (1, 3):
            gc.collect()
            seen = siege(count, share, ("accomplices",), paths=paths, tries=tries)
            curves.setdefault(paths, []).append((share, seen))
    plot_villains(curves)
    rows = [ECLIPSE_HEAD]
    for subnets in (1, 4, 40):
        for paths in (1, 3):
            seen = eclipse(
                200 if quick else 1000,
                40,
                subnets,
                tries=2 if quick else 10,
                paths=paths,
                ground=400 if quick else 8000,
            )
            rows.append(eclipse_row(subnets, paths, seen))
    table(*rows)


def run_partition(quick):
    rows = [("nodes", "cut for", "reads complete before", "during, of the own half", "whole again after")]
    for count, cut_s in ((60, 120.0),) if quick else ((60, 120.0), (60, 900.0), (300, 600.0)):
        seen = partition(count, cut_s=cut_s)
        rows.append(
            (
                count,
                f"{cut_s:.0f} s",
                f"{seen.across_before:.0%}",
                f"{seen.across_during:.0%}",
                f"{seen.healed_s:.0f} s",
            )
        )
    table(*rows)


def run_coordinates(quick):
    rows = [("peers", "samples each", "liars", "median error", "9 of 10 under", "own idea")]

    count = 60 if quick else 150

    def add(measured, lying, samples, **options):
        seen = places(count, samples, **options)
        rows.append((count, measured, lying, f"{seen.median:.0%}", f"{seen.ninth:.0%}", f"{seen.own:.0%}"))

    for samples in (30, 100, 300, 1000):
        add(samples, "none", samples)
    for share in (0.01, 0.1, 0.2):
        for lie in LIES:
            add("300, then 100 with liars", f"{share:.0%} {lie}", 400, liars=share, lie=lie, liars_from=300)
    table(*rows)


PARTS = {
    "lookups": run_lookups,
    "enemies": run_enemies,
    "partition": run_partition,
    "coordinates": run_coordinates,
    "size": run_size,
    "churn": run_churn,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which tables (all)")
    parser.add_argument("--quick", action="store_true", help="small networks, for a first look")
    chosen = parser.parse_args()
    gc.disable()  # ten thousand nodes are millions of objects and no cycles worth looking for
    for name in chosen.parts or PARTS:
        start = time.process_time()
        print(f"### {name}\n", flush=True)
        PARTS[name](chosen.quick)
        gc.collect()
        print(f"({time.process_time() - start:.0f} s of processor time)\n", flush=True)


if __name__ == "__main__":
    main()
