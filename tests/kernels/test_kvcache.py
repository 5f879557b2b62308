"""Memory of sessions: grown in tiles, bounded by one budget, given back at once."""

import random
from contextlib import contextmanager

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


def make_pool(budget=1 << 24, dtype=torch.bfloat16):
    return KVPool(budget, CONFIG, 0, 3, dtype)


def fill(lane, count):
    """What a pass does to a lane, without computing."""
    lane.reserve(lane.length + count)
    lane.length += count


def held(pool, lane):
    slots = sum(page.slots.numel() for block in lane.blocks for page in block.pages) * 2
    assert lane.held_bytes == slots
    return slots


def pages_of(lanes):
    return {id(page): page for lane in lanes for block in lane.blocks for page in block.pages}


def check(pool, lanes):
    """The books say what is there, nobody was promised more than there is, and everyone has what was promised."""
    pages = pages_of(lanes)
    assert pool.used_bytes == len(pages) * pool.page_bytes
    assert pool.used_bytes + pool.promised_bytes <= pool.budget_bytes
    assert pool.promised_bytes == sum(lane._promise for lane in lanes)
    for lane in lanes:
        if lane.max_length is not None:
            paid = sum(page.holders[0] is lane for block in lane.blocks for page in block.pages)
            assert lane._promise + paid * pool.page_bytes == pool.need(lane.max_length, lane.start, lane.end)


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


@pytest.mark.parametrize("seed", range(8))
def test_budget_is_never_exceeded(seed, monkeypatch):
    """Random sessions, half of the seeds with promises: then rows within the promise always find room."""
    monkeypatch.setattr(kvcache, "PASS_ROWS", 200)
    rng, promised = random.Random(seed), seed % 2 == 1
    pool, lanes = make_pool(3 * 30 * TILE * SLOT), []
    for _ in range(300):
        lane = rng.choice(lanes) if lanes else None
        match rng.randrange(5):
            case 0 if lane:
                lanes.remove(lane)
                lane.free()
            case 1 if lane:
                try:
                    lane.truncate(rng.randrange(lane.length + 1))
                except NeedReplay as exc:
                    lane.truncate(exc.position)
            case 2:
                try:
                    longest = rng.choice((1, 70, 500)) if promised else None
                    lanes.append(lane.fork() if lane and rng.random() < 0.5 else pool.open_lane(max_length=longest))
                except ServerBusy:
                    pass
            case _ if lane:
                count = rng.choice((1, 1, 30, 200))
                if not promised or lane.length + count <= lane.max_length:
                    try:
                        fill(lane, count)
                    except ServerBusy:
                        assert not promised
        check(pool, lanes)
    for lane in lanes:
        assert all(block.base + block.capacity >= lane.length for block in lane.blocks)
        lane.free()
    assert (pool.used_bytes, pool.promised_bytes, pool.lanes) == (0, 0, 0)


@contextmanager
def pool_lane(pool):
    lane = pool.open_lane()
    yield lane
    lane.free()


def test_a_promise_holds_room_that_others_do_not_get():
    pool = make_pool(3 * 4 * TILE * SLOT)
    lane = pool.open_lane(max_length=3 * TILE)
    assert (pool.used_bytes, pool.promised_bytes) == (0, pool.need(3 * TILE, 0, 3))
    with pytest.raises(ServerBusy, match="promised"):
        pool.open_lane(max_length=2 * TILE)
    with pool_lane(pool) as other, pytest.raises(ServerBusy, match="promised"):
        fill(other, 2 * TILE)
    fill(lane, 3 * TILE)
    assert pool.promised_bytes == 0
    with pytest.raises(LocalProtocolError, match="do not fit"):
        lane.reserve(3 * TILE + 1)
    lane.truncate(1)
    assert pool.used_bytes + pool.promised_bytes == pool.need(3 * TILE, 0, 3)


def test_what_a_window_needs_does_not_grow_with_the_length():
    pool = make_pool()
    assert pool.need(10_000, 0, 1) == pool.need(1_000_000, 0, 1) < pool.need(10_000, 1, 2)
    lane = pool.open_lane(max_length=10_000)
    while lane.length < 9_000:
        fill(lane, 500)
        assert len(lane.blocks[0].pages) * pool.page_bytes <= pool.need(10_000, 0, 1)


def test_a_fork_shares_pages_until_one_of_the_two_writes():
    pool = make_pool()
    lane = pool.open_lane(max_length=200)
    fill(lane, 70)
    before = pool.used_bytes
    lane.blocks[1].page(69).slots.fill_(3)
    other = lane.fork()
    assert pool.used_bytes == before
    fill(other, 1)
    assert pool.used_bytes == before + 3 * TILE * SLOT  # the torn page of every block
    other.blocks[1].page(69).slots.fill_(4)
    assert lane.blocks[1].page(69).slots.eq(3).all()
    assert other.blocks[1].page(0) is lane.blocks[1].page(0)
    lane.free()
    check(pool, [other])
    fill(other, 100)
    check(pool, [other])


def test_sliding_blocks_stay_small_and_tile_aligned():
    lane = make_pool().open_lane()
    for _ in range(1000):
        fill(lane, 1)
        sliding, full = lane.blocks[0], lane.blocks[1]
        assert sliding.base % TILE == 0
        assert sliding.base <= max(0, lane.length - 1 - 40 - ROLLBACK + 1)
        assert sliding.base + sliding.capacity >= lane.length
    assert sliding.capacity <= 40 + ROLLBACK + 2 * TILE
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
        for page in block.pages:
            page.slots[0].fill_(7)
            page.slots[1].fill_(float("nan"))
    lane.truncate(90)
    for block in lane.blocks:
        last = block.page(89).slots
        assert last[:, :, 90 - TILE :].eq(0).all()
        assert last[0, :, : 90 - TILE].eq(7).all()


def test_truncation_into_a_shared_page_spares_the_other():
    lane = make_pool().open_lane()
    fill(lane, 100)
    lane.blocks[1].page(99).slots.fill_(7)
    other = lane.fork()
    other.truncate(90)
    fill(other, 1)
    assert other.blocks[1].page(90).slots[:, :, 90 - TILE :].eq(0).all()
    assert lane.blocks[1].page(99).slots.eq(7).all()


def test_rows_written_over_pages_are_read_back():
    lane = make_pool().open_lane()
    fill(lane, 200)
    fresh = torch.arange(200.0).expand(2, CONFIG.num_kv_heads, CONFIG.head_dim, 200).transpose(2, 3)
    block = lane.blocks[1]
    for first, last in ((0, 50), (50, 64), (64, 200)):
        block.write(first, fresh[:, :, first:last])
    out = torch.empty(2, CONFIG.num_kv_heads, 192, CONFIG.head_dim)
    block.read(0, 192, out)
    assert torch.equal(out, fresh[:, :, :192])
    block.read(64, 128, out[:, :, :64])
    assert torch.equal(out[:, :, :64], fresh[:, :, 64:128])


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
