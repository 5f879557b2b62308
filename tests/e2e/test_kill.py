"""Serving processes are killed and stopped; the client sees the same tokens, no error, and a short pause.

Pauses are printed, not asserted: they depend on what else the machine does.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

import pytest
from helpers.processes import Server, Servers
from helpers.swarms import ids_of
from swarmnode.node.client.model import RemoteModel
from swarmnode.node.node import Node
from swarmnode.protocol.ids import PeerId

pytestmark = [pytest.mark.e2e, pytest.mark.weights, pytest.mark.timeout(300)]

FIRST, MIDDLE, LAST = (0, 6), (6, 12), (12, 18)
PROMPT_CHARACTERS = 1500
LONG_CHARACTERS = 4500
COUNT = 32
WAIT_S = 20.0


@pytest.fixture
async def client(bf16, node_config):
    """A client of three stages: the middle one three times, the last one twice."""
    bf16.ensure(FIRST, MIDDLE, MIDDLE, MIDDLE, LAST, LAST)
    async with Node(node_config(*(server.address for server in bf16.running[-2:]))) as node:
        yield node


async def write(model: RemoteModel, prompt: str, at: int = -1, do: Callable[[], Awaitable[None]] | None = None):
    """Pieces of COUNT greedy tokens; `do()` is awaited after token number `at`."""
    pieces = []
    async for piece in model.generate(prompt, max_new_tokens=COUNT, wire="bf16"):
        pieces.append(piece)
        if len(pieces) == at and do is not None:
            await do()
    return pieces


async def in_use(client: Node, model: RemoteModel, candidates: list[Server]) -> Server:
    """Wait until one of these servers has a session."""
    async with asyncio.timeout(WAIT_S):
        while True:
            for server in candidates:
                info = await client.info(PeerId.parse(server.peer), model.digest)
                if info is not None and info.sessions:
                    return server


def of_span(servers: Servers, span: tuple[int, int]) -> list[Server]:
    return [server for server in servers.running if server.span == span]


def report(what: str, model: RemoteModel) -> None:
    stats = model.last_stats
    print(
        f"{what}: stall {stats.stall_s * 1000:.0f} ms, first token {stats.first_token_s * 1000:.0f} ms, "
        f"{stats.repairs} repairs, {stats.tokens_per_s:.1f} tokens/s"
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_server_goes_in_decode(how, client, bf16, prose):
    """SIGSTOP: its connections stay open and nothing comes any more."""
    model = await client.model("gemma3-270m")
    prompt = prose[:PROMPT_CHARACTERS]
    expected = await write(model, prompt)
    report("undisturbed", model)
    victim = []

    async def kill() -> None:
        victim.append(await in_use(client, model, of_span(bf16, MIDDLE)))
        bf16.kill(victim[0], how)

    pieces = await write(model, prompt, 8, kill)
    victim[0].process.kill()
    report(f"{how.name} in decode", model)
    assert ids_of(pieces) == ids_of(expected)
    assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in expected)
    assert model.last_stats.repairs >= 1


async def test_a_server_is_killed_in_the_prefill(client, bf16, prose):
    model = await client.model("gemma3-270m")
    prompt = prose[:LONG_CHARACTERS]
    expected = await write(model, prompt)
    report("undisturbed, long prompt", model)
    await all_free(client, model, bf16)
    writing = asyncio.create_task(write(model, prompt))
    victim = await in_use(client, model, of_span(bf16, MIDDLE))
    bf16.kill(victim)
    assert model.last_stats.new_tokens == 0
    assert ids_of(await writing) == ids_of(expected)
    report("killed in the prefill", model)
    assert model.last_stats.repairs >= 1


async def all_free(client: Node, model: RemoteModel, servers: Servers) -> None:
    """Wait until no server has a session."""
    async with asyncio.timeout(WAIT_S):
        for server in servers.running:
            while (await client.info(PeerId.parse(server.peer), model.digest)).sessions:
                pass


async def test_the_replacement_is_killed_in_its_replay(client, bf16, prose):
    model = await client.model("gemma3-270m")
    prompt = prose[:LONG_CHARACTERS]
    expected = await write(model, prompt)
    await all_free(client, model, bf16)

    async def kill_twice() -> None:
        first = await in_use(client, model, of_span(bf16, MIDDLE))
        bf16.kill(first)
        second = await in_use(client, model, of_span(bf16, MIDDLE))
        bf16.kill(second)

    pieces = await write(model, prompt, 8, kill_twice)
    report("killed, and the replacement in its replay", model)
    assert ids_of(pieces) == ids_of(expected)
    assert model.last_stats.repairs >= 2


async def test_two_servers_are_killed_at_once(client, bf16, prose):
    model = await client.model("gemma3-270m")
    prompt = prose[:PROMPT_CHARACTERS]
    expected = await write(model, prompt)
    await all_free(client, model, bf16)

    async def kill_both() -> None:
        victims = [await in_use(client, model, of_span(bf16, span)) for span in (MIDDLE, LAST)]
        for victim in victims:
            bf16.kill(victim)

    pieces = await write(model, prompt, 8, kill_both)
    report("two killed at once", model)
    assert ids_of(pieces) == ids_of(expected)
    assert model.last_stats.repairs >= 1


@pytest.mark.slow
async def test_a_stage_without_replica_comes_back(client, bf16, prose):
    """The only server of the first stage dies; another joins while the client waits."""
    model = await client.model("gemma3-270m")
    prompt = prose[:PROMPT_CHARACTERS]
    expected = await write(model, prompt)
    await all_free(client, model, bf16)
    starting = []

    async def kill_and_start() -> None:
        for server in of_span(bf16, FIRST):
            bf16.kill(server)
        starting.append(asyncio.create_task(asyncio.to_thread(bf16.start, FIRST)))

    pieces = await write(model, prompt, 8, kill_and_start)
    await starting[0]
    report("no replica: another joined", model)
    assert ids_of(pieces) == ids_of(expected)
