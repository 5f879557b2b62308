"""Two machines on one local network (namespaces joined by a cable) find each other by multicast."""

import json
import subprocess
import sys

import pytest
from helpers.processes import environment

pytestmark = pytest.mark.netns
ONE, TWO = "192.0.2.1", "192.0.2.2"


def cable(lab):
    """Two machines, a wire between them, no other network."""
    spaces = lab.space("one"), lab.space("two")
    spaces[0].ip("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", spaces[1].name)
    for space, address in zip(spaces, (ONE, TWO), strict=True):
        space.ip("addr", "add", f"{address}/24", "dev", "wire")
        space.ip("link", "set", "wire", "up")
        space.ip("link", "set", "lo", "up")
        space.ip("route", "add", "default", "dev", "wire")
    return spaces


def swarmnode(*arguments):
    return [sys.executable, "-P", "-m", "swarmnode.cli", *arguments]


def test_a_swarm_is_found_on_the_local_network(lab, tmp_path):
    one, two = cable(lab)
    env = environment(tmp_path / "one", tmp_path / "cache") | {"SWARMNODE_LAN": "yes"}
    joined = lab.start(one, swarmnode("join", "--serve", "none", "--json"), env=env, stdout=subprocess.PIPE)
    ready = json.loads(joined.stdout.readline())
    assert f"/ip4/{ONE}/tcp/" in ready["ready"]
    env = environment(tmp_path / "two", tmp_path / "cache") | {"SWARMNODE_LAN": "yes"}
    found = lab.run(two, swarmnode("peers", "--json"), env=env)
    assert ready["peer_id"] in found.stdout
    assert "on this network" in found.stderr
    alone = subprocess.run(
        two.command(swarmnode("peers", "--swarm", "other")), env=env, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 2
    assert "no node of the swarm 'other' is known" in alone.stderr
