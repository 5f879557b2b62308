"""The short fuzzing run: the corpus again, fresh inputs for every parser, flat memory; and that the fuzzer can fail.

The long one is `python -P tests/fuzz/run.py --files` (docs/testing.md).
"""

import gc
import subprocess
import sys
import tracemalloc
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from fuzz import engine
from fuzz.engine import Report, attempt, attempt_traced, campaign, inputs, load_corpus, save_corpus
from fuzz.machines import STATEFUL
from fuzz.mutate import MAX_GROWTH, MUTATORS, mutate
from fuzz.targets import STATELESS, Target
from swarmnode.protocol.errors import RemoteProtocolError

TARGETS = (*STATELESS, *STATEFUL)
FRESH = 120
"""Inputs of each target's short run."""
FLAT = 64 * 1024
"""Bytes that may stay after as many inputs: caches of addresses and ids."""
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


@each_target
def test_corpus_gives_values_or_typed_errors_within_bounds(target):
    corpus = load_corpus(target.name)
    assert corpus, "run.py --collect makes one"
    attempt(target, target.seed(Random(1)), Report("warm-up"))
    report = Report(target.name)
    for data, _ in corpus:
        attempt_traced(target, data, report)
    assert (report.crashes, report.excess) == ([], [])


@each_target
def test_fresh_inputs_give_values_or_typed_errors_in_flat_memory(target):
    stream = inputs(target, "short", [data for data, _ in load_corpus(target.name)])
    report = Report(target.name)
    for data in islice(stream, FRESH):
        attempt(target, data, report)
    batch = list(islice(stream, FRESH))
    for data in batch:  # the first time fills caches
        attempt(target, data, report)
    gc.collect()
    tracemalloc.start()
    for data in batch:
        attempt(target, data, report)
    gc.collect()
    stays = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert report.crashes == []
    assert report.accepted > 0
    assert stays < FLAT


@each_target
def test_the_grammar_makes_valid_inputs(target):
    report = Report(target.name)
    for number in range(40):
        attempt(target, target.seed(Random(number)), report)
    assert report.accepted >= 10


# -- the fuzzer itself --


def breaks_at_ff(data):
    if b"\xff" in data:
        raise KeyError("a bug")
    if data[:1] == b"\0":
        raise RemoteProtocolError("refused")
    if len(data) > 200:
        bytearray(1 << 20)


FRAGILE = Target("fragile", lambda rng: rng.randbytes(8), breaks_at_ff, base=1 << 16)


def test_a_crash_is_found_and_kept_with_its_input():
    report = campaign(FRAGILE, 2000, 1)
    assert report.crashes
    assert all(b"\xff" in data and "a bug" in why for data, why in report.crashes)
    assert report.refused["RemoteProtocolError"]
    assert report.accepted + len(report.crashes) + report.refused.total() == report.inputs == 2000


def test_memory_over_the_bound_is_found():
    report = campaign(FRAGILE, 2000, 1, traced_every=1)
    assert report.excess
    assert all(len(data) > 200 for data, _ in report.excess)


def test_the_same_seed_makes_the_same_inputs():
    for target in (TARGETS[0], TARGETS[-1]):
        one, two = (list(islice(inputs(target, 3, []), 50)) for _ in range(2))
        assert one == two
        assert one != list(islice(inputs(target, 4, []), 50))


@pytest.mark.parametrize("mutator", set(MUTATORS), ids=lambda mutator: mutator.__name__)
def test_mutators_take_anything_and_do_something(mutator):
    rng, changed = Random(1), 0
    for size in (0, 1, 2, 3, 8, 300):
        for _ in range(20):
            data = bytearray(rng.randbytes(size))
            before = bytes(data)
            mutator(data, rng, rng.randbytes(4))
            changed += bytes(data) != before
    assert changed > 20
    assert len(mutate(bytes(10_000), rng, bytes(90_000))) <= 10_000 + MAX_GROWTH


def test_coverage_keeps_inputs_that_reach_new_code(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "CORPUS", tmp_path)
    target = next(target for target in TARGETS if target.name == "uvarint")
    save_corpus(target.name, [(b"\x01", "an example, with words")])
    kept = engine.collect(target, 200, 1)
    assert kept[0] == (b"\x01", "an example, with words")
    save_corpus(target.name, kept)
    assert load_corpus(target.name) == kept
    assert 2 <= len(kept) < 20
    assert engine.collect(target, 200, 1)[: len(kept)] == kept, "what is kept stays, in order"


def test_the_long_run_prints_its_table():
    script = Path(__file__).parents[1] / "fuzz" / "run.py"
    command = [sys.executable, "-P", script, "--frames", "200", "--target", "uvarint", "yamux"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "| uvarint | " in done.stdout
    assert done.stdout.endswith(" frames, 0 crashes\n")
