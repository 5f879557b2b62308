"""The draft model: what it guesses is what it would write, whatever it was asked before."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import RandomCheckpoint, make_config
from swarmnode.kernels import draft
from swarmnode.kernels.draft import Drafter
from swarmnode.protocol.errors import ServerBusy
from swarmnode.protocol.sampling import SamplingParams

GREEDY = SamplingParams()
DRAWN = SamplingParams(temperature=1.0, seed=3)


@pytest.fixture(params=[None, 16], ids=["full", "window"])
def drafter(request):
    torch.set_num_threads(1)
    windows = {} if request.param is None else {"sliding_window": 16, "sliding_blocks": (True, False)}
    return Drafter(RandomCheckpoint(make_config(**windows)), dtype=torch.float32)


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_guesses_do_not_depend_on_what_was_asked_before(drafter, params):
    history = [1 + n * n % 60 for n in range(300)]
    whole = drafter.guess("whole", history, 20, params)
    assert len(whole) == 20
    assert drafter.guess("steps", history[:100], 7, params)
    for count in (1, 4, 20):
        assert drafter.guess("steps", history, count, params) == whole[:count]
    assert drafter.guess("steps", history + whole[:5], 15, params) == whole[5:]
    assert drafter.guess("steps", history[:50], 5, params) == drafter.guess("fresh", history[:50], 5, params)
    for key in ("whole", "steps", "fresh", "never"):
        drafter.free(key)
    assert drafter.lanes == 0
    assert drafter._pool.used_bytes == 0


def test_it_ends_where_its_positions_end(drafter):
    most = drafter.max_positions
    assert len(drafter.guess(0, [1] * (most - 3), 10, GREEDY)) == 3
    assert drafter.guess(0, [1] * most, 10, GREEDY) == []
    assert drafter.guess(0, [1] * (most + 9), 10, GREEDY) == []


def test_its_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(draft, "KV_BYTES", 200_000)
    drafter = Drafter(RandomCheckpoint(make_config()), dtype=torch.float32)
    held = 200_000 // (drafter._pool.page_bytes * 2)
    for key in range(held):
        drafter.guess(key, [1, 2, 3], 1, GREEDY)
    with pytest.raises(ServerBusy):
        drafter.guess("one more", [1, 2, 3], 1, GREEDY)
