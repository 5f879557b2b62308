"""A conversation computes only what is new, and says what separate generations would."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from helpers.swarms import TinySwarm, collect, ids_of, make_model
from swarmnode.node.client import conversation
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.sampling import SamplingParams

THIRDS = ((0, 1), (1, 2), (2, 3))
TURN = [3 + (7 * n + n * n // 5) % 256 for n in range(90)]
DRAWN = SamplingParams(temperature=4.0, top_k=40, seed=11)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "gemma3")}


@pytest.fixture(params=["llama", "gemma3"])
async def swarm(request, checkpoints, tmp_path):
    async with TinySwarm(tmp_path, checkpoints[request.param], repair_timeout_s=10) as swarm:
        await swarm.serve_all(*THIRDS)
        yield swarm
        await swarm.settled()


async def write(source, prompt, count=20, **options) -> list[int]:
    return ids_of(await collect(source.generate(prompt, max_new_tokens=count, wire="fp32", **options)))


@pytest.mark.parametrize("sampling", [None, DRAWN])
@pytest.mark.parametrize("local_ends", [True, False])
async def test_turns_equal_generations_from_scratch(local_ends, sampling, swarm):
    model = await swarm.model(local_ends=local_ends)
    prompt: list[int] = []
    async with model.conversation() as talk:
        for turn in range(4):
            prompt = [*prompt, *TURN[turn * 20 : turn * 20 + 20]]
            before = len(prompt) - 21
            answer = await write(talk, prompt, sampling=sampling)
            assert model.last_stats.cached_tokens == (before if turn else 0)
            assert model.last_stats.prompt_tokens == len(prompt)
            assert answer == await write(model, prompt, sampling=sampling)
            prompt += answer
        edited = [*prompt[:30], 7, 8, 9]
        answer = await write(talk, edited, sampling=sampling)
        assert model.last_stats.cached_tokens == 30
        assert answer == await write(model, edited, sampling=sampling)
        other = TURN[::-1]
        answer = await write(talk, other, sampling=sampling)
        assert model.last_stats.cached_tokens == 0
        assert answer == await write(model, other, sampling=sampling)
        again = await write(talk, other, sampling=sampling)
        assert model.last_stats.cached_tokens == len(other) - 1
        assert again == answer


async def test_a_server_dies_between_turns(swarm):
    await swarm.serve_all(*THIRDS)
    model = await swarm.model()
    async with model.conversation() as talk:
        first = await write(talk, TURN)
        prompt = [*TURN, *first, 5, 6]
        await swarm.kill(swarm.serving(1))
        assert await write(talk, prompt) == await write(model, prompt)


async def test_what_does_not_fit_the_session_opens_another(swarm, monkeypatch):
    monkeypatch.setattr(conversation, "LEAST_LENGTH", 1)
    model = await swarm.model(local_ends=False)
    async with model.conversation(max_length=130) as talk:
        await write(talk, TURN)
        for prompt, sampling in (([*TURN, *TURN], None), (TURN, DRAWN), ([*TURN, 5], DRAWN)):
            expected = await write(model, prompt, sampling=sampling)
            assert await write(talk, prompt, sampling=sampling) == expected
            assert model.last_stats.cached_tokens == (len(TURN) if prompt[-1] == 5 else 0)
        assert sum(len(node._server.sessions) for node in swarm.servers) == 3


async def test_breaking_off_frees_every_server_and_the_next_turn_works(swarm):
    model = await swarm.model()
    async with model.conversation() as talk:
        expected = await write(talk, TURN)
        async with contextlib.aclosing(talk.generate(TURN, max_new_tokens=50, wire="fp32")) as pieces:
            async for _ in pieces:
                break
        await swarm.settled()
        task = asyncio.create_task(write(talk, TURN, 200))
        for _ in range(50):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await swarm.settled()
        assert await write(talk, TURN) == expected


async def test_silence_frees_every_server(swarm, monkeypatch):
    monkeypatch.setattr(conversation, "KEEP_S", 0.0)
    model = await swarm.model()
    async with model.conversation() as talk:
        expected = await write(talk, TURN)
        await swarm.settled()
        assert await write(talk, TURN) == expected
        assert model.last_stats.cached_tokens == 0


async def test_one_generation_at_a_time(swarm):
    model = await swarm.model()
    async with model.conversation() as talk:
        async with contextlib.aclosing(talk.generate(TURN, max_new_tokens=5)) as pieces:
            await anext(pieces)
            with pytest.raises(ConfigError, match="already"):
                await write(talk, TURN)
        with pytest.raises(ConfigError, match="one sequence"):
            await write(talk, TURN, n=2)
    with pytest.raises(ConfigError, match="positions"):
        model.conversation(max_length=10_000)


async def test_a_swarm_without_ample_room_is_used_all_the_same(checkpoints, tmp_path):
    """Two pages of 64 positions in each block; twice what is needed would be more."""
    room = 3 * 2 * 2 * 64 * 2 * 16 * 4
    async with TinySwarm(tmp_path, checkpoints["llama"]) as swarm:
        await swarm.serve(0, 3, kv_bytes=room)
        model = await swarm.model()
        async with model.conversation() as talk:
            assert len(await write(talk, TURN)) == 20
        await swarm.settled()
