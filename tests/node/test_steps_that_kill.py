"""Generations whose every step may kill a server: whole nodes on the virtual clock, the same text, no error."""

import asyncio
import random

import pytest
from helpers.internet import Internet
from helpers.swarms import is_free, make_model, spans_in_use
from test_whole_sessions import stop_the_clock_while_computing

pytestmark = pytest.mark.virtual

STAGES = ((0, 1), (1, 2), (2, 3))
REPLICAS = 2
PROMPT = [4, 5, 6, 7, 8, 9, 10, 11]
TOKENS = 32
DEATHS = 0.05
"""Chance of a failure at each step."""
RESTART_S = 1.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("killing"), "llama"))


class Swarm:
    """Stages with replicas; whoever dies comes back as somebody else."""

    def __init__(self, internet: Internet, checkpoint: str, rng: random.Random) -> None:
        self.internet, self.checkpoint, self.rng = internet, checkpoint, rng
        self.servers: dict[object, tuple[int, int]] = {}
        self.deaths = 0
        self.returning: list[asyncio.Task] = []

    async def begin(self) -> object:
        self.door = await self.internet.node()
        for span in STAGES * REPLICAS:
            await self.serve(span)
        return await self.internet.node(self.door, private=True, repair_timeout_s=60)

    async def serve(self, span: tuple[int, int]) -> None:
        node = await self.internet.node(self.door)
        await node.serve(self.checkpoint, span=span, dtype="fp32", quant="none")
        stop_the_clock_while_computing(node)
        self.servers[node] = span

    async def strike(self) -> None:
        """Kill a server that serves, or take its power, unless it is the last of its stage."""
        stages = list(self.servers.values())
        victims = [node for node, span in self.servers.items() if spans_in_use(node) and stages.count(span) > 1]
        if not victims:
            return
        victim = self.rng.choice(victims)
        span = self.servers.pop(victim)
        self.deaths += 1
        await (self.internet.kill if self.rng.random() < 0.7 else self.internet.power_off)(victim)
        self.returning.append(asyncio.create_task(self.come_back(span)))

    async def come_back(self, span: tuple[int, int]) -> None:
        await asyncio.sleep(RESTART_S)
        await self.serve(span)


async def text(model, strike=None, chance=None) -> list[int]:
    tokens = []
    async for piece in model.generate(PROMPT, max_new_tokens=TOKENS, wire="fp32", speculate="off"):
        tokens.append(piece.token_id)
        if strike is not None and chance.random() < DEATHS:
            await strike()
    return tokens


async def story(seed: int, home, checkpoint: str) -> int:
    """One generation after an undisturbed one; returns how many died."""
    rng = random.Random(seed)
    async with Internet(seed, home) as internet:
        swarm = Swarm(internet, checkpoint, rng)
        client = await swarm.begin()
        model = await client.model(checkpoint if seed % 2 else None, dtype="fp32", local_ends=bool(seed % 2))
        expected = await text(model)
        assert await text(model, swarm.strike, rng) == expected, f"seed {seed}"
        await asyncio.gather(*swarm.returning)
        await asyncio.sleep(60)
        assert all(is_free(node) for node in swarm.servers), f"seed {seed}"
        return swarm.deaths


@pytest.mark.parametrize("seed", [0])
async def test_a_text_outlives_its_servers(seed, checkpoint, tmp_path):
    await story(seed, tmp_path, checkpoint)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 200))
async def test_many_texts_outlive_their_servers(seed, checkpoint, tmp_path):
    await story(seed, tmp_path, checkpoint)
