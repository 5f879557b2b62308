"""Many sessions at once over whole nodes: each as if it were alone, and nothing left of those that have gone."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from helpers.swarms import TinySwarm, collect, eventually, ids_of, is_free, make_model
from swarmnode.protocol.errors import ConfigError

SESSIONS = 64
LONGEST = 200
TEXTS = 5
STEM = 128
"""Rows all texts begin with."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("many"), "gemma3")


def prompts():
    rng = random.Random(1)
    stem = [rng.randrange(3, 259) for _ in range(STEM)]
    return [[*stem, *(rng.randrange(3, 259) for _ in range(10 * text))] for text in range(TEXTS)]


def computed(node):
    return node._server.spans[0].worker.timings.rows


class Crowd:
    """Sessions of one client over three servers, with what each text gives alone."""

    def __init__(self, model) -> None:
        self.model = model
        self.running = self.most = 0
        self.compared = self.cancelled = 0

    async def prepare(self):
        width = self.model.config.hidden_size
        rng = torch.Generator().manual_seed(2)
        stem = torch.randn(STEM, width, generator=rng)
        rest = torch.randn(TEXTS, LONGEST - STEM, width, generator=rng)
        self.hidden = torch.cat((stem.expand(TEXTS, -1, -1), rest), 1)
        self.rows, self.tokens = [], []
        for text in range(TEXTS):
            async with await self.model.session(max_length=LONGEST, wire="bf16") as session:
                self.rows.append(await session.step(self.hidden[text : text + 1]))
            pieces = await collect(self.model.generate(prompts()[text], max_new_tokens=12, wire="bf16"))
            self.tokens.append(ids_of(pieces))

    async def visit(self, rng: random.Random, everybody: asyncio.Event) -> None:
        """One session: joins at some time, does something for a while, leaves in some way."""
        text = rng.randrange(TEXTS)
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == SESSIONS:
            everybody.set()
        work = self.write(text, rng) if rng.random() < 0.4 else self.walk(text, rng, everybody)
        task = asyncio.create_task(work)
        if rng.random() < 0.2:
            await everybody.wait()
            for _ in range(rng.randrange(200)):
                await asyncio.sleep(0)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            self.cancelled += 1
        self.running -= 1

    async def write(self, text: int, rng: random.Random) -> None:
        count = rng.randint(2, 12)
        pieces = await collect(self.model.generate(prompts()[text], max_new_tokens=count, wire="bf16"))
        assert ids_of(pieces) == self.tokens[text][:count]
        self.compared += count

    async def walk(self, text: int, rng: random.Random, everybody: asyncio.Event) -> None:
        length = rng.randint(20, LONGEST)
        async with await self.model.session(max_length=length, wire="bf16") as session:
            await everybody.wait()
            for _ in range(rng.randint(2, 8)):
                if session.position and rng.random() < 0.3:
                    await session.truncate(rng.randint(0, session.position))
                at = session.position
                count = min(rng.choice((1, 1, 1, 3, 20, 100)), length - at)
                if count:
                    found = await session.step(self.hidden[text : text + 1, at : at + count])
                    assert torch.equal(found, self.rows[text][:, at : at + count]), (text, at, count)
                    self.compared += count


async def crowd(checkpoint, tmp_path, rounds):
    """64 sessions, joining at random, and as many again whenever one has left."""
    async with TinySwarm(tmp_path, checkpoint, dtype="bf16") as swarm:
        await swarm.serve_all((0, 1), (1, 2), (2, 3))
        crowd, everybody = Crowd(await swarm.model()), asyncio.Event()
        await crowd.prepare()
        rng, places = random.Random(3), asyncio.Semaphore(SESSIONS)

        async def visit(seed: int) -> None:
            async with places:
                await crowd.visit(random.Random(seed), everybody)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(SESSIONS * rounds):
                tasks.create_task(visit(rng.randrange(1 << 30)))
        assert crowd.most == SESSIONS
        assert crowd.cancelled > SESSIONS * rounds / 20
        assert crowd.compared > SESSIONS * rounds * 10
        await swarm.settled()
        for node in swarm.servers:
            pool = node._server.spans[0].worker.pool
            assert pool.promised_bytes == 0
            assert pool.prefixes.reused_rows > SESSIONS * rounds * 10


