"""Whole nodes learn where they are, servers announce it, and a planner goes by it where it cannot measure."""

import asyncio
import dataclasses
from itertools import combinations
from statistics import median

import pytest
from helpers.internet import Internet
from helpers.swarms import make_model
from swarmnode.routing.cost import PlanRequest
from swarmnode.routing.swarm import SwarmView

pytestmark = pytest.mark.virtual

LEARNED_S = 130.0
"""Three announcements, and some hundred round trips of everybody."""
PLACES = {"client": 0, "first": 0.05, "beside it": 0.05 + 0.012j, "beyond": -0.045}
"""On the disc, in seconds one way. Nobody but the servers themselves can measure the way between two servers."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("places"), "llama"))


@pytest.fixture
async def internet(tmp_path):
    async with Internet(5, tmp_path) as internet:
        yield internet


async def at(internet, place, *doors, **options):
    """A node at a place."""
    random_place, internet._place = internet._place, lambda: place
    try:
        return await internet.node(*doors, **options)
    finally:
        internet._place = random_place


async def three_servers(internet, checkpoint):
    """Two ways to the model's end: beside the first server, or beyond the client and a little nearer to it."""
    doors = [await internet.node()]
    for _ in range(7):  # bystanders, anywhere: the more there are, the better everybody knows its place
        doors.append(await internet.node(doors[0]))
    servers = {}
    for name, span in (("first", (0, 2)), ("beside it", (2, 3)), ("beyond", (2, 3))):
        servers[name] = await at(internet, PLACES[name], doors[0])
        await servers[name].serve(checkpoint, span=span, dtype="fp32", quant="none")
    client = await at(internet, PLACES["client"], doors[0], private=True)
    return servers, client


def changed(view, **changes):
    announcements = [dataclasses.replace(server.announcement, **changes) for server in view.servers]
    return SwarmView.build(view.model, view.digest, view.num_blocks, announcements)


async def test_servers_announce_their_places_and_the_planner_goes_by_them(internet, checkpoint):
    servers, client = await three_servers(internet, checkpoint)
    await asyncio.sleep(LEARNED_S)
    names = {node.peer_id: name for name, node in servers.items()}
    (listed,) = await client.models()
    router = client._client._router
    view = await router.view(listed.name, listed.digest, listed.num_blocks, fresh=True)
    announced = {names[server.peer]: server.announcement.coordinate for server in view.servers}
    assert announced.keys() == servers.keys()
    errors = [
        abs(announced[one].rtt_s(announced[other]) / internet.rtt_s(servers[one], servers[other]) - 1)
        for one, other in combinations(servers, 2)
    ]
    assert median(errors) < 0.25, "two servers the client never saw together"
    view = changed(view, decode_s=0.001, prefill_s=0.001)  # measured for real, so they differ from run to run
    request = PlanRequest(need_embed=True, need_head=True)
    chosen = await router.plan(view, request)
    assert [names[peer] for peer in chosen.peers] == ["first", "beside it"]
    blind = await router.plan(changed(view, coordinate=None), request)
    assert [names[peer] for peer in blind.peers] == ["first", "beyond"], "the nearer one, as far as the client can see"
