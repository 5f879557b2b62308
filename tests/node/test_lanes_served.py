"""Lanes of a session over whole nodes: forked, dropped, cut, and rows like those of a session without lanes."""

import pytest
import torch
from helpers.swarms import TinySwarm, make_model
from swarmnode.protocol.messages import Output, Want
from swarmnode.protocol.sampling import SamplingParams
from swarmnode.protocol.token_rows import decode

THIRDS = ((0, 1), (1, 2), (2, 3))
PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return {name: make_model(tmp_path_factory.mktemp(name), name) for name in ("llama", "gemma3")}


@pytest.fixture(params=["llama", "gemma3"])
async def swarm(request, checkpoint, tmp_path):
    async with TinySwarm(tmp_path, checkpoint[request.param]) as swarm:
        await swarm.serve_all(*THIRDS, *THIRDS)
        yield swarm
        await swarm.settled()


async def step(session, lane: int, hidden: torch.Tensor) -> torch.Tensor:
    """Rows for one lane of a hidden session, through the chain beneath it."""
    from swarmnode.node.client.local import as_hidden, from_hidden

    session._chain.feed(from_hidden(hidden, session._codec), hidden.shape[0], Want.ALL, lane)
    result, payload = await session._chain.result()
    assert result.lane == lane
    return as_hidden(payload, session._codec, hidden.shape[1], "fp32")


@pytest.mark.parametrize("block", [None, 0, 1, 2])
async def test_forked_lanes_go_on_like_texts_of_their_own(block, swarm):
    """Also when a server died after the fork, or its replacement has to be told of it."""
    model = await swarm.model()
    rows = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(3))
    rows[:, :40] = rows[0, :40]
    async with await model.session(max_length=60, batch=4, wire="fp32") as whole:
        expected = await whole.step(rows)
    async with await model.session(max_length=60, batch=4, wire="fp32") as session:
        chain = session._chain
        assert torch.equal(await step(session, 0, rows[0, :40]), expected[0, :40])
        for lane in (1, 2, 3):
            chain.fork(0, lane)
            if lane == 2 and block is not None:
                await swarm.kill(swarm.serving(block))
        for lane in (3, 1, 0, 2):
            assert torch.equal(await step(session, lane, rows[lane, 40:45]), expected[lane, 40:45])
        chain.drop(1)
        chain.truncate(41, 2)
        chain.fork(2, 1)
        if block is not None:
            await swarm.kill(swarm.serving((block + 1) % 3))
        for lane in (2, 1):
            assert torch.equal(await step(session, lane, rows[2, 41:50]), expected[2, 41:50])


async def test_a_dropped_lane_gives_its_memory_back(swarm):
    model = await swarm.model()
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(4))
    async with await model.session(max_length=256, batch=2, wire="fp32") as session:
        pools = [node._server.spans[0].worker.pool for node in swarm.servers]
        await step(session, 0, rows)
        used = sum(pool.used_bytes for pool in pools)
        session._chain.fork(0, 1)
        session._chain.drop(0)
        out = await step(session, 1, rows[:1])
        assert sum(pool.used_bytes for pool in pools) <= used + 3 * max(pool.page_bytes for pool in pools)
        session._chain.drop(1)
        again = await step(session, 0, torch.cat((rows, rows[:1])))
        assert torch.equal(out[0], again[-1])


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.9, top_p=0.9, seed=3)])
async def test_a_tail_answers_for_every_row(params, swarm):
    """The tokens of one traversal are those of one by one."""
    model = await swarm.model(local_ends=False)
    one_by_one = [piece async for piece in model.generate(PROMPT, max_new_tokens=6, wire="fp32", sampling=params)]
    text = PROMPT + [piece.token_id for piece in one_by_one[:-1]]
    chain, _ = await model._opener.open(Output.TOKEN, 64, "fp32", remote_ends=True, params=params)
    try:
        chain.feed(b"".join(token.to_bytes(4, "little") for token in text), len(text), Want.ALL)
        result, payload = await chain.result()
    finally:
        await chain.close()
    choices = decode(payload, model.config.vocab_size)
    assert len(choices) == result.count == len(text)
    assert [choice.token for choice in choices[len(PROMPT) - 1 :]] == [piece.token_id for piece in one_by_one]
    assert [choice.logprob for choice in choices[len(PROMPT) - 1 :]] == pytest.approx(
        [piece.logprob for piece in one_by_one], rel=1e-6
    )
