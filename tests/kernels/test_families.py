"""Every family and variation against transformers: logits within 1e-4 in fp32 and the same greedy tokens."""

import pytest
import torch
from helpers.tiny_models import VARIATIONS, load_oracle, make_config, make_variation
from swarmnode.kernels.engine import load_embedding, load_head, load_span
from swarmnode.kernels.kvcache import KVPool
from swarmnode.kernels.loading.folder import FolderCheckpoint
from swarmnode.kernels.reference import run_block
from swarmnode.kernels.span import Piece
from swarmnode.protocol.errors import UnsupportedModel

TOKENS = 90
GREEDY = 8
TOLERANCE = 1e-4


class Ours:
    """A whole tiny model in one process."""

    def __init__(self, folder):
        self.folder = folder
        checkpoint = FolderCheckpoint(folder, "tiny", folder)
        blocks = checkpoint.config.num_blocks
        self.span = load_span(checkpoint, 0, blocks, dtype=torch.float32)
        self.embedding = load_embedding(checkpoint, dtype=torch.float32)
        self.head = load_head(checkpoint, dtype=torch.float32)
        self.pool = KVPool(1 << 26, checkpoint.config, 0, blocks, torch.float32)

    def feed(self, *parts):
        """Logits of one pass over (lane, ids) parts."""
        hidden = torch.cat([self.embedding(ids) for _, ids in parts])
        return self.head.logits(self.span.run(hidden, [Piece(lane, lane.length, len(ids)) for lane, ids in parts]))


@pytest.fixture(scope="module", params=list(VARIATIONS))
def pair(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = make_variation(tmp_path_factory.mktemp("model"), request.param)
    ids = torch.randint(3, 160, (TOKENS,), generator=torch.Generator().manual_seed(1))
    oracle = load_oracle(folder)
    with torch.no_grad():
        expected = oracle(ids[None]).logits[0]
    return Ours(folder), oracle, ids, expected


def assert_close(actual, expected):
    assert (actual - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1  # or the comparison would say nothing


def test_prefill(pair):
    ours, _, ids, expected = pair
    assert_close(ours.feed((ours.pool.open_lane(), ids)), expected)


def test_token_by_token(pair):
    ours, _, ids, expected = pair
    lane = ours.pool.open_lane()
    assert_close(torch.cat([ours.feed((lane, ids[i : i + 1])) for i in range(TOKENS)]), expected)


def test_chunks_beside_another_session(pair):
    ours, _, ids, expected = pair
    lane, other = ours.pool.open_lane(), ours.pool.open_lane()
    found, first = [], 0
    for count in (5, 1, 40, 3, 41):
        logits = ours.feed((other, ids[:2]), (lane, ids[first : first + count]))
        found.append(logits[2:])
        first += count
    assert_close(torch.cat(found), expected)


def test_greedy_tokens(pair):
    ours, oracle, ids, _ = pair
    lane, text = ours.pool.open_lane(), ids[:30].tolist()
    logits = ours.feed((lane, ids[:30]))[-1]
    for _ in range(GREEDY):
        with torch.no_grad():
            expected = int(oracle(torch.tensor([text])).logits[0, -1].argmax())
        assert int(logits.argmax()) == expected
        text.append(expected)
        logits = ours.feed((lane, torch.tensor([expected])))[-1]


def test_truncated(pair):
    ours, _, ids, expected = pair
    lane = ours.pool.open_lane()
    ours.feed((lane, ids[:60]))
    ours.feed((lane, ids[:7]))  # a wrong guess, cut off again
    lane.truncate(41)
    assert_close(ours.feed((lane, ids[41:])), expected[41:])


def test_span_split_over_three(pair):
    ours, _, ids, _ = pair
    checkpoint = FolderCheckpoint(ours.folder, "tiny", ours.folder)
    hidden = ours.embedding(ids)
    whole = ours.span.run(hidden, [Piece(ours.pool.open_lane(), 0, TOKENS)])
    for index in range(checkpoint.config.num_blocks):
        span = load_span(checkpoint, index, index + 1, dtype=torch.float32)
        pool = KVPool(1 << 24, checkpoint.config, index, index + 1, torch.float32)
        hidden = span.run(hidden, [Piece(pool.open_lane(), 0, TOKENS)])
    assert checkpoint.config.num_blocks == 3
    assert torch.equal(hidden, whole)


@pytest.mark.parametrize(("quant", "most"), [("int8", 0.03), ("nf4", 0.3)])
def test_quantized_blocks_stay_near(pair, quant, most):
    """What a block adds, against fp32: the median over rows, since a token may be routed to another expert."""
    ours, _, ids, _ = pair
    checkpoint = FolderCheckpoint(ours.folder, "tiny", ours.folder)
    hidden = ours.embedding(ids)
    added = []
    for chosen in ("none", quant):
        span = load_span(checkpoint, 0, 1, dtype=torch.float32, quant=chosen)
        pool = KVPool(1 << 24, checkpoint.config, 0, 1, torch.float32)
        added.append(span.run(hidden, [Piece(pool.open_lane(), 0, TOKENS)]) - hidden)
    exact, near = added
    error = float(((near - exact).norm(dim=1) / exact.norm(dim=1)).median())
    assert 0 < error < most


@pytest.mark.parametrize("change", [{"norm": "layer"}, {"residual": "shared"}, {"alibi": "bloom"}, {"rotary_dim": 8}])
def test_the_slow_reference_refuses_forms_it_does_not_know(change):
    with pytest.raises(UnsupportedModel, match="the reference knows no"):
        run_block(make_config(**change), 0, {}, torch.zeros(1, 128))