async def test_64_sessions_that_come_and_go_equal_their_solo_runs_over_nodes(checkpoint, tmp_path):
    await crowd(checkpoint, tmp_path, 1)


@pytest.mark.slow
async def test_512_sessions_that_come_and_go_equal_their_solo_runs_over_nodes(checkpoint, tmp_path):
    await crowd(checkpoint, tmp_path, 8)


async def test_a_prompt_is_computed_once_at_every_hop(checkpoint, tmp_path):
    """With ends at the client and with ends at the servers, for two clients who know nothing of each other."""
    async with TinySwarm(tmp_path, checkpoint, dtype="bf16") as swarm:
        await swarm.serve_all((0, 2), (2, 3))
        tokens = []
        for local_ends in (True, False):
            counts = []
            for _ in range(2):
                before = [computed(node) for node in swarm.servers]
                model = await swarm.model(local_ends=local_ends)
                tokens.append(ids_of(await collect(model.generate(prompts()[3], max_new_tokens=5, wire="int8s"))))
                await swarm.settled()
                counts.append([computed(node) - then for node, then in zip(swarm.servers, before, strict=True)])
            whole = len(prompts()[3]) + 4
            assert counts == [[whole, whole], [whole - STEM, whole - STEM]] if local_ends else counts[1][0] < whole
        assert tokens == [tokens[0]] * 4


async def test_cancelled_sessions_free_everything_at_once(checkpoint, tmp_path):
    """While their jobs wait and run."""
    async with TinySwarm(tmp_path, checkpoint) as swarm:
        await swarm.serve_all((0, 2), (2, 3))
        model = await swarm.model()
        async with asyncio.TaskGroup() as tasks:
            writing = [
                tasks.create_task(collect(model.generate(prompts()[n % TEXTS], max_new_tokens=300))) for n in range(16)
            ]
            await eventually(lambda: all(len(node._server.sessions) == 16 for node in swarm.servers), "not all began")
            for task in writing:
                task.cancel()
        await eventually(lambda: all(map(is_free, swarm.servers)), "something was left")
        for node in swarm.servers:
            worker = node._server.spans[0].worker
            assert (worker.pool.used_bytes, worker.pool.promised_bytes, len(worker._scheduler)) == (0, 0, 0)


async def test_a_cache_in_8_bits_is_a_class_of_its_own_and_holds_twice_as_much(checkpoint, tmp_path):
    async with TinySwarm(tmp_path, checkpoint, dtype="bf16") as swarm:
        full = await swarm.serve(0, 3, kv_bytes=1 << 20)
        node = await swarm.node(kv_bytes=1 << 20)
        halved = await node.serve(swarm.model_path, span=(0, 3), quant="none", dtype="bf16", kv="int8")
        span = full._server.spans[0]
        assert halved.compute_class != span.compute_class
        assert halved.kv_free > 1.7 * span.kv_free
        with pytest.raises(ConfigError, match="int4"):
            await node.serve(swarm.model_path, span=(0, 3), kv="int4")
        with pytest.raises(ConfigError, match="everybody"):
            await node.serve(swarm.model_path, span=(0, 3), share_prefixes="everybody")


@pytest.mark.parametrize("spans", [[(0, 3)], [(0, 1), (1, 2), (2, 3)]], ids=["one", "three"])
async def test_tokens_with_a_cache_in_8_bits_do_not_depend_on_who_serves(spans, checkpoint, tmp_path):
    expected = None
    for number in range(2):
        async with TinySwarm(tmp_path / str(number), checkpoint, dtype="bf16") as swarm:
            for span in spans if number else [(0, 2), (2, 3)]:
                node = await swarm.node()
                await node.serve(swarm.model_path, span=span, quant="none", dtype="bf16", kv="int8")
                swarm.servers.append(node)
            pieces = ids_of(await collect((await swarm.model()).generate(prompts()[1], max_new_tokens=20)))
            expected = expected or pieces
            assert pieces == expected
            await swarm.settled()
