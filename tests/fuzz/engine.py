"""Runs targets over generated and damaged inputs and keeps the books: outcomes, memory, time, coverage."""

import base64
import gc
import json
import resource
import sys
import time
import traceback
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import swarmnode

from .seeds import bomb

CORPUS = Path(__file__).with_name("corpus")
PACKAGE = str(Path(swarmnode.__file__).parent)
TRACED_EVERY = 50
"""One input of so many runs under tracemalloc, which makes it slow."""
BOMBS = 0.002
"""Share of inputs that are meant to blow up in memory, whatever the format."""
LARGE = 4096
"""Larger inputs are always traced: floods are what memory is about."""
POOL = 400
"""Inputs kept for mutation; grown by what reaches new code when coverage is collected, else by fresh seeds."""


@dataclass
class Report:
    """What a campaign against one target has seen."""

    name: str
    inputs: int = 0
    frames: int = 0
    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    crashes: list = field(default_factory=list)
    """(input, traceback)"""
    peak_bytes: int = 0
    """Most memory one input took, of those traced."""
    excess: list = field(default_factory=list)
    """Inputs over the target's memory bound."""
    slowest_s: float = 0.0
    seconds: float = 0.0
    grown_kib: int = 0
    """How much larger the process became after the first tenth."""


def load_corpus(name):
    """The inputs kept for a target: (bytes, why)."""
    path = CORPUS / f"{name}.json"
    if not path.exists():
        return []
    return [(base64.b85decode(item["input"]), item.get("why", "")) for item in json.loads(path.read_text())]


def save_corpus(name, entries):
    """One entry a line, so that a new one is a line in a diff."""
    lines = [
        json.dumps({"input": base64.b85encode(data).decode(), **({"why": why} if why else {})}, ensure_ascii=False)
        for data, why in entries
    ]
    (CORPUS / f"{name}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


def inputs(target, seed, pool):
    """An endless stream of inputs: a third fresh from the grammar, the rest damaged."""
    rng = Random(f"{target.name} {seed}")
    pool = list(pool) or [target.seed(rng)]
    while True:
        dice = rng.random()
        if dice < BOMBS:
            data = bomb(rng)
        elif dice < 0.34:
            data = target.seed(rng)
            if len(pool) < POOL:
                pool.append(data)
            else:
                pool[rng.randrange(POOL)] = data
        else:
            data = target.mutate(rng.choice(pool), rng, rng.choice(pool))
        yield data


def attempt(target, data, report):
    """One input. Its outcome goes into the report; nothing is raised but what stops the process."""
    report.inputs += 1
    report.frames += target.frames(data)
    started = time.process_time()
    try:
        target.run(data)
        report.accepted += 1
    except target.errors as exc:
        report.refused[type(exc).__name__] += 1
    except Exception:
        report.crashes.append((data, traceback.format_exc()))
    report.slowest_s = max(report.slowest_s, time.process_time() - started)


def attempt_traced(target, data, report):
    """The same, with the memory it takes at most."""
    tracemalloc.start()
    attempt(target, data, report)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    report.peak_bytes = max(report.peak_bytes, peak)
    if peak > target.per_byte * len(data) + target.base:
        report.excess.append((data, f"{peak} bytes of memory for {len(data)}"))


def campaign(target, frames, seed, *, traced_every=TRACED_EVERY):
    """Run a target over at least so many frames."""
    report = Report(target.name)
    attempt(target, target.seed(Random(seed)), Report("warm-up"))  # modules and caches are no input's memory
    for data, _ in load_corpus(target.name):
        attempt_traced(target, data, report)
    started = time.perf_counter()
    warm, resident = frames // 10, 0
    for data in inputs(target, seed, [data for data, _ in load_corpus(target.name)]):
        if report.frames >= frames:
            break
        if not resident and report.frames >= warm:
            gc.collect()
            resident = _resident_kib()
        if report.inputs % traced_every and len(data) < LARGE:
            attempt(target, data, report)
        else:
            attempt_traced(target, data, report)
    gc.collect()
    report.seconds = time.perf_counter() - started
    report.grown_kib = max(0, _resident_kib() - resident)
    return report


def _resident_kib():
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not on Linux: the peak is better than nothing
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize() // 1024


def branches(target, data):
    """The pairs of lines of the package that ran after one another: a cheap measure of what an input reaches."""
    seen, last = set(), {}

    def local(frame, event, _):
        if event == "line":
            code = frame.f_code
            seen.add((code.co_filename, last.get(code), frame.f_lineno))
            last[code] = frame.f_lineno
        return local

    def enter(frame, event, _):
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(enter)
    try:
        target.run(data)
    except target.errors:
        pass
    finally:
        sys.settrace(None)
    return seen


def collect(target, count, seed, *, largest=2000):
    """Inputs that together reach every branch that `count` random ones do: the kept ones first, small ones before."""
    kept = load_corpus(target.name)
    covered = set().union(*(branches(target, data) for data, _ in kept))
    pool = [data for data, _ in kept]
    stream = inputs(target, seed, pool)
    fresh = sorted((next(stream) for _ in range(count)), key=len)
    for data in fresh:
        if len(data) <= largest and not (found := branches(target, data)) <= covered:
            covered |= found
            kept.append((data, ""))
    return kept
