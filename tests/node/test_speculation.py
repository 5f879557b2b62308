"""Speculation changes how many tokens a traversal brings, never which: tiny models, whole nodes, failures."""

from __future__ import annotations

import pytest
from helpers.swarms import TinySwarm, collect, ids_of, make_model, text_of
from swarmnode.kernels import speculative
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.sampling import SamplingParams

THIRDS = ((0, 1), (1, 2), (2, 3))
LOOP = [3 + n % 7 for n in range(60)]
"""Repeats itself, so that there is something to guess; a tiny model soon does as well."""
WILD = [3 + (7 * n + n * n // 5) % 256 for n in range(150)]
SAMPLED = SamplingParams(temperature=0.3, top_k=20, seed=11)
FREE = SamplingParams(temperature=0.9, top_p=0.95, seed=5)
PENALIZED = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "gemma3")}


@pytest.fixture
def eager(monkeypatch):
    """Always guess as much as there is room for, whatever it costs: what must not matter happens all the time."""
    monkeypatch.setattr(speculative.Pace, "choose", lambda self, kind, room, draft_s=0.0: (room, 2.0))


async def write(model, prompt, count, **options) -> list[int]:
    options = {"wire": "fp32", **options}
    return ids_of(await collect(model.generate(prompt, max_new_tokens=count, **options)))


@pytest.mark.parametrize("local_ends", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
async def test_the_text_is_the_same_without(family, local_ends, checkpoints, tmp_path, eager):
    """Of windowed layers too: Gemma's window is 24, a wrong guess takes back up to 31 rows."""
    async with TinySwarm(tmp_path, checkpoints[family]) as swarm:
        await swarm.serve_all(*THIRDS)
        model = await swarm.model(local_ends=local_ends)
        accepted = 0
        for prompt in (LOOP, WILD):
            for sampling in (None, SAMPLED, FREE, PENALIZED):
                expected = await write(model, prompt, 70, sampling=sampling, speculate="off")
                assert model.last_stats.traversals == 70
                assert model.last_stats.drafted == 0
                assert await write(model, prompt, 70, sampling=sampling) == expected
                stats = model.last_stats
                assert stats.traversals + stats.accepted == stats.new_tokens == 70
                assert stats.repairs == 0
                accepted += stats.accepted
        assert accepted > 5
        await swarm.settled()


@pytest.mark.parametrize("block", [0, 1, 2])
async def test_the_text_is_the_same_when_servers_die(block, checkpoints, tmp_path, eager):
    async with TinySwarm(tmp_path, checkpoints["gemma3"], repair_timeout_s=10) as swarm:
        await swarm.serve_all(*THIRDS, *THIRDS)
        model = await swarm.model()
        for sampling in (None, SAMPLED):
            expected = await write(model, WILD, 60, sampling=sampling, speculate="off")
            tokens = []
            async for piece in model.generate(WILD, max_new_tokens=60, sampling=sampling, wire="fp32"):
                tokens.append(piece.token_id)
                if len(tokens) == 20:
                    await swarm.kill(swarm.serving(block))
                    await swarm.serve(block, block + 1)
            assert tokens == expected
            assert model.last_stats.repairs == 1
            assert model.last_stats.drafted > 0
        await swarm.settled()


async def test_any_length_is_exact(checkpoints, tmp_path, eager):
    async with TinySwarm(tmp_path, checkpoints["llama"]) as swarm:
        await swarm.serve_all((0, 3))
        model = await swarm.model()
        whole = await write(model, LOOP, 40, speculate="off")
        for count in (1, 2, 3, 17, 31, 33, 39):
            pieces = await collect(model.generate(LOOP, max_new_tokens=count, wire="fp32"))
            assert ids_of(pieces) == whole[:count]
            assert [piece.finish_reason for piece in pieces] == [None] * (count - 1) + ["length"]
        room = model.config.max_positions - len(LOOP)
        assert len(await write(model, LOOP, room)) == room
        await swarm.settled()


async def test_a_stop_string_within_confirmed_guesses(checkpoints, tmp_path, eager):
    async with TinySwarm(tmp_path, checkpoints["llama"]) as swarm:
        await swarm.serve_all((0, 3))
        model = await swarm.model()
        whole = text_of(await collect(model.generate(LOOP, max_new_tokens=60, wire="fp32", speculate="off")))
        for first in range(20, 50, 3):
            stop = whole[first : first + 3]
            pieces = await collect(model.generate(LOOP, max_new_tokens=60, wire="fp32", stop=[stop]))
            assert text_of(pieces) == whole[: whole.index(stop)]
            assert pieces[-1].finish_reason == "stop"
        await swarm.settled()


async def test_an_end_token_within_confirmed_guesses(checkpoints, tmp_path, eager):
    async with TinySwarm(tmp_path, checkpoints["gemma3"]) as swarm:
        await swarm.serve_all((0, 3))
        model = await swarm.model()
        whole = await write(model, LOOP, 60)
        ending = make_model(tmp_path / "ending", "gemma3", eos_token_id=whole[30])
        async with TinySwarm(tmp_path / "other", ending) as other:
            await other.serve_all((0, 3))
            model = await other.model()
            assert await write(model, LOOP, 60) == whole[: whole.index(whole[30]) + 1]
            await other.settled()


async def test_speculation_speaks_up_when_it_pays(checkpoints, tmp_path, monkeypatch):
    took = speculative.Pace.took
    monkeypatch.setattr(speculative.Pace, "took", lambda self, rows, seconds: took(self, rows, 1.0))
    async with TinySwarm(tmp_path, checkpoints["gemma3"]) as swarm:
        await swarm.serve_all((0, 3))
        model = await swarm.model()
        await write(model, LOOP, 100)
        assert model.last_stats.tokens_per_traversal > 2
        with pytest.raises(ConfigError, match="auto, ngram, off"):
            await write(model, LOOP, 3, speculate="always")
        await swarm.settled()


async def test_a_draft_model_guesses_with_a_cache_of_its_own(checkpoints, tmp_path, eager):
    """The model itself is the best one: all it guesses is right, greedy or drawn. Another one is right less often."""
    other = make_model(tmp_path / "other", "gemma3", hidden_size=32)
    async with TinySwarm(tmp_path, checkpoints["llama"]) as swarm:
        await swarm.serve_all(*THIRDS)
        model = await swarm.model()
        for sampling in (None, FREE, PENALIZED):
            expected = await write(model, WILD, 80, sampling=sampling, speculate="off")
            for draft, least in ((swarm.model_path, 60), (str(other), 0)):
                assert await write(model, WILD, 80, sampling=sampling, draft=draft) == expected
                assert model.last_stats.accepted >= least
                assert model.last_stats.drafted > 60
            assert all(draft._drafter.lanes == 0 for draft in model._drafts.values())
        await write(model, WILD, 20, draft=swarm.model_path, speculate="ngram")
        assert len(model._drafts) == 2
        await swarm.settled()


async def test_a_draft_model_must_know_the_same_tokens(checkpoints, tmp_path):
    other = make_model(tmp_path / "other", "llama")
    text = (other / "tokenizer.json").read_text().replace('"<pad>"', '"<gap>"')
    (other / "tokenizer.json").write_text(text)
    async with TinySwarm(tmp_path, checkpoints["llama"]) as swarm:
        await swarm.serve_all((0, 3))
        model = await swarm.model()
        with pytest.raises(ConfigError, match="tokenizers differ"):
            await write(model, WILD, 5, draft=str(other))
        await swarm.settled()
