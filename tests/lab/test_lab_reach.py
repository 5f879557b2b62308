"""Whole nodes behind routers of every kind: what `swarmnode doctor` finds, and ports that a router opens for it."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab.nat import Nat, NatWorld

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]

ELSEWHERE = "198.51.100.1"
"""The relay's address in a second network: two votes instead of one."""
GATEWAY = Path(__file__).with_name("gateway.py")
PATIENCE_S = 90


def environment(home):
    folders = {f"SWARMNODE_{name}_DIR": str(home / name) for name in ("DATA", "STATE", "CACHE")}
    settings = home / "config.toml"
    home.mkdir(parents=True, exist_ok=True)
    settings.touch()
    return os.environ | folders | {"SWARMNODE_CONFIG": str(settings)}


def cli(*words):
    return [sys.executable, "-P", "-m", "swarmnode.cli", *words]


def ready(process):
    line = process.stdout.readline()
    assert line.startswith(("READY ", "ready")), line
    return line.split()[-1]


def public_nodes(lab, world, home):
    """Two nodes on the relay, in two networks; the address of the first."""
    world.relay.ip("address", "add", f"{ELSEWHERE}/24", "dev", "wan")
    for router in world.routers:
        router.ip("route", "add", "198.51.100.0/24", "dev", "wan")
    peer = []
    for number, address in enumerate((world.relay.address, ELSEWHERE)):
        listen = ["--listen", f"/ip4/{address}/tcp/4001", "--no-lan", "--port-mapping", "off"]
        joined = [word for one in peer for word in ("--peer", one)]
        process = lab.start(
            world.relay,
            cli("join", "--serve", "none", *listen, *joined),
            env=environment(home / f"public{number}"),
            stdout=subprocess.PIPE,
        )
        peer.append(ready(process))
    return peer[0]


def gateway(lab, world, *options):
    """A router that opens ports."""
    router = world.routers[0]
    words = [sys.executable, str(GATEWAY), "10.1.0.1", router.address, *options]
    process = lab.start(router, words, stdout=subprocess.PIPE)
    ready(process)
    return process


def doctor(lab, world, home, peer, *options):
    words = cli("-q", "doctor", "--peer", peer, "--no-lan", "--listen", "/ip4/0.0.0.0/tcp/0", "--json", *options)
    done = lab.run(world.clients[0], words, env=environment(home / "doctor"), timeout=PATIENCE_S, check=False)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    assert (done.returncode == 0) is found["ok"]
    return found


def level(found, subject):
    (one,) = [finding["level"] for finding in found["findings"] if finding["subject"] == subject]
    return one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "network", "reach"),
    [
        # its address is a private one: whoever sees it shares the network, and has no view from outside
        (Nat.OPEN, "open", "unknown"),
        (Nat.FULL, "cone", "public"),
        (Nat.CONE, "cone", "private"),
        (Nat.SYMMETRIC, "symmetric", "private"),
        (Nat.RST, "cone", "private"),
    ],
)
def test_what_the_doctor_finds(lab, tmp_path, kind, network, reach):
    world = NatWorld(lab, [kind])
    found = doctor(lab, world, tmp_path, public_nodes(lab, world, tmp_path))
    assert (found["network"], found["reach"]) == (network, reach)
    assert len({one["by"] for one in found["seen"]}) == 2
    assert all(peer["rtt_s"] < 5 for peer in found["peers"])
    assert found["mtu"] == 1500


@pytest.mark.parametrize(
    ("speak", "via"),
    [("pcp", "PCP"), pytest.param("pmp", "NAT-PMP", marks=pytest.mark.slow), ("igd", "UPnP")],
)
def test_a_router_opens_a_port_and_the_node_is_reached_through_it(lab, tmp_path, speak, via):
    if speak == "igd":
        pytest.importorskip("miniupnpc")
    world = NatWorld(lab, [Nat.CONE])
    router = gateway(lab, world, "--speak", speak)
    found = doctor(lab, world, tmp_path, public_nodes(lab, world, tmp_path))
    assert found["port_mapping"]["via"] == via
    assert found["reach"] == "public", found
    (proven,) = [one for one in found["addresses"] if one["reach"] == "public"]
    assert (proven["address"], proven["source"]) == (found["port_mapping"]["outside"], "mapped")
    assert level(found, "reachable") == "ok"
    said = [router.stdout.readline().split()[0] for _ in range(2)]
    assert said == ["opened", "closed"], "closed again when the node ended"


@pytest.mark.slow
def test_a_router_that_refuses_is_named_with_what_to_do(lab, tmp_path):
    world = NatWorld(lab, [Nat.CONE])
    gateway(lab, world, "--refuse", "2")
    found = doctor(lab, world, tmp_path, public_nodes(lab, world, tmp_path))
    assert (found["reach"], found["port_mapping"]["via"]) == ("private", "")
    assert "not authorized" in found["port_mapping"]["failure"]
    assert (level(found, "port mapping"), level(found, "reachable")) == ("note", "bad")


def test_a_mapping_that_is_not_renewed_ends_at_the_router(lab, tmp_path):
    """A node that was killed leaves nothing behind for longer than its lease."""
    world = NatWorld(lab, [Nat.CONE])
    router = gateway(lab, world, "--lifetime", "4")
    client = lab.start(
        world.clients[0],
        cli("join", "--serve", "none", "--listen", "/ip4/0.0.0.0/tcp/4001", "--no-lan"),
        env=environment(tmp_path / "client"),
        stdout=subprocess.PIPE,
    )
    ready(client)
    assert router.stdout.readline().split()[0] == "opened"
    with contextlib.closing(reached(world, 4001)):
        pass
    client.kill()
    assert router.stdout.readline().split()[0] == "closed"
    with pytest.raises(OSError, match=r"timed out|refused"):
        reached(world, 4001)


def reached(world, port):
    """A connection from outside to a port of the router."""
    sock = world.relay.socket()
    sock.settimeout(2)
    try:
        sock.connect((world.routers[0].address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def test_a_laptop_that_gets_another_address_goes_on(lab, tmp_path):
    """Its connections are cut at once and dialed anew, long before TCP gives up, and it announces the new address."""
    world = NatWorld(lab, [Nat.CONE])
    client = world.clients[0]
    peer = public_nodes(lab, world, tmp_path)
    moving = lab.start(
        client,
        [sys.executable, "-P", str(Path(__file__).with_name("moving_node.py")), peer],
        env=environment(tmp_path / "moving"),
        stdout=subprocess.PIPE,
    )
    first = pong(moving)
    assert any("/10.1.0.2/" in address for address in first["addrs"])
    client.ip("address", "del", "10.1.0.2/24", "dev", "eth0")
    client.ip("address", "add", "10.1.0.77/24", "dev", "eth0")
    client.ip("route", "add", "default", "via", "10.1.0.1")
    again = first
    while "/10.1.0.77/" not in "".join(again["addrs"]):
        again = pong(moving)
    assert "our address on it is gone" in again["ended"]


def pong(process):
    while True:
        found = json.loads(process.stdout.readline())
        if "addrs" in found:
            return found
