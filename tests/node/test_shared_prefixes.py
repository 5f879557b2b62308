"""A prompt that many sessions begin with goes through a span once, and nobody can tell from the results."""

import random

import pytest
import torch
from helpers.workers import Desk, payload
from swarmnode.kernels.kvcache import KVPool
from swarmnode.protocol.errors import SwarmError
from swarmnode.protocol.messages import Output, Want
from swarmnode.protocol.tensors import Codec

STEM = [(7 * n + n * n // 5) % 64 for n in range(200)]
SLIDING = {"sliding_window": 40, "sliding_blocks": (True, False, True)}


def text(number):
    """A system prompt of 200 tokens and a question."""
    return [*STEM, *((number * 31 + n * 5) % 64 for n in range(40))]


@pytest.fixture(params=[{}, SLIDING], ids=["full", "sliding"])
async def desk(request):
    async with Desk(**request.param) as desk:
        yield desk


async def prefill(desk, seat, ids, lane=0):
    """In chunks of 128, as clients do; the rows computed on the way."""
    before = desk.computed
    out = b"".join([await desk.rows(seat, ids[at : at + 128], at, lane) for at in range(0, len(ids), 128)])
    return out, desk.computed - before


async def alone(desk, *texts):
    """What a server that shares nothing gives."""
    window = SLIDING if desk.config.sliding_window else {}
    async with Desk(share_prefixes="none", **window) as plain:
        return [(await prefill(plain, plain.open(), ids))[0] for ids in texts]


async def test_a_second_session_computes_only_what_is_its_own(desk):
    expected = await alone(desk, *(text(number) for number in range(3)))
    seats = [desk.open() for _ in range(3)]
    results = [await prefill(desk, seat, text(number)) for number, seat in enumerate(seats)]
    assert [out for out, _ in results] == expected
    assert [count for _, count in results] == [240, 48, 48]
    held = {id(page) for seat in seats for block in seat.caches[0].blocks for page in block.pages}
    assert desk.pool.used_bytes == len(held) * desk.pool.page_bytes


async def test_decoding_after_a_shared_prompt_equals_decoding_alone(desk):
    [expected] = await alone(desk, [*STEM[:192], 1, 2, 3])
    for _ in range(2):
        seat = desk.open()
        await prefill(desk, seat, STEM[:192])
        parts = [await desk.rows(seat, [token], 192 + n) for n, token in enumerate((1, 2, 3))]
        assert b"".join(parts) == expected[-3 * 512 :]


@pytest.mark.parametrize("want", Want)
@pytest.mark.parametrize("output", Output)
async def test_a_tail_returns_what_is_wanted_though_nothing_is_computed(want, output, desk):
    outcomes = []
    for _ in range(2):
        before, seat = desk.computed, desk.open(output=int(output))
        outcome = await desk.tokens(seat, STEM[:128], 0, want=want)
        outcomes.append((payload(outcome), outcome.token, outcome.logprob))
    assert desk.computed == before
    assert outcomes[0] == outcomes[1]
    assert bool(outcomes[0][0] or outcomes[0][1] >= 0) == (want is not Want.NOTHING)


async def test_hops_without_token_ids_share_by_what_comes_in():
    """Three hops, each knowing rows only by their bytes: the second session is computed at none of them."""
    async with Desk() as desk:
        # What a hop sends in does not decide about what it computes: the first hop's tiles serve all three.
        for codec, cuts, fresh in ((Codec.INT8S, (1, 2), 3), (Codec.BF16, (1, 2), 2), (Codec.FP32, (), 2)):
            results = []
            for _ in range(2):
                before = desk.computed
                hops = [
                    desk.open(start=n, end=n + 1, codec=codec, cuts=cuts, next=b"" if n == 2 else b"x")
                    for n in range(3)
                ]
                rows = await desk.rows(hops[0], STEM[:192], 0)
                for hop in hops[1:]:
                    rows = payload(await desk.feed(hop, rows, 192, 0))
                results.append((rows, desk.computed - before))
            assert results[0][0] == results[1][0]
            assert (results[0][1], results[1][1]) == (fresh * 192, 0)


async def test_what_decides_about_results_keeps_sessions_apart(desk):
    """Each of these computes other rows of the same ids, so none may find another's."""
    ways = [
        {},
        {"codec": Codec.INT8S, "cuts": (1,)},
        {"codec": Codec.BF16, "cuts": (1,)},
        {"codec": Codec.INT8S, "cuts": (2,)},
        {"codec": Codec.INT8S, "cuts": (0, 2)},
        {"end": 2},
    ]
    rows = []
    for way in ways:
        before = desk.computed
        rows.append(await desk.rows(desk.open(**way), STEM[:128], 0))
        assert desk.computed == before + 128, way
    assert len(set(rows)) == len(ways)
    before = desk.computed
    await desk.rows(desk.open(codec=Codec.INT8S, cuts=(3, 9)), STEM[:128], 0)  # cuts elsewhere decide nothing here
    assert desk.computed == before


@pytest.mark.parametrize(("share", "found"), [("all", [0, 0, 0]), ("user", [0, 128, 0]), ("none", [128, 128, 128])])
async def test_who_shares_with_whom(share, found):
    async with Desk(share_prefixes=share) as desk:
        counts = []
        for user in (b"a", b"a", b"b", b"a"):
            seat = desk.open(user=user)
            counts.append((await prefill(desk, seat, STEM[:128]))[1])
            desk.worker.release(seat)
        assert counts == [128, *found]
        await desk.settle()
        assert bool(desk.pool.cached_bytes) == (share != "none")


async def test_a_replay_from_the_start_is_found(desk):
    seat = desk.open()
    out, _ = await prefill(desk, seat, text(1))
    assert await prefill(desk, seat, text(1)) == (out, 48)


async def test_bad_rows_are_refused_beside_known_ones(desk):
    await prefill(desk, desk.open(), STEM[:128])
    seat = desk.open()
    outcome = await desk.tokens(seat, [*STEM[:128], 10_000], 0)
    assert isinstance(outcome.error, SwarmError)
    assert "10000" in str(outcome.error)
    assert (await prefill(desk, seat, STEM[:128]))[1] == 0
    other = desk.open(start=1)
    poison = torch.full((64, desk.config.hidden_size), float("nan")).numpy().tobytes()
    for _ in range(2):
        assert (await desk.feed(other, poison, 64, 0)).error is not None


async def test_kept_prompts_never_cost_a_session_its_place():
    """Promises are given as if nothing were kept, and kept even when all of them are used to the last byte."""
    async with Desk() as desk:
        desk.pool.budget_bytes = desk.pool.need(256, 0, 3) * 4
        for number in range(6):
            seat = desk.open(max_length=256)
            await prefill(desk, seat, text(number)[number:])
            desk.worker.release(seat)
        await desk.settle()
        assert desk.pool.cached_bytes > 0
        seats = [desk.open(max_length=256) for _ in range(4)]
        for number, seat in enumerate(seats):
            await desk.rows(seat, [number] * 256, 0)
            assert desk.pool.used_bytes + desk.pool.cached_bytes <= desk.pool.budget_bytes
        assert (desk.pool.used_bytes, desk.pool.cached_bytes) == (desk.pool.budget_bytes, 0)


@pytest.mark.parametrize("seed", range(3))
async def test_random_sessions_equal_those_of_a_server_that_shares_nothing(seed, desk):
    """Joins, leaves, rewinds, forks and lengths at random; a small budget makes room scarce."""
    rng = random.Random(seed)
    desk.pool.budget_bytes = desk.pool.need(320, 0, 3) * 13
    texts = [[*text(n), *text(n + 1)][:320] for n in range(4)]
    expected = await alone(desk, *texts)
    sessions, fed = [], 0
    for _ in range(120):
        if len(sessions) < 6:
            number = rng.randrange(4)
            sessions.append([desk.open(lanes=2, max_length=320), number, [0, 0]])
        session = rng.choice(sessions)
        seat, number, lengths = session
        lane = rng.randrange(2)
        match rng.randrange(8):
            case 0:
                desk.worker.release(seat)
                sessions.remove(session)
                await desk.settle()
                continue
            case 1:
                lengths[lane] = rng.randint(max(0, lengths[lane] - 60), lengths[lane])
            case 2:
                lengths[lane] = 0
            case 3:
                desk.worker.fork(seat, lane, 1 - lane)
                lengths[1 - lane] = lengths[lane]
        at = lengths[lane]
        count = min(rng.choice((1, 1, 20, 128, 128, 128)), 320 - at)
        if count:
            outcome = await desk.tokens(seat, texts[number][at : at + count], at, lane)
            if outcome.error is not None:  # a window has dropped what a rewind after a long chunk needs
                assert "replay" in str(outcome.error)
                lengths[lane] = 0
                continue
            assert outcome.payload == expected[number][512 * at : 512 * (at + count)]
            lengths[lane] += count
            fed += count
        assert desk.pool.used_bytes + desk.pool.promised_bytes <= desk.pool.budget_bytes
        assert desk.pool.used_bytes + desk.pool.cached_bytes <= desk.pool.budget_bytes
    assert desk.pool.prefixes.reused_rows > fed / 4
    assert desk.computed + desk.pool.prefixes.reused_rows >= fed
    for seat, *_ in sessions:
        desk.worker.release(seat)
    await desk.settle()
    assert (desk.pool.used_bytes, desk.pool.promised_bytes, desk.pool.lanes) == (0, 0, 0)


def test_the_cache_is_a_pools_own():
    pools = [KVPool(1 << 20, Desk().config, 0, 3, torch.float32) for _ in range(2)]
    assert pools[0].prefixes is not pools[1].prefixes
