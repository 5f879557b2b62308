"""Several sequences in one session: prompts of any length, several answers, beams; each equal to its solo run."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch
from helpers.swarms import TinySwarm, collect, ids_of, make_model
from helpers.tiny_models import load_oracle
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.messages import MAX_LANES
from swarmnode.protocol.sampling import SamplingParams

THIRDS = ((0, 1), (1, 2), (2, 3))
LONG = [3 + (7 * n + n * n // 5) % 256 for n in range(300)]
PROMPTS = [LONG[:5], LONG[:1], LONG[7:150], LONG, [3 + n % 7 for n in range(60)]]
DRAWN = SamplingParams(temperature=8.0, top_k=40, seed=11)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "gemma3")}


@pytest.fixture(params=["llama", "gemma3"])
async def swarm(request, checkpoints, tmp_path):
    async with TinySwarm(tmp_path, checkpoints[request.param], repair_timeout_s=10) as swarm:
        await swarm.serve_all(*THIRDS)
        yield swarm
        await swarm.settled()


async def solo(model, prompt, count, **options) -> list[int]:
    return ids_of(await collect(model.generate(prompt, max_new_tokens=count, wire="fp32", **options)))


async def by_sequence(pieces, count: int) -> list[list[int]]:
    made = [[] for _ in range(count)]
    async for piece in pieces:
        made[piece.index].append(piece.token_id)
    return made


@pytest.mark.parametrize("local_ends", [True, False])
async def test_several_prompts_equal_their_solo_runs(local_ends, swarm):
    model = await swarm.model(local_ends=local_ends)
    for sampling in (None, DRAWN):
        expected = [await solo(model, prompt, 25, sampling=sampling) for prompt in PROMPTS]
        pieces = model.generate_many(PROMPTS, max_new_tokens=25, wire="fp32", sampling=sampling)
        assert await by_sequence(pieces, len(PROMPTS)) == expected
        assert model.last_stats.new_tokens == 25 * len(PROMPTS)
        assert model.last_stats.prompt_tokens == sum(map(len, PROMPTS))


@pytest.mark.parametrize("local_ends", [True, False])
async def test_answers_to_one_prompt_are_drawn_apart_and_the_first_as_alone(local_ends, swarm):
    model = await swarm.model(local_ends=local_ends)
    expected = [
        await solo(model, LONG, 20, sampling=SamplingParams(temperature=8.0, top_k=40, seed=11 + number))
        for number in range(4)
    ]
    assert len({tuple(answer) for answer in expected}) == 4
    pieces = model.generate(LONG, n=4, max_new_tokens=20, wire="fp32", sampling=DRAWN)
    assert await by_sequence(pieces, 4) == expected
    both = model.generate_many([LONG, PROMPTS[2]], n=2, max_new_tokens=20, wire="fp32", sampling=DRAWN)
    made = await by_sequence(both, 4)
    assert made[:2] == expected[:2]
    assert made[2] == await solo(model, PROMPTS[2], 20, sampling=DRAWN)
    greedy = await by_sequence(model.generate(LONG, n=3, max_new_tokens=9, wire="fp32"), 3)
    assert greedy == [await solo(model, LONG, 9)] * 3


@pytest.mark.parametrize("local_ends", [True, False])
@pytest.mark.parametrize("beams", [1, 2, 5])
async def test_beams_equal_those_of_transformers(beams, local_ends, swarm):
    model = await swarm.model(local_ends=local_ends)
    oracle = load_oracle(swarm.model_path)
    for prompt in (PROMPTS[0], LONG):
        ends = [(await solo(model, prompt, 9))[-1], 77]
        expected = oracle.generate(
            torch.tensor([prompt]),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=1,
        )[:, len(prompt) :].tolist()
        found = await model.beam_search(
            prompt, beams=beams, count=beams, max_new_tokens=12, stop_token_ids=ends, wire="fp32"
        )
        padded = [[*one.token_ids, *[1] * (len(expected[0]) - len(one.token_ids))] for one in found]
        assert padded == expected
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


async def test_beams_survive_a_dead_server_and_free_all(swarm):
    await swarm.serve_all(*THIRDS)
    model = await swarm.model()
    expected = await model.beam_search(LONG, beams=3, count=3, max_new_tokens=25, wire="fp32")
    model.last_stats = None
    search = asyncio.create_task(model.beam_search(LONG, beams=3, count=3, max_new_tokens=25, wire="fp32"))
    while model.last_stats is None or not 8 <= model.last_stats.new_tokens < 25:  # noqa: ASYNC110 - every turn of the loop counts
        await asyncio.sleep(0)
    await swarm.kill(swarm.serving(1))
    assert await search == expected
    task = asyncio.create_task(model.beam_search(LONG, beams=4, max_new_tokens=100))
    for _ in range(200):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await swarm.settled()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"beams": 0}, "0 beams"),
        ({"beams": 65}, "65 beams"),
        ({"beams": 2, "count": 3}, "3 sequences of 2 beams"),
        ({"length_penalty": 1e9}, "length_penalty"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
    ],
)
async def test_beams_that_cannot_be_are_named(options, problem, swarm):
    model = await swarm.model()
    with pytest.raises(ConfigError, match=problem):
        await model.beam_search(PROMPTS[0], **{"max_new_tokens": 9, **options})


@pytest.mark.parametrize("block", [0, 1, 2])
async def test_many_sequences_survive_a_dead_server(block, swarm):
    await swarm.serve_all(*THIRDS)
    model = await swarm.model()
    expected = [await solo(model, prompt, 30) for prompt in PROMPTS]
    made = [[] for _ in PROMPTS]
    async for piece in model.generate_many(PROMPTS, max_new_tokens=30, wire="fp32"):
        made[piece.index].append(piece.token_id)
        if sum(map(len, made)) == 40:
            await swarm.kill(swarm.serving(block))
    assert made == expected
    assert model.last_stats.repairs == 1


@pytest.mark.parametrize("moment", [1, 30, 300])
async def test_cancelling_many_frees_every_server(moment, swarm):
    model = await swarm.model()
    task = asyncio.create_task(collect(model.generate_many(PROMPTS, n=2, max_new_tokens=100)))
    for _ in range(moment):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await swarm.settled()
    async with contextlib.aclosing(model.generate(LONG, n=3, max_new_tokens=100)) as pieces:
        async for piece in pieces:
            if piece.index == 2:
                break
    await swarm.settled()


@pytest.mark.parametrize(
    ("prompts", "options", "problem"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "empty"),
        ([[1]], {"n": 0}, "1 to 256 sequences"),
        ([[1], [2]], {"n": MAX_LANES // 2 + 1}, "1 to 256 sequences"),
        ([[1], [9999]], {}, "vocabulary"),
        ([[1], [2] * 400], {"max_new_tokens": 200}, "512 positions"),
    ],
)
async def test_what_cannot_be_written_at_once_is_named(prompts, options, problem, swarm):
    model = await swarm.model()
    with pytest.raises(ConfigError, match=problem):
        await collect(model.generate_many(prompts, **options))
