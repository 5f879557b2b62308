"""Generations over whole nodes with real (tiny) weights under the virtual clock: a pass takes no time, the paths do."""

import asyncio
import itertools
from collections import Counter

import pytest
from helpers.internet import Internet
from helpers.swarms import is_free, make_model, spans_in_use

pytestmark = pytest.mark.virtual

PROMPT = [4, 5, 6, 7, 8]
TOKENS = 24
PAUSES_S = {"kill": 1.0, "power_off": 5.0}
"""Longest gap between two tokens. Whoever is killed is missed at once, who falls silent after a deadline."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("virtual"), "llama"))


@pytest.fixture
async def internet(tmp_path):
    async with Internet(3, tmp_path) as internet:
        yield internet


def stop_the_clock_while_computing(node):
    """Time stands still while the node's compute thread has a job."""
    loop = asyncio.get_running_loop()
    for span in node._server.spans:
        worker = span.worker
        submit, release, out = worker.submit, worker.release, Counter()

        def submitted(seat, job, done, submit=submit, out=out):
            def back(outcome):
                out[id(seat)] -= 1
                loop.came_back()
                done(outcome)

            if seat.closed:  # its outcome will reach nobody
                submit(seat, job, done)
                return
            out[id(seat)] += 1
            loop.went_out()
            submit(seat, job, back)

        def released(seat, release=release, out=out):
            release(seat)
            loop.came_back(out.pop(id(seat), 0))

        worker.submit, worker.release = submitted, released


async def serve(internet, checkpoint, *spans):
    """A node for each span, after one that only takes part."""
    door = await internet.node()
    servers = []
    for span in spans:
        node = await internet.node(door)
        await node.serve(checkpoint, span=span, dtype="fp32", quant="none")
        stop_the_clock_while_computing(node)
        servers.append(node)
    client = await internet.node(door, private=True)
    return servers, client


async def write(model, clock, pieces=None):
    """The ids of a text and the time of each; `pieces` collects them while they come."""
    pieces = [] if pieces is None else pieces
    async for piece in model.generate(PROMPT, max_new_tokens=TOKENS, wire="fp32", speculate="off"):
        pieces.append((clock.now(), piece.token_id))
    return [token for _, token in pieces], [later - sooner for (sooner, _), (later, _) in itertools.pairwise(pieces)]


async def test_a_token_takes_the_paths_time(internet, checkpoint, clock):
    (first, second), client = await serve(internet, checkpoint, (0, 2), (2, 3))
    tokens, steps = await write(await client.model(dtype="fp32", local_ends=False), clock)
    assert len(tokens) == TOKENS
    round_trip = sum(internet.rtt_s(*path) for path in ((client, first), (first, second), (second, client))) / 2
    assert steps == [pytest.approx(round_trip, abs=0.001)] * (TOKENS - 1)


@pytest.mark.parametrize("death", ["kill", "power_off"])
@pytest.mark.parametrize("block", [0, 2])
async def test_a_death_costs_a_pause_and_no_token(death, block, internet, checkpoint, clock):
    servers, client = await serve(internet, checkpoint, *[(0, 2), (2, 3)] * 2)
    model = await client.model(dtype="fp32", local_ends=False)
    expected, quiet = await write(model, clock)
    pieces = []
    writing = asyncio.create_task(write(model, clock, pieces))
    while len(pieces) < TOKENS // 2:  # noqa: ASYNC110 - on the virtual clock a look costs nothing
        await asyncio.sleep(0.01)
    victim = next(node for node in servers if any(a <= block < b for a, b in spans_in_use(node)))
    await getattr(internet, death)(victim)
    tokens, steps = await writing
    assert tokens == expected
    assert quiet[0] < max(steps) < PAUSES_S[death]
    await asyncio.sleep(60)
    assert all(is_free(node) for node in servers if node is not victim)
