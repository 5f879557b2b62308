"""`ping --until-direct`: what each ping says about its path, when it ends, and with which exit code."""

import io
import json

import pytest
from helpers.hosts import LOOPBACK, tcp_host
from helpers.relayed import hidden_host, meet, relay_host
from swarmnode.node.config import NodeConfig
from swarmnode.node.console import Console
from swarmnode.node.nat import pinging
from swarmnode.node.nat.pinging import ping_until_direct

SETTINGS = NodeConfig(listen=[str(LOOPBACK)])


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(pinging, "PAUSE_S", 0.01)


async def run(address, count, *, as_json=False):
    out, err = io.StringIO(), io.StringIO()
    code = await ping_until_direct(SETTINGS, address, count, Console(as_json=as_json, out=out, err=err))
    return code, out.getvalue(), err.getvalue()


@pytest.mark.loops
async def test_a_direct_path_ends_it_at_once():
    async with tcp_host(1) as host:
        code, out, _ = await run(str(host.listen_addrs[0]), 5)
        assert code == 0
        (line,) = out.splitlines()
        assert line.startswith(f"pong from {host.peer_id.short} directly from {host.bound_addrs[0]} in ")


async def test_through_a_relay_it_goes_on_and_says_so():
    async with relay_host("tcp", 90, None) as (relay, _), hidden_host("tcp", 2, None) as hidden:
        place = await meet(hidden, relay)
        address = str(place.addrs[0].with_peer(hidden.peer_id))
        code, out, err = await run(address, 3)
        assert code == pinging.NOT_DIRECT
        assert [line.split(" in ")[0] for line in out.splitlines()] == [
            f"pong from {hidden.peer_id.short} through relay {str(relay.peer_id)[-8:]}"
        ] * 3
        assert "no direct path" in err
        code, out, _ = await run(address, 2, as_json=True)
        body = json.loads(out)
        assert (code, body["direct"], [pong["relayed"] for pong in body["pongs"]]) == (1, False, [True, True])
