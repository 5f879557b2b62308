"""Runtime files: how commands find the nodes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from swarmnode.node.runtime import MAX_FILE_BYTES, RuntimeFile, running_nodes
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.multiaddr import Multiaddr

PEER = PrivateKey.from_seed(b"\1" * 32).peer_id
OTHER = PrivateKey.from_seed(b"\2" * 32).peer_id
ADDRS = [Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")]


def test_a_running_node_is_found_until_it_ends(tmp_path):
    file = RuntimeFile(tmp_path / "state", PEER, "main", ADDRS)
    [found] = running_nodes(tmp_path / "state", "main")
    assert (found.pid, found.peer, found.swarm, found.addrs) == (os.getpid(), PEER, "main", tuple(ADDRS))
    file.remove()
    file.remove()
    assert running_nodes(tmp_path / "state", "main") == []


def test_only_nodes_of_the_swarm_the_newest_first(tmp_path):
    for number, (peer, swarm) in enumerate([(PEER, "main"), (OTHER, "main"), (PEER, "private")]):
        file = RuntimeFile(tmp_path / swarm, peer, swarm, ADDRS)
        target = tmp_path / f"node-{number}-.json"
        file._path.replace(target)
        os.utime(target, (number, number))
    assert [node.peer for node in running_nodes(tmp_path, "main")] == [OTHER, PEER]
    assert [node.peer for node in running_nodes(tmp_path, "private")] == [PEER]
    assert running_nodes(tmp_path, "none") == []


def test_the_file_of_a_dead_process_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    file = RuntimeFile(tmp_path, PEER, "main", ADDRS)
    body = json.loads(file._path.read_text())
    file._path.write_text(json.dumps(body | {"pid": child.pid}))
    assert running_nodes(tmp_path, "main") == []
    assert not file._path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"pid": 1}',
        b'{"pid": "x", "peer": "y", "swarm": "main", "addrs": []}',
        b'{"pid": 1, "peer": "12D3KooW", "swarm": "main", "addrs": ["nonsense"]}',
        b'{"pid": 1, "peer": 5, "swarm": "main", "addrs": 7}',
        b'{"pid": -1, "peer": "%s", "swarm": "main", "addrs": []}' % str(PEER).encode(),
        b'{"pid": 99999999999999999999, "peer": "%s", "swarm": "main", "addrs": []}' % str(PEER).encode(),
        b" " * MAX_FILE_BYTES * 2,
        b"[" * 60_000,
    ],
)
def test_files_that_say_nonsense_are_passed_over(content, tmp_path):
    (tmp_path / "node-1-bad.json").write_bytes(content)
    assert running_nodes(tmp_path, "main") == []


def test_a_folder_that_is_not_there(tmp_path):
    assert running_nodes(tmp_path / "nowhere", "main") == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="writable state directory"):
        RuntimeFile(tmp_path / "file", PEER, "main", ADDRS)
