"""Two servers that cannot reach each other, though the client reaches both: their rows go over the client."""

import pytest
from helpers.swarms import TinySwarm, make_model
from swarmnode.node.host import Host
from swarmnode.protocol.messages import SESSION_PROTOCOL

PROMPT = "Rows that go a long way round arrive all the same."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("relay") / "model")


def part(monkeypatch, *pairs):
    """Make session streams between these nodes fail, as two routers would."""
    blocked = {(a.peer_id, b.peer_id) for a, b in pairs}
    dial = Host.open_stream

    async def open_stream(self, peer, protocol, **options):
        if protocol == SESSION_PROTOCOL and (self.peer_id, peer) in blocked:
            raise ConnectionRefusedError("a router is in the way")
        return await dial(self, peer, protocol, **options)

    monkeypatch.setattr(Host, "open_stream", open_stream)


async def write(model):
    return [piece.token_id async for piece in model.generate(PROMPT, max_new_tokens=12, wire="fp32")]


@pytest.mark.parametrize("local_ends", [True, False])
@pytest.mark.parametrize("parted", [[(0, 1)], [(1, 2)], [(0, 1), (1, 2)]])
async def test_rows_go_over_the_client(tmp_path, checkpoint, monkeypatch, parted, local_ends):
    async with TinySwarm(tmp_path, checkpoint) as swarm:
        servers = await swarm.serve_all((0, 1), (1, 2), (2, 3))
        expected = await write(await swarm.model(local_ends=local_ends))
        part(monkeypatch, *((servers[a], servers[b]) for a, b in parted))
        model = await swarm.model(local_ends=local_ends)
        assert await write(model) == expected
        assert model.last_stats.repairs == 0
        assert await write(model) == expected
        await swarm.settled()


async def test_the_plan_prices_the_way_round(tmp_path, checkpoint, monkeypatch):
    async with TinySwarm(tmp_path, checkpoint) as swarm:
        first, second, other = await swarm.serve_all((0, 2), (2, 3), (2, 3))
        part(monkeypatch, (first, second), (first, other))
        model = await swarm.model()
        await write(model)
        plan = await model.route()
        assert plan.hops[-1].terms.network_s > 0


async def test_a_dead_hop_is_replaced_not_relayed(tmp_path, checkpoint):
    async with TinySwarm(tmp_path, checkpoint) as swarm:
        await swarm.serve_all((0, 1), (1, 2), (1, 2), (2, 3))
        model = await swarm.model()
        expected = await write(model)
        tokens = []
        async for piece in model.generate(PROMPT, max_new_tokens=12, wire="fp32"):
            tokens.append(piece.token_id)
            if len(tokens) == 4:
                await swarm.kill(swarm.serving(1))
        assert tokens == expected
        assert model.last_stats.repairs == 1
