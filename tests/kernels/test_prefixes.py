"""Sessions that begin alike: the same bits with and without sharing, exact books, memory and computing really saved."""

import random
from itertools import pairwise

import pytest
import torch
from helpers.tiny_models import RandomCheckpoint, make_config
from swarmnode.kernels import prefixes
from swarmnode.kernels.attention import TILE
from swarmnode.kernels.engine import load_span
from swarmnode.kernels.kvcache import KVPool, NeedReplay
from swarmnode.kernels.prefixes import seed_of
from swarmnode.kernels.span import Piece
from swarmnode.protocol.errors import ServerBusy

BLOCKS = 2
LONGEST = 420
SLIDING = {"sliding_window": 70, "sliding_blocks": (True, False)}
SEED = seed_of("test")
STEMS = (0, 64, 130, 256)
"""How much of the first text the others begin with."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


class Shop:
    """A span with a pool, texts that begin alike, and what each of them gives alone."""

    def __init__(self, budget_tiles=1 << 12, kv=None, **config):
        self.config = make_config(num_blocks=BLOCKS, **config)
        self.span = load_span(RandomCheckpoint(self.config), 0, BLOCKS, dtype=torch.float32)
        self.pool = KVPool(0, self.config, 0, BLOCKS, kv or torch.float32)
        self.pool.budget_bytes = budget_tiles * self.pool.page_bytes
        rng = torch.Generator().manual_seed(5)
        first = torch.randn(LONGEST, self.config.hidden_size, generator=rng)
        self.texts = [first]
        for stem in STEMS:
            rest = torch.randn(LONGEST - stem, self.config.hidden_size, generator=rng)
            self.texts.append(torch.cat((first[:stem], rest)))
        alone = KVPool(1 << 28, self.config, 0, BLOCKS, self.pool.dtype)
        self.expected = [self.span.run(text, [Piece(alone.open_lane(), 0, LONGEST)]) for text in self.texts]
        self.lanes = []
        self.fed = self.computed = 0

    def open(self, max_length=LONGEST):
        lane = self.pool.open_lane(max_length=max_length)
        self.lanes.append(lane)
        return lane

    def free(self, lane):
        self.lanes.remove(lane)
        lane.free()

    def feed(self, lane, text, count, seed=SEED):
        """What the compute thread does with a job; the rows must be those of the text alone."""
        position, cache = lane.length, self.pool.prefixes
        rows = self.texts[text][position : position + count]
        start = cache.begin(lane, seed, count, rows.numpy().tobytes())
        parts = start.rows
        if start.count < count:
            out = self.span.run(rows[start.count :], [Piece(lane, position + start.count, count - start.count)])
            cache.end(lane, start, out)
            parts = [*parts, out]
        assert torch.equal(torch.cat(parts), self.expected[text][position : position + count]), (text, position, count)
        self.fed += count
        self.computed += count - start.count
        return start.count

    def check(self):
        """Every page is in the books once, whoever holds it, and nobody is promised what is not there."""
        pool, tiles = self.pool, self.pool.prefixes._tiles
        pages = {id(page): page for tile in tiles.values() for page in tile.pages}
        assert all(page.cached for page in pages.values())
        assert len(pages) == len(tiles) * BLOCKS
        pages |= {id(page): page for lane in self.lanes for block in lane.blocks for page in block.pages}
        held = sum(bool(page.holders) for page in pages.values()) * pool.page_bytes
        idle = sum(not page.holders for page in pages.values()) * pool.page_bytes
        assert pool.used_bytes == held
        assert all(tile.rows.untyped_storage().nbytes() == tile.rows.nbytes for tile in tiles.values())
        assert pool.cached_bytes == idle + sum(tile.rows.nbytes for tile in tiles.values())
        assert pool.used_bytes + pool.promised_bytes <= pool.budget_bytes
        assert pool.used_bytes + pool.cached_bytes <= pool.budget_bytes
        assert pool.cached_bytes <= pool.budget_bytes * prefixes.SHARE
        for lane in self.lanes:
            paid = sum(page.holders[0] is lane for block in lane.blocks for page in block.pages)
            assert lane._promise + paid * pool.page_bytes == pool.need(lane.max_length, 0, BLOCKS)
            kept = [name in tiles for name in lane.known]
            assert kept == sorted(kept, reverse=True)  # none without those before it
            assert len(lane.known) * TILE <= lane.length


def chunks(rng):
    """Mostly as clients send a prompt, sometimes not."""
    return rng.choice((128, 128, 128, 64, 1, 1, 30, 200))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("config", "kv", "tiles"),
    [({}, None, 400), (SLIDING, None, 400), (SLIDING, None, 90), ({}, torch.int8, 200), (SLIDING, torch.int8, 90)],
    ids=["full", "sliding", "tight", "8-bits", "8-bits-tight"],
)
def test_random_sessions_give_the_same_bits_and_exact_books(seed, config, kv, tiles):
    rng, shop = random.Random(seed), Shop(tiles, kv, **config)
    texts = {}
    for _ in range(250):
        lane = rng.choice(shop.lanes) if shop.lanes else None
        match rng.randrange(10):
            case 0 | 1:
                try:
                    texts[shop.open(rng.choice((100, 300, LONGEST)))] = rng.randrange(len(shop.texts))
                except ServerBusy:
                    shop.free(rng.choice(shop.lanes))
            case 2 if lane and rng.random() < 0.5:
                shop.free(lane)
            case 3 if lane:
                try:
                    lane.truncate(rng.choice((lane.length, lane.length * 2 // 3, lane.length // TILE * TILE)))
                except NeedReplay as exc:
                    lane.truncate(exc.position)
            case 4 if lane:
                others = [each for each in shop.lanes if each.max_length == lane.max_length]
                other = rng.choice(others)
                other.copy(lane)
                texts[other] = texts[lane]
            case 5 if rng.random() < 0.1:
                shop.pool.prefixes.clear()
            case _ if lane:
                count = min(chunks(rng), lane.max_length - lane.length)
                if count:
                    shop.feed(lane, texts[lane], count)
        shop.check()
    assert shop.pool.prefixes.reused_rows == shop.fed - shop.computed > 0
    for lane in list(shop.lanes):
        shop.free(lane)
    shop.check()
    assert (shop.pool.used_bytes, shop.pool.promised_bytes, shop.pool.lanes) == (0, 0, 0)
    shop.pool.prefixes.clear()
    assert shop.pool.cached_bytes == 0


def test_a_common_prompt_is_computed_once_and_held_once():
    shop = Shop()
    for number in range(5):
        lane = shop.open()
        assert shop.feed(lane, 0, 128) + shop.feed(lane, 0, 128) + shop.feed(lane, 0, 34) == (256 if number else 0)
    assert shop.computed == 290 + 4 * 34
    assert shop.pool.used_bytes == (4 + 5) * BLOCKS * shop.pool.page_bytes
    shop.check()


def test_the_prompt_of_a_session_that_has_gone_is_still_there():
    shop = Shop(**SLIDING)
    lane = shop.open()
    shop.feed(lane, 0, 256)
    shop.free(lane)
    assert shop.pool.used_bytes == 0
    assert shop.feed(shop.open(), 0, 256) == 256
    shop.check()


def test_sharing_ends_where_texts_differ():
    shop = Shop()
    shop.feed(shop.open(), 0, 384)
    assert [shop.feed(shop.open(), text, 384) for text in range(1, 5)] == [stem // TILE * TILE for stem in STEMS]
    lane = shop.open()
    assert shop.feed(lane, 2, 200, seed_of("other cuts")) == 0


def test_a_rewound_session_finds_its_tiles_again():
    shop = Shop()
    lane = shop.open()
    shop.feed(lane, 0, 256)
    lane.truncate(100)
    assert shop.feed(lane, 0, 28) == 0
    assert shop.feed(lane, 0, 128) == 0  # what came in pieces is not followed
    lane.truncate(64)
    assert shop.feed(lane, 0, 192) == 192
    assert shop.feed(lane, 0, 64) == 0


def test_a_fork_is_followed_like_its_origin():
    shop = Shop()
    lane, fork = shop.open(), shop.open()
    shop.feed(lane, 0, 192)
    lane.truncate(128)
    fork.copy(lane)
    assert shop.feed(fork, 0, 128) == 64


def test_whoever_writes_into_a_kept_page_takes_a_copy():
    shop = Shop()
    lane = shop.open()
    shop.feed(lane, 1, 128)
    lane.truncate(100)
    before = shop.pool.used_bytes
    poison = torch.full((3, shop.config.hidden_size), float("nan"))
    shop.span.run(poison, [Piece(lane, 100, 3)])
    assert shop.pool.used_bytes == before
    assert shop.feed(shop.open(), 1, 192) == 128
    shop.check()


@pytest.mark.parametrize("how", ["evicted", "freed", "copied"])
def test_what_was_cut_leaves_no_trace_when_the_other_holder_goes(how):
    """A page is shared when it is cut and no longer when it is written: what stood behind the cut must not show."""
    shop = Shop()
    lane = shop.open()
    shop.feed(lane, 0, 64)
    shop.feed(lane, 0, 36)
    poison = torch.full((10, shop.config.hidden_size), float("nan"))
    shop.span.run(poison, [Piece(lane, 100, 10)])
    other = shop.open()
    if how == "evicted":
        for block in lane.blocks:
            block.pages[-1].cached = True
    else:
        other.copy(lane)
    lane.truncate(100)
    if how == "evicted":
        for block in lane.blocks:
            block.pages[-1].cached = False
    else:
        last = shop.open()
        if how == "copied":
            last.copy(lane)
            shop.free(lane)
            lane = last
        shop.free(other)
    shop.feed(lane, 0, 1)
    shop.feed(lane, 0, 90)


def test_what_is_promised_takes_the_room_of_what_is_kept():
    shop = Shop(budget_tiles=12 * BLOCKS)
    first = shop.open()
    shop.feed(first, 0, 256)
    shop.free(first)
    kept = len(shop.pool.prefixes)
    assert kept
    lane = shop.open(LONGEST)
    assert shop.pool.free_bytes == 5 * BLOCKS * shop.pool.page_bytes  # as if nothing were kept
    other = shop.pool.open_lane(max_length=5 * TILE)
    assert shop.feed(lane, 1, 64) == 0
    other.reserve(5 * TILE)
    shop.lanes.append(other)
    shop.check()
    while lane.length < LONGEST:
        shop.feed(lane, 1, min(64, LONGEST - lane.length))
        shop.check()
    assert shop.pool.used_bytes == shop.pool.budget_bytes
    assert len(shop.pool.prefixes) == 0


def test_tiles_not_used_for_longest_go_first_and_none_before_its_followers(monkeypatch):
    shop = Shop()
    for text in (0, 2, 4):  # 2 shares one tile with 0, 4 four
        lane = shop.open()
        shop.feed(lane, text, 384)
        shop.free(lane)
    lane = shop.open()
    shop.feed(lane, 0, 256)
    shop.free(lane)
    left = []
    while len(shop.pool.prefixes):
        monkeypatch.setattr(prefixes, "MAX_TILES", len(shop.pool.prefixes) - 1)
        shop.pool.prefixes.fit()
        shop.check()
        found = []
        for text in (0, 2, 4):
            lane = shop.pool.open_lane(max_length=384)
            start = shop.pool.prefixes.begin(lane, SEED, 384, shop.texts[text][:384].numpy().tobytes())
            found.append(start.count // TILE)
            lane.free()
        left.append(found)
        for text in (4, 2, 0):  # restore the order that looking has changed
            lane = shop.pool.open_lane(max_length=384)
            shop.pool.prefixes.begin(lane, SEED, 384, shop.texts[text][:384].numpy().tobytes())
            lane.free()
    assert left[-1] == [0, 0, 0]
    assert all(later[i] <= sooner[i] for sooner, later in pairwise(left) for i in range(3))
    assert left[-2] == [1, 1, 1]


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(prefixes, "MAX_TILES", 3)
    shop = Shop()
    lane = shop.open()
    shop.feed(lane, 0, 384)
    assert len(shop.pool.prefixes) == 3
    assert shop.feed(shop.open(), 0, 384) == 3 * TILE
    monkeypatch.undo()
    small = Shop(budget_tiles=20)
    for text in (0, 1, 2):
        lane = small.open()
        small.feed(lane, text, 384)
        small.free(lane)
        small.check()
    assert 0 < small.pool.cached_bytes <= small.pool.budget_bytes * prefixes.SHARE


def test_lanes_without_a_promise_or_seed_are_not_followed():
    shop = Shop()
    for lane, seed in ((shop.pool.open_lane(), SEED), (shop.open(), b"")):
        shop.feed(lane, 0, 128, seed)
        assert (len(shop.pool.prefixes), lane.known) == (0, [])


def test_names_depend_on_every_byte_and_on_all_before():
    payload = bytes(range(256)) * 64  # 128 rows of 128 bytes
    first, second = prefixes._names(SEED, 128, payload)
    assert list(prefixes._names(SEED, 127, payload[: 127 * 128])) == [first]
    assert list(prefixes._names(first, 64, payload[8192:])) == [second]
    changed = bytearray(payload)
    changed[8191] ^= 1
    other = list(prefixes._names(SEED, 128, bytes(changed)))
    assert first != other[0]
    assert second != other[1]
    assert list(prefixes._names(seed_of("another"), 64, payload[:8192])) != [first]
