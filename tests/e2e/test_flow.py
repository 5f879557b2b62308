"""The command line as a user meets it: join, look around, generate without files, leave."""

from __future__ import annotations

import json
import signal
import time

import pytest
from helpers.processes import Process, Server, Servers, environment

pytestmark = [pytest.mark.e2e, pytest.mark.weights, pytest.mark.timeout(300)]

HALVES = ((0, 9), (9, 18))
PROMPT = "The capital of France is"
START_S = 30.0
"""Ten seconds are promised on two idle cores; several servers start at once here."""


@pytest.fixture(scope="module")
def servers(env):
    """Two halves of the model, in a swarm of their own name."""
    made = Servers(env, "--swarm", "flow", "--threads", "1")
    began = time.monotonic()
    made.start(HALVES[0])
    print(f"READY after {time.monotonic() - began:.1f} s with a warm cache")
    made.start(HALVES[1])
    yield made
    made.stop()


@pytest.fixture
def launch(env):
    """Starts commands; none outlives the test."""
    launched = []

    def launch(*arguments: str) -> Process:
        launched.append(Process(list(arguments), env))
        return launched[-1]

    yield launch
    for process in launched:
        process.kill()


def run(env, *arguments: str, timeout_s: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in the swarm of these tests."""
    command, *rest = arguments
    return Process([command, "--swarm", "flow", *rest], env).finish(timeout_s)


def ask(env, *arguments: str) -> object:
    """What a command says with --json."""
    code, out, err = run(env, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_second_start_is_quick(servers, launch):
    began = time.monotonic()
    address = launch("join", "gemma3-270m", "--swarm", "flow", "--serve", "4:9", "--peer", servers.address).ready()
    took = time.monotonic() - began
    print(f"READY after {took:.1f} s with a warm cache")
    assert "/p2p/12D3" in address
    assert took < START_S


def test_looking_around(servers, env):
    """Without --peer: through the nodes of this machine."""
    [listed] = ask(env, "models")
    assert (listed["name"], listed["num_blocks"]) == ("gemma3-270m", 18)
    assert listed["servers"] >= 2
    status = ask(env, "status")
    assert {node["peer_id"] for node in status["local_nodes"]} == {server.peer for server in servers.running}
    [coverage] = status["models"]
    assert coverage["missing"] == []
    assert {(server["peer_id"], server["start"], server["end"]) for server in coverage["servers"]} >= {
        (server.peer, *server.span) for server in servers.running
    }
    route = ask(env, "route", "gemma3-270m")
    assert [(hop["start"], hop["end"]) for hop in route["hops"]] == list(HALVES)
    assert route["total_s"] > 0
    code, out, _ = run(env, "peers", "--peer", servers.address)
    assert code == 0
    assert servers.running[0].peer in out
    ping = Process(["ping", servers.address, "--json"], env).finish()
    assert ping[0] == 0
    assert json.loads(ping[1])["min_s"] < 1


def test_generating_on_a_machine_without_files(servers, env, tmp_path):
    """An empty home and an empty cache: config and tokenizer come from a peer, the ends run at servers."""
    stranger = environment(tmp_path / "home", tmp_path / "cache")
    options = ("--peer", servers.address, "--max-new-tokens", "12")
    body = ask(stranger, "generate", PROMPT, *options)
    assert body["model"] == "gemma3-270m"
    assert len(body["token_ids"]) == 12
    assert len(body["stats"]["route"]) == 2
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert kept == [f"{body['digest']}.manifest"]
    code, out, err = run(stranger, "generate", PROMPT, *options, "--stats")
    assert (code, out) == (0, body["text"] + "\n")
    assert "tokens/s" in err
    local = ask(env, "generate", PROMPT, "--max-new-tokens", "12")
    assert local["token_ids"] == body["token_ids"]
    sampled = [ask(env, "generate", PROMPT, *options, "--temperature", "0.8", "--seed", "7") for _ in range(2)]
    assert sampled[0]["token_ids"] == sampled[1]["token_ids"]


def test_leaving(servers, env):
    """Ctrl-C: exit code 0, and nobody is sent there any more; the other servers stay."""
    leaver = servers.start((9, 18))[0]
    assert leaver.peer in serving(env)
    servers.kill(leaver, signal.SIGINT)
    code, _, err = leaver.process.finish()
    assert code == 0, err
    assert "leaving" in err
    assert leaver.peer not in serving(env)
    assert {server.peer for server in servers.running} <= serving(env)


def serving(env) -> set[str]:
    """Peer ids of the servers that a new client sees."""
    [coverage] = ask(env, "status")["models"]
    return {server["peer_id"] for server in coverage["servers"]}


def test_leaving_in_a_hurry(servers, launch):
    """While a session holds a server that nobody can replace, it waits; the second Ctrl-C does not."""
    talking = launch("generate", PROMPT, "--swarm", "flow", "--peer", servers.address, "--max-new-tokens", "4000")
    assert talking.child.stdout.read(1)
    last: Server = servers.running[1]
    last.process.kill(signal.SIGINT)
    last.process.says("leaving")
    servers.kill(last, signal.SIGINT)
    code, _, _ = last.process.finish(5)
    assert code == 130


def test_ready_as_json(launch):
    """And what a swarm that serves nothing says."""
    process = launch("join", "--serve", "none", "--swarm", "alone", "--listen", "/ip4/127.0.0.1/tcp/0", "--json")
    body = json.loads(process.line())
    assert body["ready"].endswith(body["peer_id"])
    assert body["ready"] in body["addrs"]
    code, out, err = launch("generate", PROMPT, "--swarm", "alone", "--peer", body["ready"]).finish()
    assert (code, out) == (3, "")
    assert "error: the swarm 'alone' serves no model yet: start one with swarmnode join gemma3-270m" in err
    assert "Traceback" not in err
    process.kill(signal.SIGTERM)
    assert process.finish()[0] == 0
