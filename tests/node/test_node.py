"""Node as another program holds it: several in one process, what they show, and that they leave nothing behind."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from helpers.swarms import LOOPBACK, TinySwarm, collect, eventually, ids_of, make_model
from swarmnode.node.config import NodeConfig
from swarmnode.node.node import Node
from swarmnode.protocol.errors import ConfigError, ModelNotFound, NoRoute, PeerUnreachable

PROMPT = [4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen"), "qwen3")


@pytest.fixture
async def swarm(llama, tmp_path):
    async with TinySwarm(tmp_path, llama) as swarm:
        yield swarm


def alone(tmp_path, **settings) -> NodeConfig:
    folders = {f"{name}_dir": tmp_path / name for name in ("data", "state", "cache")}
    return NodeConfig(**{"listen": [LOOPBACK], **folders, **settings})


async def write(model, count: int = 12) -> list[int]:
    return ids_of(await collect(model.generate(PROMPT, max_new_tokens=count, wire="fp32")))


async def test_one_node_is_server_and_client(llama, tmp_path):
    """Rows then never leave the process, and the text is the same."""
    async with Node(alone(tmp_path)) as node:
        progress = []
        span = await node.serve(str(llama), span=(0, 3), dtype="fp32", progress=lambda *done: progress.append(done))
        assert (span.start, span.end, progress) == (0, 3, [(1, 3), (2, 3), (3, 3)])
        model = await node.model(str(llama), dtype="fp32")
        assert await node.model(str(llama), dtype="fp32") is model
        first = await write(model)
        assert await write(await node.model(dtype="fp32", local_ends=False)) == first
        assert len(first) == 12


async def test_a_status_tells_it_all(swarm):
    await swarm.serve_all((0, 2), (2, 3))
    model = await swarm.model()
    async with await model.session(max_length=70) as session:
        status = await swarm.servers[0].status()
        assert status.peer_id == str(swarm.servers[0].peer_id)
        assert status.addrs == tuple(str(addr) for addr in swarm.servers[0].addrs)
        assert (status.swarm, status.sessions, status.known_nodes) == ("main", 1, 1)
        assert status.peers == 2
        [span] = status.spans
        assert (span.start, span.end, span.num_blocks, span.quant, span.sessions) == (0, 2, 3, "none", 1)
        assert bytes.fromhex(span.digest) == model.digest
        assert span.kv_free_tokens > 0
        assert min(span.decode_s, span.prefill_s) > 0
        assert session.route[0].endswith("[0:2]")
    await write(model)
    [after] = (await swarm.servers[0].status()).spans
    assert after.rows_computed == span.rows_computed + len(PROMPT) + 11
    assert after.busy_s > span.busy_s
    await swarm.settled()
    assert (await swarm.servers[0].status()).sessions == 0


async def test_looking_around(swarm):
    first, second = await swarm.serve_all((0, 2), (1, 3))
    client = await swarm.client()
    [listed] = await client.models()
    assert (listed.num_blocks, listed.family, listed.servers) == (3, "llama", 2)
    view = await client.view(listed.name)
    assert [(server.peer, server.start, server.end) for server in sorted(view.servers, key=lambda s: s.start)] == [
        (first.peer_id, 0, 2),
        (second.peer_id, 1, 3),
    ]
    assert view.coverage() == (1, 2, 1)
    info = await client.info(second.peer_id, listed.digest)
    assert (info.start, info.end, info.sessions, info.draining) == (1, 3, 0, False)
    assert (await client.info(second.peer_id, bytes(32))).end == 0
    assert await client.ping(str(first.addrs[0])) < 5
    assert {info.peer for info in await client.peers()} == {first.peer_id, second.peer_id}
    plan = await (await client.model(listed.name)).route()
    assert (plan.hops[0].start, plan.hops[-1].end) == (0, 3)
    assert plan.total_s > 0


async def test_swarms_of_other_names_never_mix(swarm, qwen):
    """Neither look-ups nor routing tables: whoever knocks at the wrong door is told so."""
    ours = await swarm.serve(0, 3)
    other = await swarm.node(swarm="other", peers=())
    await other.serve(str(qwen), span=(0, 3), dtype="fp32")
    with pytest.raises(PeerUnreachable, match="another swarm than 'other': check --swarm"):
        await swarm.client(swarm="other", peers=[str(ours.addrs[0])])
    client, theirs = await swarm.client(), await swarm.client(swarm="other", peers=[str(other.addrs[0])])
    assert [model.family for model in await client.models()] == ["llama"]
    [their_model] = await theirs.models()
    with pytest.raises(ModelNotFound, match="swarm 'main'"):
        await client.model(their_model.name)
    model = await theirs.model(swarm.model_path)
    with pytest.raises(NoRoute):
        await write(model)
    assert [contact.peer for contact in theirs.discovery.peers()] == [other.peer_id]
    assert other.peer_id not in {contact.peer for contact in client.discovery.peers()}


async def test_two_models_of_a_swarm(swarm, qwen):
    await swarm.serve(0, 3)
    await swarm.serve(0, 3, model=str(qwen))
    client = await swarm.client()
    llama_listed, qwen_listed = sorted(await client.models(), key=lambda model: model.name)
    with pytest.raises(ConfigError, match="several models") as caught:
        await client.model()
    assert llama_listed.name in str(caught.value)
    assert qwen_listed.name in str(caught.value)
    by_name = await client.model(qwen_listed.name)
    assert by_name.digest == qwen_listed.digest
    exact = await client.model(f"{llama_listed.name}@{llama_listed.digest.hex()[:12]}")
    assert exact.digest == llama_listed.digest
    with pytest.raises(ModelNotFound):
        await client.model(f"{llama_listed.name}@{qwen_listed.digest.hex()[:12]}")
    assert await write(by_name) != await write(exact)


async def test_spans_that_choose_themselves_cover_the_model(swarm):
    nodes = [await swarm.node() for _ in range(2)]
    for node in nodes:
        await node.serve(swarm.model_path, dtype="fp32")
    view = await nodes[0].view(swarm.model_path)
    assert view.missing() == ()


@pytest.mark.parametrize(("span", "problem"), [((0, 9), "3 blocks: use --serve 0:3"), ((2, 2), "empty"), ((2, 1), "3")])
async def test_spans_outside_the_model_are_refused(span, problem, swarm):
    node = await swarm.node()
    with pytest.raises(ConfigError, match=problem):
        await node.serve(swarm.model_path, span=span)
    assert (await node.status()).spans == ()


@pytest.mark.parametrize("options", [{"quant": "int3"}, {"dtype": "fp8"}, {"device": "abacus"}])
async def test_settings_of_a_span_are_checked(options, swarm):
    node = await swarm.node()
    with pytest.raises(ConfigError, match=next(iter(options.values()))):
        await node.serve(swarm.model_path, span=(0, 3), **options)


async def test_a_model_is_served_once_per_node(swarm):
    node = await swarm.serve(0, 2)
    with pytest.raises(ConfigError, match="already serves"):
        await node.serve(swarm.model_path, span=(2, 3))


async def test_an_identity_lasts_and_is_held_while_its_node_runs(tmp_path):
    config = alone(tmp_path, persistent=True)
    async with Node(config) as first, Node(config) as second:
        assert first.peer_id != second.peer_id
        held = first.peer_id
        with pytest.raises(ConfigError, match="another node runs"):
            await Node(replace(config, identity=tmp_path / "data" / "node.key")).__aenter__()
    async with Node(config) as again:
        assert again.peer_id == held
    async with Node(alone(tmp_path)) as bare, Node(alone(tmp_path)) as other:
        assert len({bare.peer_id, other.peer_id, held}) == 3


async def test_a_start_that_fails_leaves_nothing(tmp_path):
    async with Node(alone(tmp_path)) as running:
        taken = str(running.addrs[0].without_peer())
        config = alone(tmp_path, listen=[taken], identity=tmp_path / "key")
        with pytest.raises(ConfigError, match=r"in use|cannot listen"):
            await Node(config).__aenter__()
        nobody = str(running.addrs[0])
    with pytest.raises(PeerUnreachable, match="refused"):
        await Node(alone(tmp_path, peers=[nobody], identity=tmp_path / "key")).__aenter__()
    async with Node(alone(tmp_path, identity=tmp_path / "key")) as node:
        assert node.addrs


async def test_nothing_is_left_of_many_nodes(llama, tmp_path):
    """Threads end with their nodes; closing twice, or before anything was started, is no harm."""
    before = set(threading.enumerate())
    async with TinySwarm(tmp_path, llama) as swarm:
        await swarm.serve_all((0, 1), (1, 2), (2, 3))
        model = await swarm.model()
        assert await write(model)
        for node in swarm.servers:
            await node.aclose()
            await node.aclose()
    names = {thread.name for thread in threading.enumerate() if thread not in before}
    assert not {name for name in names if name.startswith(("compute", "model-ends"))}
    await Node(alone(tmp_path)).aclose()


async def test_leaving_takes_the_records_along(swarm):
    first, second = await swarm.serve_all((0, 3), (0, 3))
    client = await swarm.client()
    assert (await client.models())[0].servers == 2
    await first.drain()
    view = await client.view(swarm.model_path)
    assert [server.peer for server in view.servers] == [second.peer_id]
    assert (await client.models())[0].servers == 1
    async with asyncio.timeout(5):
        await second.drain()
    assert await client.models() == []


async def test_a_node_that_is_cancelled_while_it_loads_serves_nothing(swarm):
    node = await swarm.node()
    loading = asyncio.create_task(node.serve(swarm.model_path, span=(0, 3)))
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert (await node.status()).spans == ()
    await node.serve(swarm.model_path, span=(0, 3))
    client = await swarm.client(peers=[str(node.addrs[0])])
    await eventually(lambda: len(client.host.peers()) > 0, "not connected")
    assert len(await client.models()) == 1
