"""Families that transformers' own layers run: equal to transformers itself, within the product's rules."""

from itertools import pairwise

import pytest
import torch
from helpers.foreign_models import FOREIGN, make_foreign
from helpers.tiny_models import load_oracle
from swarmnode.kernels.engine import load_embedding, load_head, load_span
from swarmnode.kernels.kvcache import KVPool
from swarmnode.kernels.loading.checkpoint import open_checkpoint
from swarmnode.kernels.span import Piece
from swarmnode.protocol.tensors import Codec

TOKENS = 60
GREEDY = 6
TOLERANCE = 1e-4
RARE = ("codegen", "gpt_neo", "gpt_bigcode", "xglm", "nemotron", "vaultgemma")


class Whole:
    """A whole model, its blocks cut into spans at `borders`."""

    def __init__(self, folder, borders=(), dtype=torch.float32):
        self.folder = folder
        checkpoint = open_checkpoint(folder, cache_dir=folder / "cache")
        edges = [0, *borders, checkpoint.config.num_blocks]
        self.spans = [load_span(checkpoint, first, last, dtype=dtype) for first, last in pairwise(edges)]
        self.embedding = load_embedding(checkpoint, dtype=dtype)
        self.head = load_head(checkpoint, dtype=dtype)
        self.pools = [KVPool(1 << 26, checkpoint.config, span.start, span.end, dtype) for span in self.spans]

    def lane(self):
        return [pool.open_lane() for pool in self.pools]

    def feed(self, *parts, cuts=frozenset(), codec=Codec.FP32):
        """Logits of one pass over (lane, ids) parts."""
        hidden = torch.cat([self.embedding(ids) for _, ids in parts])
        for number, span in enumerate(self.spans):
            pieces = [Piece(lane[number], lane[number].length, len(ids), cuts, codec) for lane, ids in parts]
            hidden = span.run(hidden, pieces)
        return self.head.logits(hidden)


def families():
    """All, those with a form of their own in the default run."""
    for name in FOREIGN:
        yield pytest.param(name, marks=[pytest.mark.slow] if name in RARE else [])


@pytest.fixture(scope="module", params=list(families()))
def pair(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = make_foreign(tmp_path_factory.mktemp("model"), request.param)
    ids = torch.randint(3, 160, (TOKENS,), generator=torch.Generator().manual_seed(1))
    oracle = load_oracle(folder)
    with torch.no_grad():
        expected = oracle(ids[None]).logits[0]
    return Whole(folder), oracle, ids, expected


def assert_close(actual, expected):
    assert (actual - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.03  # or the comparison would say nothing


def test_prefill_in_chunks_beside_another_session(pair):
    ours, _, ids, expected = pair
    lane, other = ours.lane(), ours.lane()
    found, first = [], 0
    for count in (25, 1, 1, 3, 30):
        found.append(ours.feed((other, ids[:2]), (lane, ids[first : first + count]))[2:])
        first += count
    assert_close(torch.cat(found), expected)


def test_greedy_tokens_after_a_truncation(pair):
    ours, oracle, ids, expected = pair
    lane, text = ours.lane(), ids[:30].tolist()
    ours.feed((lane, ids))
    for cache in lane:
        cache.truncate(20)
    logits = ours.feed((lane, ids[20:30]))
    assert_close(logits, expected[20:30])
    for _ in range(GREEDY):
        with torch.no_grad():
            best = int(oracle(torch.tensor([text])).logits[0, -1].argmax())
        assert int(logits[-1].argmax()) == best
        text.append(best)
        logits = ours.feed((lane, torch.tensor([best])))


def test_three_servers(pair):
    ours, _, ids, expected = pair
    apart = Whole(ours.folder, borders=(1, 2))
    lane = apart.lane()
    assert_close(torch.cat([apart.feed((lane, part)) for part in (ids[:40], ids[40:41], ids[41:])]), expected)


def test_one_server_cuts_where_three_would(pair):
    ours, _, ids, _ = pair
    apart, cut = (
        Whole(ours.folder, borders=(1, 2)),
        ours.feed((ours.lane(), ids), cuts=frozenset((1, 2)), codec=Codec.BF16),
    )
    hidden = apart.embedding(ids)
    for number, span in enumerate(apart.spans):
        hidden = hidden.bfloat16().float() if number else hidden
        hidden = span.run(hidden, [Piece(apart.lane()[number], 0, TOKENS)])
    assert torch.equal(apart.head.logits(hidden), cut)


def test_bf16_is_near(pair):
    ours, _, ids, expected = pair
    rough = Whole(ours.folder, dtype=torch.bfloat16)
    difference = (rough.feed((rough.lane(), ids)) - expected).abs().median()
    assert difference < 0.1 * expected.std()
