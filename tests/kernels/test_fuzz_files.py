"""The short fuzzing run over the headers of weights files (the other parsers: tests/protocol/test_fuzz.py)."""

from itertools import islice
from random import Random

import pytest
from fuzz.engine import Report, attempt, attempt_traced, inputs, load_corpus
from fuzz.files import FILES


@pytest.mark.parametrize("target", FILES, ids=lambda target: target.name)
def test_damaged_headers_are_refused_by_name(target):
    corpus = [data for data, _ in load_corpus(target.name)]
    assert corpus
    attempt(target, target.seed(Random(1)), Report("warm-up"))
    report = Report(target.name)
    for data in (*corpus, *islice(inputs(target, "short", corpus), 300)):
        attempt_traced(target, data, report)
    assert (report.crashes, report.excess) == ([], [])
    assert report.accepted > 50
