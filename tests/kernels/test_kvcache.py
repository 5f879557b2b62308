"""Memory of sessions: grown in tiles, bounded by one budget, given back at once."""

import random

import pytest
import torch
from helpers.tiny_models import make_config
from swarmnode.kernels import kvcache
from swarmnode.kernels.attention import TILE
from swarmnode.kernels.kvcache import ROLLBACK, KVPool, NeedReplay
from swarmnode.protocol.errors import LocalProtocolError, ServerBusy

CONFIG = make_config(num_blocks=3, sliding_window=40, sliding_blocks=(True, False, True))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():  # slabs are inference tensors
        yield


SLOT = 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 2


def make_pool(budget=1 << 24):
    return KVPool(budget, CONFIG, 0, 3, torch.bfloat16)


def fill(lane, count):
    """What a pass does to a lane, without computing."""
    lane.reserve(lane.length + count)
    lane.length += count


def held(pool, lane):
    slabs = sum(block.slab.numel() for block in lane.blocks) * 2
    assert lane.held_bytes == slabs
    return slabs


def test_nothing_is_taken_before_tokens_come():
    pool = make_pool()
    lane = pool.open_lane()
    assert (pool.used_bytes, pool.lanes) == (0, 1)
    lane.reserve(1)
    assert pool.used_bytes == held(pool, lane) == 3 * TILE * SLOT
    lane.reserve(TILE)
    assert pool.used_bytes == 3 * TILE * SLOT


def test_free_gives_everything_back_once():
    pool = make_pool()
    lanes = [pool.open_lane() for _ in range(2)]
    for lane in lanes:
        fill(lane, 100)
    lanes[0].free()
    lanes[0].free()
    assert (pool.used_bytes, pool.lanes) == (held(pool, lanes[1]), 1)
    with pytest.raises(LocalProtocolError, match="freed"):
        lanes[0].reserve(1)


def test_full_pool_says_how_much():
    pool = make_pool(3 * 2 * TILE * SLOT)
    lane = pool.open_lane()
    fill(lane, TILE + 1)
    with pytest.raises(ServerBusy, match=rf"{pool.used_bytes} of {pool.budget_bytes} bytes"):
        fill(lane, TILE)
    assert lane.length == TILE + 1
    assert pool.free_tokens == 0
    with pytest.raises(ServerBusy):
        pool.open_lane()


def test_lanes_are_bounded(monkeypatch):
    monkeypatch.setattr(kvcache, "MAX_LANES", 2)
    pool = make_pool()
    pool.open_lane()
    pool.open_lane().free()
    pool.open_lane()
    with pytest.raises(ServerBusy, match="2 sequences"):
        pool.open_lane()


@pytest.mark.parametrize("seed", range(5))
def test_budget_is_never_exceeded(seed):
    rng, budget = random.Random(seed), 3 * 14 * TILE * SLOT
    pool, lanes = make_pool(budget), []
    for _ in range(300):
        match rng.randrange(5):
            case 0 if lanes:
                lanes.pop(rng.randrange(len(lanes))).free()
            case 1 if lanes:
                lane = rng.choice(lanes)
                try:
                    lane.truncate(rng.randrange(lane.length + 1))
                except NeedReplay as exc:
                    lane.truncate(exc.position)
            case 2:
                try:
                    lanes.append(rng.choice(lanes).fork() if lanes and rng.random() < 0.5 else pool.open_lane())
                except ServerBusy:
                    pass
            case _ if lanes:
                try:
                    fill(rng.choice(lanes), rng.choice((1, 1, 30, 200)))
                except ServerBusy:
                    pass
        assert pool.used_bytes == sum(held(pool, lane) for lane in lanes) <= budget
    for lane in lanes:
        fill_end = [block.base + block.capacity for block in lane.blocks]
        assert all(end >= lane.length for end in fill_end)
        lane.free()
    assert (pool.used_bytes, pool.lanes) == (0, 0)


def test_sliding_blocks_stay_small_and_tile_aligned():
    lane = make_pool().open_lane()
    for _ in range(1000):
        fill(lane, 1)
        sliding, full = lane.blocks[0], lane.blocks[1]
        assert sliding.base % TILE == 0
        assert sliding.base <= max(0, lane.length - 1 - 40 - ROLLBACK + 1)
        assert sliding.base + sliding.capacity >= lane.length
    assert sliding.capacity <= 40 + ROLLBACK + kvcache.WINDOW_SLACK + 2 * TILE
    assert full.capacity >= 1000


def test_a_long_chunk_does_not_keep_a_window_big():
    lane = make_pool().open_lane()
    fill(lane, 2000)
    assert lane.blocks[0].capacity >= 2000
    fill(lane, 500)
    fill(lane, 500)
    assert lane.blocks[0].capacity <= 1000


def test_rollback_within_the_margin_needs_no_replay():
    lane = make_pool().open_lane()
    for _ in range(400):
        fill(lane, 1)
    lane.truncate(400 - ROLLBACK)
    fill(lane, ROLLBACK)
    with pytest.raises(NeedReplay):
        lane.truncate(100)
    assert lane.length == 400


def test_truncation_zeroes_what_it_forgets():
    lane = make_pool().open_lane()
    fill(lane, 100)
    for block in lane.blocks:
        block.slab[0].fill_(7)
        block.slab[1].fill_(float("nan"))
    lane.truncate(90)
    for block in lane.blocks:
        assert block.slab[:, :, 90:100].eq(0).all()
        assert block.slab[0, :, :90].eq(7).all()


def test_forks_share_nothing():
    pool = make_pool()
    lane = pool.open_lane()
    fill(lane, 70)
    lane.blocks[1].slab.fill_(3)
    other = lane.fork()
    assert (other.length, other.held_bytes) == (70, lane.held_bytes)
    other.blocks[1].slab.fill_(4)
    assert lane.blocks[1].slab.eq(3).all()
    lane.free()
    assert other.blocks[1].slab.eq(4).all()


def test_lanes_of_part_of_a_span():
    pool = make_pool()
    lane = pool.open_lane(1, 2)
    lane.reserve(1)
    assert pool.used_bytes == TILE * SLOT
    for start, end in ((-1, 2), (2, 2), (1, 4)):
        with pytest.raises(LocalProtocolError):
            pool.open_lane(start, end)


def test_impossible_truncation():
    lane = make_pool().open_lane()
    fill(lane, 5)
    for position in (-1, 6):
        with pytest.raises(LocalProtocolError, match="cannot truncate"):
            lane.truncate(position)
