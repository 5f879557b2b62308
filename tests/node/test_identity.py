"""Key files: made once, private, locked while a node runs."""

from __future__ import annotations

import stat

import pytest
from swarmnode.node import identity
from swarmnode.node.identity import MAX_KEY_BYTES, Identity
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.ids import PrivateKey


def test_ephemeral_identities_differ():
    assert Identity.ephemeral().key.peer_id != Identity.ephemeral().key.peer_id


def test_a_key_file_is_made_private_and_kept(tmp_path):
    path = tmp_path / "keys" / "node.key"
    first = Identity.at(path)
    first.close()
    second = Identity.at(path)
    second.close()
    assert first.key.peer_id == second.key.peer_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(file.name for file in path.parent.iterdir()) == ["node.key", "node.lock"]


def test_a_key_in_use_is_refused(tmp_path):
    with_lock = Identity.at(tmp_path / "node.key")
    with pytest.raises(ConfigError, match="another node runs with the identity"):
        Identity.at(tmp_path / "node.key")
    with_lock.close()
    with_lock.close()
    Identity.at(tmp_path / "node.key").close()


def test_nodes_of_one_user_take_profiles_in_turn(tmp_path):
    running = [Identity.default(tmp_path) for _ in range(4)]
    assert len({one.key.peer_id for one in running}) == 4
    assert [one.path.name for one in running] == ["node.key", "node-1.key", "node-2.key", "node-3.key"]
    running[1].close()
    again = Identity.default(tmp_path)
    assert again.key.peer_id == running[1].key.peer_id
    for one in (*running, again):
        one.close()


def test_profiles_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "MAX_PROFILES", 2)
    running = [Identity.default(tmp_path) for _ in range(2)]
    with pytest.raises(ConfigError, match="2 nodes of this user are running"):
        Identity.default(tmp_path)
    for one in running:
        one.close()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * MAX_KEY_BYTES * 2, PrivateKey.generate().marshal()[:-1]])
def test_a_file_that_is_no_key_is_left_alone(content, tmp_path):
    path = tmp_path / "node.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a swarmnode key"):
        Identity.at(path)
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose a writable --identity"):
        Identity.at(tmp_path / "file" / "node.key")


def test_a_key_that_cannot_be_read(tmp_path):
    (tmp_path / "node.key").mkdir()
    with pytest.raises(ConfigError, match="cannot read identity"):
        Identity.at(tmp_path / "node.key")
