"""A row's bits do not depend on batch, chunking, neighbours, threads, cache history or how blocks are split."""

import random
from itertools import pairwise

import pytest
import torch
from helpers.tiny_models import RandomCheckpoint, make_config
from swarmnode.kernels.engine import load_embedding, load_head, load_span
from swarmnode.kernels.kvcache import KVPool, NeedReplay
from swarmnode.kernels.models.config import ExpertsConfig, RopeConfig
from swarmnode.kernels.span import Piece
from swarmnode.protocol.tensors import Codec

TOKENS = 190
CUTS = frozenset({1, 2})
SLIDING = {"sliding_window": 40, "sliding_blocks": (True, False, True)}
GEMMA = {
    "family": "gemma3",
    "local_rope": RopeConfig(theta=500.0),
    "activation": "gelu_tanh",
    "qk_norm": True,
    "norm_offset": 1.0,
    "post_norms": True,
}
LAYER = {"norm": "layer", "gated": False, "qkv_bias": True, "output_bias": True, "mlp_bias": True}
# Big enough for packed kernels (65,536 weights), of several head shapes; widths that are no power of two.
SHAPES = {
    "gqa": {"num_heads": 8},
    "one-kv-head-wide": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 256},
    "mha-one-head-per-group": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64},
    "odd-group": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 88, "qkv_bias": True},
    "sliding": {"num_heads": 8, **SLIDING},
    "gemma": {"num_heads": 8, **GEMMA, **SLIDING},
    "gelu-biases": {"activation": "gelu", "mlp_bias": True, "output_bias": True, "qkv_bias": True, "num_heads": 8},
    "small-weights": {},
    "capped": {"num_heads": 6, "score_softcap": 5.0, **GEMMA, **SLIDING},
    "alibi": {**LAYER, "alibi": "bloom", "rotary_dim": 0, "num_heads": 6, "num_kv_heads": 6, "embed_norm": True},
    "falcon": {**LAYER, "alibi": "falcon", "rotary_dim": 0, "num_heads": 5, "num_kv_heads": 1, "residual": "shared"},
    "neox": {**LAYER, "rotary_dim": 8, "num_heads": 8, "num_kv_heads": 8, "residual": "parallel"},
    "scaled": {"num_heads": 8, "residual_scale": 0.22, "logit_scale": 0.3, "unrotated_blocks": (1,)},
    "experts": {"num_heads": 8, "experts": ExpertsConfig(count=5, active=2, intermediate_size=320, shared_size=320)},
    "sinks-and-experts": {
        "num_heads": 6,
        "sinks": True,
        "swiglu_limit": 1.5,
        "experts": ExpertsConfig(count=6, active=3, intermediate_size=320, router="chosen", bias=True),
        **SLIDING,
    },
}
PRECISIONS = [
    (torch.float32, "none"),
    (torch.bfloat16, "none"),
    (torch.bfloat16, "int8"),
    (torch.bfloat16, "nf4"),
]
MIXED = {
    "capped": PRECISIONS[1:2],
    "alibi": PRECISIONS[:1],
    "falcon": PRECISIONS[2:3],
    "neox": PRECISIONS[1:2],
    "experts": PRECISIONS[2:4],
    "sinks-and-experts": PRECISIONS[1:2],
}
"""What they run in by default; the rest is slow."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


class Model:
    def __init__(self, shape, dtype, quant, hidden=256, inner=320, kv=None):
        config = make_config(num_blocks=3, hidden_size=hidden, intermediate_size=inner, **SHAPES[shape])
        checkpoint = RandomCheckpoint(config)
        self.span = load_span(checkpoint, 0, 3, dtype=dtype, quant=quant)
        self.head = load_head(checkpoint, dtype=dtype)
        self.embedding = load_embedding(checkpoint, dtype=dtype)
        self.pool = KVPool(1 << 28, config, 0, 3, kv or dtype)
        self.rows = self.embedding(torch.randint(0, 64, (TOKENS,), generator=torch.Generator().manual_seed(3)))

    def feed(self, lane, first, last, **more):
        return self.span.run(self.rows[first:last], [Piece(lane, first, last - first, **more)])

    def whole(self, **more):
        return self.feed(self.pool.open_lane(), 0, TOKENS, **more)


def random_passes(model, expected, rng, **more):
    """Feed the sequence in random chunks, with random neighbours before and after; compare every row."""
    lane, others, first = model.pool.open_lane(), [model.pool.open_lane() for _ in range(2)], 0
    while first < TOKENS:
        count = min(rng.choice((1, 1, 2, 3, 5, 16, 33, 64, 100)), TOKENS - first)
        pieces = [(lane, first, count, more)]
        for other in others:
            extra = rng.choice((0, 0, 1, 4, 70))
            if extra and other.length + extra <= TOKENS:
                pieces.insert(rng.randrange(len(pieces) + 1), (other, other.length, extra, {}))
        rows = torch.cat([model.rows[start : start + size] for _, start, size, _ in pieces])
        out = model.span.run(rows, [Piece(who, start, size, **kw) for who, start, size, kw in pieces])
        offset = sum(size for _, _, size, _ in pieces[: [who for who, *_ in pieces].index(lane)])
        assert torch.equal(out[offset : offset + count], expected[first : first + count]), (first, count)
        first += count
    for each in (lane, *others):
        each.free()


def cases():
    """Every shape in every precision; the mixed forms in a few of them by default."""
    for shape in SHAPES:
        for dtype, quant in PRECISIONS:
            rare = shape in MIXED and (dtype, quant) not in MIXED[shape]
            yield pytest.param(shape, dtype, quant, marks=[pytest.mark.slow] if rare else [])


@pytest.mark.parametrize(("shape", "dtype", "quant"), list(cases()))
def test_rows_do_not_depend_on_anything_else(shape, dtype, quant):
    model = Model(shape, dtype, quant)
    expected = model.whole(cuts=CUTS, codec=Codec.INT8S)
    rng = random.Random(f"{shape}{dtype}{quant}")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        random_passes(model, expected, rng, cuts=CUTS, codec=Codec.INT8S)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_with_a_cache_in_8_bits_do_not_depend_on_anything_else(shape):
    dtype, quant = MIXED.get(shape, PRECISIONS[1:2])[0]
    model = Model(shape, dtype, quant, kv=torch.int8)
    expected = model.whole()
    assert not torch.equal(expected, Model(shape, dtype, quant).whole())
    rng = random.Random(shape)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        random_passes(model, expected, rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_over_threads(dtype):
    """Widths where torch splits elementwise work over threads within rows."""
    model = Model("gemma", dtype, "none", hidden=640, inner=2048)
    expected = model.whole()
    torch.set_num_threads(3)
    assert torch.equal(model.whole(), expected)
    random_passes(model, expected, random.Random(5))


@pytest.mark.parametrize("kv", [None, torch.int8])
@pytest.mark.parametrize("shape", ["gqa", "gemma"])
def test_truncation_leaves_no_trace(shape, kv):
    model = Model(shape, torch.bfloat16, "none", kv=kv)
    expected, rng = model.whole(), random.Random(8)
    lane, first = model.pool.open_lane(), 0
    while first < TOKENS:
        count = min(rng.choice((1, 7, 50)), TOKENS - first)
        out = model.feed(lane, first, first + count)
        assert torch.equal(out, expected[first : first + count])
        first += count
        back = rng.randrange(0, min(64, first) + 1) if rng.random() < 0.3 else 0
        if first < TOKENS:
            poison = torch.full((3, 256), float("nan"), dtype=torch.bfloat16)
            model.span.run(poison, [Piece(lane, first, 3)])
            lane.truncate(first - back)
            first -= back


def test_deep_truncation_of_a_window_asks_for_replay():
    model = Model("sliding", torch.float32, "none")
    model.rows = model.rows.repeat(3, 1)
    lane, whole = model.pool.open_lane(), model.feed(model.pool.open_lane(), 0, 3 * TOKENS)
    for first in range(0, 3 * TOKENS, 10):
        assert torch.equal(model.feed(lane, first, first + 10), whole[first : first + 10])
    assert lane.blocks[0].base > 0
    with pytest.raises(NeedReplay) as caught:
        lane.truncate(60)
    assert caught.value.position == 0
    lane.truncate(0)
    assert torch.equal(model.feed(lane, 0, 3 * TOKENS), whole)


def test_splitting_blocks_over_servers_changes_nothing():
    config = make_config(num_blocks=4, hidden_size=256, intermediate_size=320)
    checkpoint = RandomCheckpoint(config)
    rows = torch.randn(70, 256, generator=torch.Generator().manual_seed(1)).bfloat16()

    def run(edges, **more):
        hidden = rows
        for start, end in pairwise(edges):
            span = load_span(checkpoint, start, end, dtype=torch.bfloat16)
            pool = KVPool(1 << 24, config, start, end, torch.bfloat16)
            hidden = span.run(hidden, [Piece(pool.open_lane(), 0, 70, **more)])
        return hidden

    assert torch.equal(run([0, 4]), run([0, 1, 3, 4]))
    cut = {"cuts": frozenset({1, 3}), "codec": Codec.INT8S}
    from swarmnode.kernels.codecs import round_trip

    hidden = rows
    for start, end in ((0, 1), (1, 3), (3, 4)):
        span = load_span(checkpoint, start, end, dtype=torch.bfloat16)
        pool = KVPool(1 << 24, config, start, end, torch.bfloat16)
        hidden = span.run(hidden, [Piece(pool.open_lane(), 0, 70, **cut)])
        hidden = round_trip(hidden, Codec.INT8S) if end < 4 else hidden
    assert torch.equal(hidden, run([0, 4], **cut))
    assert not torch.equal(hidden, run([0, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_row_stand_alone(dtype):
    model = Model("gqa", dtype, "none")
    hidden = model.whole()
    logits = model.head.logits(hidden)
    for count in (1, 2, 5, 64):
        assert torch.equal(model.head.logits(hidden[:count]), logits[:count])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lane_may_serve_part_of_the_span(dtype):
    model = Model("gemma", dtype, "none")
    middle = model.pool.open_lane(1, 2)
    alone = model.span.run(model.rows, [Piece(middle, 0, TOKENS)], 1, 2)
    first = model.span.run(model.rows[:9], [Piece(model.pool.open_lane(0, 3), 0, 9)], 1, 2)
    assert torch.equal(first, alone[:9])
