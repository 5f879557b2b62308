"""Many sessions at once, coming and going: every row as if it were alone, and never more memory than allowed."""

import random

import pytest
import torch
from helpers.tiny_models import RandomCheckpoint, make_config
from swarmnode.kernels import ragged
from swarmnode.kernels.engine import load_span
from swarmnode.kernels.kvcache import KVPool, NeedReplay
from swarmnode.kernels.models.config import ModelConfig
from swarmnode.kernels.ragged import Attention, Rows
from swarmnode.kernels.span import Piece
from swarmnode.protocol.errors import ServerBusy

SESSIONS = 64
LONGEST = 330
TEXTS = 12
SHAPES = {
    "gqa-sliding": {"num_heads": 8, "sliding_window": 70, "sliding_blocks": (True, False)},
    "mha": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64},
    "capped": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 88, "score_softcap": 20.0},
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


class Crowd:
    """Up to SESSIONS lanes, each following one of a few texts whose solo results are known."""

    def __init__(self, shape, dtype, quant, budget_tiles):
        config = make_config(num_blocks=2, hidden_size=256, intermediate_size=320, **SHAPES[shape])
        self.span = load_span(RandomCheckpoint(config), 0, 2, dtype=dtype, quant=quant)
        self.pool = KVPool(0, config, 0, 2, dtype)
        self.pool.budget_bytes = budget_tiles * self.pool.page_bytes
        rng = torch.Generator().manual_seed(3)
        self.texts = [torch.randn(LONGEST, 256, generator=rng).to(dtype) for _ in range(TEXTS)]
        alone = KVPool(1 << 28, config, 0, 2, dtype)
        self.expected = [self.span.run(text, [Piece(alone.open_lane(), 0, LONGEST)]) for text in self.texts]
        self.sessions = []
        self.compared = 0

    def join(self, rng):
        origin = rng.choice(self.sessions) if self.sessions and rng.random() < 0.3 else None
        try:
            if origin:
                self.sessions.append((origin[0].fork(), origin[1]))
            else:
                lane = self.pool.open_lane(max_length=rng.randint(1, LONGEST))
                self.sessions.append((lane, rng.randrange(TEXTS)))
        except ServerBusy:
            self.leave(rng)  # no promise is left for it: somebody goes

    def leave(self, rng):
        lane, _ = self.sessions.pop(rng.randrange(len(self.sessions)))
        before = self.pool.free_bytes
        lane.free()
        assert self.pool.free_bytes > before

    def step(self, rng):
        """One pass of most sessions, each checked against its text alone."""
        work, rows, expected = [], [], []
        for lane, text in rng.sample(self.sessions, len(self.sessions)):
            if lane.length and rng.random() < 0.1:
                try:
                    lane.truncate(rng.randint(max(0, lane.length - 60), lane.length))
                except NeedReplay as exc:
                    lane.truncate(exc.position)
            count = min(rng.choice((0, 1, 1, 1, 1, 1, 1, 2, 90)), lane.max_length - lane.length)
            if count > 0:
                work.append(Piece(lane, lane.length, count))
                rows.append(self.texts[text][lane.length : lane.length + count])
                expected.append(self.expected[text][lane.length : lane.length + count])
        if work:
            assert torch.equal(self.span.run(torch.cat(rows), work), torch.cat(expected))
            self.compared += len(work)
        assert self.pool.used_bytes + self.pool.promised_bytes <= self.pool.budget_bytes


@pytest.mark.parametrize(
    ("shape", "dtype", "quant"),
    [
        ("gqa-sliding", torch.bfloat16, "none"),
        ("mha", torch.float32, "none"),
        ("capped", torch.bfloat16, "int8"),
        pytest.param("gqa-sliding", torch.bfloat16, "nf4", marks=pytest.mark.slow),
        pytest.param("mha", torch.bfloat16, "int8", marks=pytest.mark.slow),
        pytest.param("capped", torch.float32, "none", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_64_sessions_that_come_and_go_equal_their_solo_runs(shape, dtype, quant):
    rng = random.Random(f"{shape}{dtype}{quant}")
    crowd = Crowd(shape, dtype, quant, budget_tiles=380)
    most = 0
    for _ in range(40):
        while len(crowd.sessions) < SESSIONS and rng.random() < 0.95:
            crowd.join(rng)
        most = max(most, len(crowd.sessions))
        crowd.step(rng)
        for _ in range(rng.choice((0, 0, 1, 5))):
            crowd.leave(rng)
    assert most == SESSIONS
    assert crowd.compared > 1000
    for lane, _ in crowd.sessions:
        lane.free()
    assert (crowd.pool.used_bytes, crowd.pool.promised_bytes, crowd.pool.lanes) == (0, 0, 0)


def plan(lengths, config: ModelConfig):
    rows = [Rows(index, index + 1, length - 1) for index, length in enumerate(lengths)]
    mixed = torch.zeros(len(rows), config.num_heads * config.head_dim)
    return Attention(config, None, rows, mixed, torch.float32, batched=True)


def test_sessions_of_similar_length_attend_together(monkeypatch):
    config = make_config(num_heads=8)
    buckets = [bucket.pieces for bucket in plan([60, 64, 65, 600, 640, 1100, 5000], config)._buckets]
    assert buckets == [[5, 3, 4], [2, 0, 1]]
    monkeypatch.setattr(ragged, "GATHER_VALUES", 2 * config.num_kv_heads * 64 * config.head_dim)
    assert [bucket.pieces for bucket in plan([60] * 5, config)._buckets] == [[0, 1], [2, 3]]
