"""Servers die, leave, forget and lie; the text stays what it was. Tiny models, whole nodes, one process."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from helpers.swarms import Hold, TinySwarm, collect, first_reached, ids_of, make_model, spans_in_use
from swarmnode.node.client.chain import FRUITLESS_REPAIRS, RETRY_S
from swarmnode.node.node import Node
from swarmnode.node.server.compute import Outcome
from swarmnode.protocol.errors import ServerFailed, SessionClosed
from swarmnode.protocol.sampling import SamplingParams

THIRDS = ((0, 1), (1, 2), (2, 3))
PROMPT = [3 + (7 * n + n * n // 5) % 256 for n in range(40)]
LONG = [3 + (5 * n + n * n // 3) % 256 for n in range(440)]
"""Four prefill chunks."""
COUNT = 40
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "gemma3")}


@pytest.fixture
async def swarm(checkpoints, tmp_path):
    """A Llama over three servers, each with a replica."""
    async with TinySwarm(tmp_path, checkpoints["llama"], repair_timeout_s=10) as swarm:
        await swarm.serve_all(*THIRDS, *THIRDS)
        yield swarm
        await swarm.settled()


async def write(model, prompt=PROMPT, count=COUNT, *, at=None, do=None, into=None, **options) -> list[int]:
    """Greedy tokens, added to `into`; `do()` is awaited after token number `at`."""
    tokens = [] if into is None else into
    async for piece in model.generate(prompt, max_new_tokens=count, wire="fp32", **options):
        tokens.append(piece.token_id)
        if len(tokens) == at:
            await do()
    return tokens


@pytest.mark.parametrize("local_ends", [True, False])
@pytest.mark.parametrize("block", [0, 1, 2])
async def test_a_server_killed_in_decode(block, local_ends, swarm):
    model = await swarm.model(local_ends=local_ends)
    expected = await write(model)
    tokens = await write(model, at=10, do=lambda: swarm.kill(swarm.serving(block)))
    assert tokens == expected
    assert model.last_stats.repairs == 1


@pytest.mark.parametrize("local_ends", [True, False])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("passing", [0, 2])
async def test_a_server_killed_in_prefill(block, passing, local_ends, swarm):
    model = await swarm.model(local_ends=local_ends)
    expected = await write(model, LONG, 8)
    holds = [Hold(node, passing) for node in servers_of(swarm, block)]
    writing = asyncio.create_task(write(model, LONG, 8))
    dying = await first_reached(holds)
    await swarm.kill(dying.node)
    for hold in holds:
        hold.release()
    assert await writing == expected
    assert model.last_stats.repairs == 1


def servers_of(swarm: TinySwarm, block: int) -> list[Node]:
    """Servers that could run this block."""
    return [node for node in swarm.servers if node._server.spans[0].start <= block < node._server.spans[0].end]


@pytest.mark.parametrize("blocks", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
async def test_several_servers_killed_at_once(blocks, swarm):
    model = await swarm.model()
    expected = await write(model)

    async def kill_all():
        await asyncio.gather(*[swarm.kill(node) for node in [swarm.serving(block) for block in blocks]])

    assert await write(model, at=10, do=kill_all) == expected


@pytest.mark.parametrize("passing", [0, 2])
@pytest.mark.parametrize("block", [0, 1, 2])
async def test_the_replacement_is_killed_in_its_replay(block, passing, swarm):
    await swarm.serve_all(*THIRDS)
    model = await swarm.model()
    expected = await write(model, LONG, 20)

    async def kill_twice():
        await swarm.kill(swarm.serving(block))
        holds = [Hold(node, passing) for node in servers_of(swarm, block)]
        replaying = await first_reached(holds)
        await swarm.kill(replaying.node)
        for hold in holds:
            hold.release()

    assert await write(model, LONG, 20, at=5, do=kill_twice) == expected
    assert model.last_stats.repairs == 2


async def test_one_after_the_other_until_none_is_left(swarm):
    """Each block's first server goes; then, in the same generation, only replicas are left."""
    model = await swarm.model()
    expected = await write(model, count=60)
    tokens = []
    async for piece in model.generate(PROMPT, max_new_tokens=60, wire="fp32"):
        tokens.append(piece.token_id)
        if len(tokens) in (10, 20, 30):
            await swarm.kill(swarm.serving(len(tokens) // 10 - 1))
    assert tokens == expected
    assert model.last_stats.repairs == 3


async def test_a_wider_server_takes_over_and_cuts_stay(checkpoints, tmp_path):
    """In a coarse codec the replacement must encode and decode at the borders the dead ones had."""
    async with TinySwarm(tmp_path, checkpoints["llama"]) as swarm:
        await swarm.serve_all(*THIRDS)
        model = await swarm.model()
        expected = ids_of(await collect(model.generate(PROMPT, max_new_tokens=COUNT, wire="int8s")))
        spare = await swarm.serve(0, 3)
        tokens = []
        async for piece in (await swarm.model()).generate(PROMPT, max_new_tokens=COUNT, wire="int8s"):
            tokens.append(piece.token_id)
            if len(tokens) == 1:
                cuts = {s.machine.start for n in swarm.servers for s in n._server.sessions._sessions.values()}
                dying = [node for node in swarm.servers if node is not spare and spans_in_use(node)]
            if len(tokens) == 10:
                await asyncio.gather(*(swarm.kill(node) for node in dying))
        if cuts == {0, 1, 2}:
            assert tokens == expected
        await swarm.settled()


@pytest.mark.parametrize("local_ends", [True, False])
async def test_a_sampled_text_stays_the_same(local_ends, swarm):
    model = await swarm.model(local_ends=local_ends)
    expected = await write(model, sampling=SAMPLED)
    kill = [lambda block=block: swarm.kill(swarm.serving(block)) for block in (2, 0)]
    assert await write(model, sampling=SAMPLED, at=10, do=kill[0]) == expected
    assert await write(model, sampling=SAMPLED, at=20, do=kill[1]) == expected


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("local_ends", [True, False])
async def test_logs_that_were_evicted_are_replayed_from_the_tokens(block, local_ends, checkpoints, tmp_path):
    async with TinySwarm(tmp_path, checkpoints["llama"], log_bytes=1) as swarm:
        await swarm.serve_all(*THIRDS, *THIRDS)
        model = await swarm.model(local_ends=local_ends)
        expected = await write(model)
        other = await swarm.model()

        async def evict_and_kill():
            dying = swarm.serving(block)
            await write(other, count=2)  # another session's rows push ours out
            await swarm.kill(dying)

        assert await write(model, at=10, do=evict_and_kill) == expected
        await swarm.settled()


@pytest.mark.parametrize("block", [0, 1, 2])
async def test_a_server_that_drains_hands_over(block, swarm):
    model = await swarm.model()
    expected = await write(model, count=120)
    leaving = []

    async def drain():
        node = swarm.serving(block)
        leaving.append((node, asyncio.create_task(node.drain())))

    tokens = await write(model, count=120, at=10, do=drain)
    node, draining = leaving[0]
    await draining
    assert tokens == expected
    assert (await node.status()).sessions == 0
    assert model.last_stats.repairs == 1
    fresh = await swarm.model()
    assert node.peer_id not in {server.peer for server in (await fresh.view()).servers}
    assert await write(fresh) == expected[:COUNT]


async def test_a_server_that_drains_with_nobody_else_serves_on(checkpoints, tmp_path):
    async with TinySwarm(tmp_path, checkpoints["llama"]) as swarm:
        await swarm.serve_all(*THIRDS)
        model = await swarm.model()
        expected = await write(model)
        tasks = []

        async def drain():
            tasks.append(asyncio.create_task(swarm.serving(1).drain()))

        assert await write(model, at=5, do=drain) == expected
        await tasks[0]
        await swarm.settled()


async def test_nobody_takes_over(checkpoints, tmp_path):
    """After `repair_timeout_s` the client says who failed and what is missing; what it wrote stays the user's."""
    async with TinySwarm(tmp_path, checkpoints["llama"], repair_timeout_s=0.5) as swarm:
        await swarm.serve_all(*THIRDS)
        model = await swarm.model()
        expected = await write(model)
        tokens: list[int] = []
        with pytest.raises(ServerFailed, match="1:2"):
            await write(model, at=10, do=lambda: swarm.kill(swarm.serving(1)), into=tokens)
        assert tokens == expected[: len(tokens)]
        assert len(tokens) >= 10
        await swarm.settled()


async def test_the_client_waits_for_a_server_that_joins_later(checkpoints, tmp_path):
    async with TinySwarm(tmp_path, checkpoints["llama"], repair_timeout_s=20) as swarm:
        await swarm.serve_all(*THIRDS)
        model = await swarm.model()
        expected = await write(model)
        joining = []

        async def kill_and_join():
            await swarm.kill(swarm.serving(1))
            joining.append(asyncio.create_task(swarm.serve(1, 2)))

        assert await write(model, at=10, do=kill_and_join) == expected
        await joining[0]
        await swarm.settled()


async def test_a_server_that_comes_back_replaces_itself(checkpoints, tmp_path):
    """With the same identity, at another address: what a process that restarts looks like."""
    async with TinySwarm(tmp_path, checkpoints["llama"], repair_timeout_s=20) as swarm:
        await swarm.serve(0, 1)
        await swarm.serve(1, 2, identity=tmp_path / "key")
        await swarm.serve(2, 3)
        model = await swarm.model()
        expected = await write(model)
        joining = []

        async def restart():
            await swarm.kill(swarm.serving(1))
            joining.append(asyncio.create_task(swarm.serve(1, 2, identity=tmp_path / "key")))

        assert await write(model, at=10, do=restart) == expected
        await joining[0]
        await swarm.settled()


async def test_many_generations_lose_the_same_server(swarm):
    models = [await swarm.model(local_ends=number % 2 == 0) for number in range(4)]
    prompts = [PROMPT[: 5 + 3 * number] for number in range(8)]
    expected = [await write(models[0], prompt) for prompt in prompts]
    pairs = [(models[number % 4], prompt) for number, prompt in enumerate(prompts)]
    holds = [Hold(node, 20) for node in servers_of(swarm, 1)]
    writing = [asyncio.create_task(write(model, prompt)) for model, prompt in pairs]
    dying = await first_reached(holds)
    await swarm.kill(dying.node)
    for hold in holds:
        hold.release()
    assert await asyncio.gather(*writing) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3"])
async def test_hidden_sessions_survive_between_truncations(family, checkpoints, tmp_path):
    """Lanes, rewinds and repairs together: rows equal those of an undisturbed session."""
    hidden = torch.randn(3, 200, 64, generator=torch.Generator().manual_seed(9))
    async with TinySwarm(tmp_path, checkpoints[family]) as swarm:
        await swarm.serve_all(*THIRDS, *THIRDS)
        model = await swarm.model()
        async with await model.session(max_length=220, batch=3, wire="fp32") as session:
            expected = await session.step(hidden)
        async with await model.session(max_length=220, batch=3, wire="fp32") as session:
            for step, (back, block) in enumerate(((0, 1), (5, 0), (70, 2))):
                await session.step(hidden[:, session.position : session.position + 60])
                await session.truncate(session.position - back)
                await swarm.kill(swarm.serving(block))
                position = session.position
                out = await session.step(hidden[:, position : position + 20])
                assert torch.equal(out, expected[:, position : position + 20]), step
        await swarm.settled()


# Servers that lie.


def bend(node, change) -> None:
    """From now on this server's outcomes go through `change(outcome, job)`."""
    worker = node._server.spans[0].worker
    honest = worker._run_output
    worker._run_output = lambda seat, job, rows: change(honest(seat, job, rows), job)


def not_a_number(outcome: Outcome, job) -> Outcome:
    return replace(outcome, payload=b"\xff" * len(outcome.payload), logprob=float("-inf"))


def too_short(outcome: Outcome, job) -> Outcome:
    return replace(outcome, payload=outcome.payload[:-4])


def too_long(outcome: Outcome, job) -> Outcome:
    return replace(outcome, payload=outcome.payload + b"\0" * 4)


def nothing(outcome: Outcome, job) -> Outcome:
    return replace(outcome, payload=b"")


def no_token(outcome: Outcome, job) -> Outcome:
    return replace(outcome, token=-1)


def wild_token(outcome: Outcome, job) -> Outcome:
    return replace(outcome, token=1 << 20)


@pytest.mark.parametrize("lie", [not_a_number, too_short, too_long, nothing])
@pytest.mark.parametrize("block", [0, 1, 2])
async def test_a_server_that_sends_nonsense_is_replaced(lie, block, swarm):
    model = await swarm.model()
    expected = await write(model)

    async def corrupt():
        bend(swarm.serving(block), lie)

    assert await write(model, at=10, do=corrupt) == expected


@pytest.mark.parametrize("lie", [no_token, wild_token])
async def test_a_tail_that_sends_no_tokens_is_replaced(lie, swarm):
    model = await swarm.model(local_ends=False)
    expected = await write(model)

    async def corrupt():
        bend(swarm.serving(2), lie)

    assert await write(model, at=10, do=corrupt) == expected


@pytest.mark.parametrize("lie", [too_short, nothing])
@pytest.mark.parametrize("local_ends", [True, False])
async def test_a_tail_that_sends_wrong_logits_is_replaced(lie, local_ends, swarm):
    model = await swarm.model(local_ends=local_ends)
    expected = await model.forward(LONG, wire="fp32")
    for node in swarm.servers[:3]:
        bend(node, lie)
    assert torch.equal(await model.forward(LONG, wire="fp32"), expected)


async def test_servers_that_take_over_only_to_fail_are_given_up(checkpoints, tmp_path):
    """They open sessions and break them at once: neither a busy loop nor an endless one."""
    async with TinySwarm(tmp_path, checkpoints["llama"], repair_timeout_s=0.5) as swarm:
        await swarm.serve_all(*THIRDS, *THIRDS)
        model = await swarm.model()
        for node in servers_of(swarm, 1):
            bend(node, nothing)
        with pytest.raises(ServerFailed, match="took over failed"):
            await write(model)
        assert model.last_stats.repairs <= FRUITLESS_REPAIRS + 1 + 0.5 / RETRY_S
        await swarm.settled()


async def test_a_server_that_hangs_is_replaced(swarm):
    """Its loop answers probes, its compute thread does not come back."""
    model = await swarm.model()
    expected = await write(model)
    held = []

    async def hang():
        worker = swarm.serving(1)._server.spans[0].worker
        held.append(worker)
        worker.submit = lambda *job: None

    async with asyncio.timeout(20):
        assert await write(model, at=10, do=hang) == expected
    assert held


async def test_a_client_that_vanishes_frees_the_servers(swarm):
    """And whoever waits for its text hears that it is over."""
    client = await swarm.client()
    model = await client.model(swarm.model_path, dtype="fp32")
    with pytest.raises(SessionClosed):
        await write(model, at=5, do=client.aclose)
    await swarm.settled()
