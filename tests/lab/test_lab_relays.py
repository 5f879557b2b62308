"""A server and a client behind NATs of their own meet at a relay, generate, and lose the relay while they do."""

import json

import pytest
from helpers.processes import Process, environment
from helpers.swarms import make_model
from lab.nat import Nat, NatWorld
from swarmnode.protocol.multiaddr import Multiaddr

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

PROMPT = "Two machines that nobody can dial"
COUNT = 400
GENERATE = ("generate", PROMPT, "--max-new-tokens", str(COUNT), "--wire", "fp32")
SOME = 40
"""Characters after which the relay dies."""


@pytest.fixture
def processes():
    """Started by the test, killed after it."""
    started = []
    yield started
    for process in started:
        process.kill()


@pytest.fixture
def run(lab, tmp_path, processes):
    """Start a command in a namespace, as a user of its own."""

    def start(space, user, *arguments):
        process = Process(list(arguments), environment(tmp_path / user, tmp_path / "cache"), space)
        processes.append(process)
        return process

    return start


def succeed(process):
    """Wait for the end; its output."""
    code, out, err = process.finish(120)
    assert code == 0, err
    return out, err


def relays_of(run, space):
    """What each relay has passed on so far, by peer id."""
    out, _ = succeed(run(space, "relays", "status", "--json"))
    return {node["peer_id"]: node["relaying"]["serves"]["bytes_total"] for node in json.loads(out)["local_nodes"]}


def lines(text):
    """Text as it comes out of a pipe that is read as text."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("kind", [Nat.CONE, Nat.SYMMETRIC])
def test_text_goes_on_when_the_relay_dies(lab, run, tmp_path, kind):
    world = NatWorld(lab, [kind, kind])
    behind, other = world.clients
    model = str(make_model(tmp_path / "model", max_position_embeddings=1024))
    relays = {}
    for address in world.relay.addresses:
        peers = [word for known in relays for word in ("--peer", known)]
        listen = ("--listen", f"/ip4/{address}/tcp/4001", "--be-relay", "on", *peers)
        process = run(world.relay, "relays", "join", "--serve", "none", *listen)
        relays[process.ready()] = process
    named = [word for address in relays for word in ("--peer", address, "--relay", address)]
    server = run(behind, "server", "join", model, "--serve", "0:3", *named)
    server.ready()

    alone, _ = succeed(run(behind, "alone", *GENERATE, "--model", model, "--json"))
    expected = json.loads(alone)
    before = relays_of(run, world.relay)
    entrances = [word for address in relays for word in ("--peer", address)]
    out, _ = succeed(run(other, "client", *GENERATE, *entrances, "--json"))
    assert json.loads(out)["token_ids"] == expected["token_ids"]
    carried = {relay: size - before[relay] for relay, size in relays_of(run, world.relay).items()}
    busy = max(carried, key=carried.get)
    assert carried[busy] > COUNT * 100  # each token goes there and back

    client = run(other, "client", *GENERATE, *entrances, "--stats")
    begun = client.child.stdout.read(SOME)
    relay = next(process for address, process in relays.items() if str(Multiaddr.parse(address).peer_id) == busy)
    relay.kill()
    rest = client.child.stdout.read()  # here, for what is decoded already is in there
    _, said = succeed(client)
    assert begun + rest == lines(expected["text"]) + "\n"
    assert "repairs" in said
