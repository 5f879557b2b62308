"""Many generations over a swarm whose servers come and go: every token as in a quiet swarm, no error, nothing left.

Something happens to a server every so many tokens. The order of events is seeded; what runs between two of them is up
to the machine, as in life.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading

import pytest
from helpers.swarms import TinySwarm, make_model
from swarmnode.protocol.sampling import SamplingParams

STAGES = ((0, 1), (1, 2), (2, 3))
REPLICAS = 2
WRITERS = 8
TOKENS = 60
EVENT_TOKENS = 40
"""Tokens, of all writers together, between two events."""
PROMPTS = [[3 + (k * n + n * n // 7) % 256 for n in range(5 + 19 * k)] for k in range(1, 9)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("soak"), "gemma3")


def sampling(number: int) -> SamplingParams:
    """Half of the texts greedy, half sampled."""
    return SamplingParams() if number % 2 else SamplingParams(temperature=0.8, top_k=30, seed=number)


async def write(model, number: int, token=lambda: None) -> list[int]:
    """Token ids of text `number`; `token()` is called at each."""
    prompt, tokens = PROMPTS[number % len(PROMPTS)], []
    async for piece in model.generate(prompt, max_new_tokens=TOKENS, sampling=sampling(number), wire="fp32"):
        tokens.append(piece.token_id)
        token()
    return tokens


class Churn:
    """Takes servers away and brings others, one event at a time; every stage keeps one server at least."""

    def __init__(self, swarm: TinySwarm, rng: random.Random) -> None:
        self._swarm = swarm
        self._rng = rng
        self._tokens = 0
        self._due = asyncio.Event()
        self.events = {"killed": 0, "drained": 0, "joined": 0}

    def token(self) -> None:
        """A writer has one more token."""
        self._tokens += 1
        if self._tokens % EVENT_TOKENS == 0:
            self._due.set()

    async def run(self) -> None:
        """Make things happen until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            await self._event()

    async def _event(self) -> None:
        stage = self._rng.choice(STAGES)
        serving = [node for node in self._swarm.servers if node._server.spans[0].start == stage[0]]
        if len(serving) < REPLICAS:
            await self._swarm.serve(*stage)
            self.events["joined"] += 1
        elif self._rng.random() < 0.7:
            await self._swarm.kill(self._rng.choice(serving))
            self.events["killed"] += 1
        else:
            leaving = self._rng.choice(serving)
            self._swarm.servers.remove(leaving)
            await leaving.drain()
            await leaving.aclose()
            self.events["drained"] += 1


async def soak(swarm: TinySwarm, rounds: int, seed: int) -> dict[str, int]:
    """Generations of `rounds` rounds under churn; asserts what they write."""
    await swarm.anchor()
    await swarm.serve_all(*STAGES * REPLICAS)
    quiet = await swarm.model()
    expected = [await write(quiet, number) for number in range(len(PROMPTS))]
    churn = Churn(swarm, random.Random(seed))
    models = [await swarm.model(local_ends=number % 2 == 0) for number in range(WRITERS)]
    running = asyncio.create_task(churn.run())
    for _ in range(rounds):
        writing = [asyncio.create_task(write(model, number, churn.token)) for number, model in enumerate(models)]
        assert await asyncio.gather(*writing) == expected
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await swarm.settled()
    return churn.events


async def test_generations_under_churn(checkpoint, tmp_path):
    async with TinySwarm(tmp_path, checkpoint, repair_timeout_s=20) as swarm:
        events = await soak(swarm, rounds=4, seed=1)
    assert min(events["killed"], events["joined"]) > 0
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("compute")] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(2, 4))
async def test_generations_under_long_churn(seed, checkpoint, tmp_path):
    async with TinySwarm(tmp_path, checkpoint, repair_timeout_s=20) as swarm:
        print(await soak(swarm, rounds=30, seed=seed))
