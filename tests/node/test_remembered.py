"""The file of peers met: kept between runs, shared by nodes, never a reason to fail."""

import json
import logging

import pytest
from helpers.swarms import LOOPBACK, TinySwarm, make_model
from swarmnode.node.config import NodeConfig
from swarmnode.node.node import Node
from swarmnode.node.remembered import MAX_ADDRS, MAX_AGE_S, Remembered
from swarmnode.protocol.errors import PeerUnreachable
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.multiaddr import Multiaddr

NOW = 1_700_000_000.0
PEER = PrivateKey.from_seed(bytes(32)).peer_id


def addr(port):
    return Multiaddr.parse(f"/ip4/192.0.2.1/tcp/{port}").with_peer(PEER)


def test_the_last_met_come_first_and_the_oldest_go(tmp_path):
    file = Remembered(tmp_path, "main")
    assert file.load(NOW) == []
    file.save([addr(1), addr(2)], NOW)
    file.save([addr(2), addr(3)], NOW + 10)
    assert file.load(NOW + 10) == [addr(2), addr(3), addr(1)]
    assert Remembered(tmp_path, "other").load(NOW) == []
    file.save([addr(port) for port in range(100, 100 + MAX_ADDRS)], NOW + 20)
    assert file.load(NOW + 20) == [addr(port) for port in range(100, 100 + MAX_ADDRS)]


def test_what_was_not_met_for_a_month_is_forgotten(tmp_path):
    file = Remembered(tmp_path, "main")
    file.save([addr(1)], NOW)
    file.save([addr(2)], NOW + MAX_AGE_S - 1)
    assert file.load(NOW + MAX_AGE_S + 1) == [addr(2)]


@pytest.mark.parametrize(
    "body",
    ["", "[]", "null", "{}", '{"addrs": []}', '{"addrs": {"/ip4/1.2.3.4/tcp/1": "soon"}}', '{"addrs": {"x": 1}}'],
)
def test_a_damaged_file_counts_as_empty(tmp_path, body):
    file = Remembered(tmp_path, "main")
    (tmp_path / "peers-main.json").write_text(body)
    assert file.load(NOW) == []
    file.save([addr(1)], NOW)
    assert file.load(NOW) == [addr(1)]


def test_a_time_in_the_future_does_not_stay_in_front(tmp_path):
    file = Remembered(tmp_path, "main")
    (tmp_path / "peers-main.json").write_text(json.dumps({"addrs": {str(addr(1)): NOW + 1e9}}))
    file.save([addr(2)], NOW + 1)
    file.save([addr(3)], NOW + 2)
    assert file.load(NOW + 2)[0] == addr(3)


def test_a_folder_that_cannot_be_written_is_said_and_survived(tmp_path, caplog):
    (tmp_path / "state").write_text("a file, not a folder")
    with caplog.at_level(logging.WARNING):
        Remembered(tmp_path / "state", "main").save([addr(1)], NOW)
    assert "cannot remember peers" in caplog.text


# Nodes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "llama")


def settings(tmp_path, **more) -> NodeConfig:
    folders = {f"{name}_dir": tmp_path / name for name in ("data", "state", "cache")}
    return NodeConfig(**{"listen": [LOOPBACK], "persistent": True, **folders, **more})


async def test_a_node_finds_its_way_back_without_being_told(tmp_path, model):
    async with TinySwarm(tmp_path / "swarm", model) as swarm:
        await swarm.anchor()
        async with Node(settings(tmp_path, peers=swarm.entrance)) as node:
            first = node.peer_id
        async with Node(settings(tmp_path)) as node:
            assert node.peer_id == first
            assert len(node.discovery.peers()) == 1
        async with Node(settings(tmp_path, persistent=False)) as node:
            assert not node.discovery.peers()


async def test_when_no_peer_given_answers_those_met_before_do(tmp_path, model):
    dead = str(Multiaddr.parse("/ip4/127.0.0.1/tcp/9").with_peer(PEER))
    with pytest.raises(PeerUnreachable):
        async with Node(settings(tmp_path, peers=[dead])):
            pass
    async with TinySwarm(tmp_path / "swarm", model) as swarm:
        await swarm.anchor()
        async with Node(settings(tmp_path, peers=swarm.entrance)):
            pass
        async with Node(settings(tmp_path, peers=[dead])) as node:
            assert len(node.discovery.peers()) == 1


async def test_nobody_remembered_lives_any_more(tmp_path):
    Remembered(tmp_path / "state", "main").save([Multiaddr.parse("/ip4/127.0.0.1/tcp/9").with_peer(PEER)], NOW * 2)
    async with Node(settings(tmp_path)) as node:
        assert not node.discovery.peers()
