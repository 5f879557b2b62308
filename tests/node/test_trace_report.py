"""Reports of a running node: only for who knows the key, tame whatever peers say, and shown readably."""

import asyncio
import io
import json
import random
from pathlib import Path

import pytest
from helpers.hosts import hosts, key, memory_host
from swarmnode.node import observe
from swarmnode.node.console import Console
from swarmnode.node.framing import FrameStream
from swarmnode.node.observe import Reporter, report, with_rates
from swarmnode.node.observed import MAX_SHOWN, duration, protocols_text, show_connections, size
from swarmnode.node.runtime import RunningNode
from swarmnode.node.transport.base import Priority
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol.errors import PeerUnreachable, ProtocolError, SwarmError
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.report import REPORT_MESSAGES, REPORT_PROTOCOL, GetReport

KEY = bytes(range(32))
HOSTILE = "\x1b]0;owned\x07\r\n\x1b[2Jroot# \u202e\x9b31m" + "x" * 500
DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


def shown(body):
    out = io.StringIO()
    show_connections(body, Console(out=out))
    return out.getvalue()


async def crowd(network, **options):
    """A host with a peer that says hostile things, one that has left, and a dial that failed."""
    host = await memory_host(network, 1).__aenter__()
    guest = await memory_host(network, 2, **options).__aenter__()
    host.handle("/test/\x1b[2J", lambda stream: stream.read(1))
    await guest.connect(host.peer_id, host.listen_addrs)
    async with memory_host(network, 3) as gone:
        await gone.connect(host.peer_id, host.listen_addrs)
    with pytest.raises(PeerUnreachable):
        await host.connect(key(9).peer_id, [Multiaddr.parse("/memory/999")])
    await guest.open_stream(host.peer_id, "/test/\x1b[2J")
    await asyncio.sleep(1)
    return host, guest


@pytest.mark.virtual
async def test_no_control_character_of_a_peer_reaches_a_terminal():
    network = MemoryNetwork(random.Random(0))
    host, guest = await crowd(network, agent=HOSTILE)
    try:
        for body in (report(host, connections=True), report(guest, connections=True)):
            for row in body["connections"]:
                row["rate_in"] = row["rate_out"] = 0.0
            for text in (shown(body), json.dumps(body, ensure_ascii=False)):
                assert text.replace("\n", "").isprintable()
        assert "?]0;owned" in shown(report_with_rates(host))
        assert len(json.dumps(report(host, connections=True))) < 20_000
    finally:
        await host.aclose()
        await guest.aclose()


def report_with_rates(host):
    body = report(host, connections=True)
    for row in body["connections"]:
        row["rate_in"] = row["rate_out"] = 0.0
    return body


@pytest.mark.virtual
async def test_hostile_rows_of_another_version_are_tamed_by_the_reader_too():
    network = MemoryNetwork(random.Random(0))
    host, guest = await crowd(network)
    try:
        body = report_with_rates(host)
        (row,) = body["connections"]
        row |= {"agent": HOSTILE, "address": HOSTILE, "protocols": {HOSTILE: 1}, "peer_id": HOSTILE}
        row["protected_by"] = [HOSTILE]
        body["ended"][0] |= {"reason": HOSTILE, "rule": HOSTILE, "peer_id": HOSTILE, "address": HOSTILE}
        body["dial_failures"][0] |= {"reason": HOSTILE, "address": HOSTILE}
        assert shown(body).replace("\n", "").isprintable()
    finally:
        await host.aclose()
        await guest.aclose()


@pytest.mark.virtual
async def test_what_is_shown():
    network = MemoryNetwork(random.Random(0))
    host, guest = await crowd(network)
    try:
        host.protect(guest.peer_id, "session")
        lines = shown(report_with_rates(host)).splitlines()
        assert lines[0] == f"node {host.peer_id}: 1 connections"
        assert lines[2].split()[0] == guest.peer_id.short
        assert lines[2].endswith("session")
        assert "direct" in lines[2]
        assert lines[4] == "ended lately"
        assert lines[6].split()[0] == key(3).peer_id.short
        assert lines[6].endswith("the peer closed the connection")
        assert lines[8] == "dialed in vain"
        assert lines[10].startswith("/memory/999")
        many = report_with_rates(host)
        many["connections"][0]["bulk"] = True
        assert "direct, bulk" in shown(many).splitlines()[2]
        many["ended"] *= 3 * MAX_SHOWN
        many["dial_failures"] *= 3 * MAX_SHOWN
        assert len(shown(many).splitlines()) == 4 + 3 + 3 + 2 * MAX_SHOWN - 1
    finally:
        await host.aclose()
        await guest.aclose()


@pytest.mark.virtual
async def test_only_who_knows_the_key_gets_a_report():
    async with hosts("memory", 2) as (host, asker):
        Reporter(host, KEY)
        node = RunningNode(1, host.peer_id, "main", host.listen_addrs, KEY)
        body = await observe._question(asker, node, connections=True)
        assert body["peer_id"] == str(host.peer_id)
        assert body["connections"] == []  # the asker's own is left out
        assert body["metrics"]["connections"] == 1
        assert "connections" not in await observe._question(asker, node, connections=False)
        wrong = RunningNode(1, host.peer_id, "main", host.listen_addrs, bytes(32))
        with pytest.raises(OSError, match="reset"):
            await observe._question(asker, wrong, connections=True)
        assert host.refused["report-key"] == 1


@pytest.mark.virtual
async def test_one_who_asks_nothing_is_let_go():
    async with hosts("memory", 2) as (host, asker):
        Reporter(host, KEY)
        stream = await asker.open_stream(host.peer_id, REPORT_PROTOCOL)
        await stream.write(b"\0")
        with pytest.raises(OSError, match="reset"):
            await stream.read(1)
        quiet = FrameStream(await asker.open_stream(host.peer_id, REPORT_PROTOCOL), REPORT_MESSAGES)
        await quiet.stream.close_write()
        assert await quiet.receive() is None


@pytest.mark.virtual
async def test_junk_instead_of_a_report_is_an_error():
    async with hosts("memory", 2) as (host, asker):
        node = RunningNode(1, host.peer_id, "main", host.listen_addrs, KEY)
        with pytest.raises(SwarmError):
            await observe._question(asker, node, connections=True)  # it does not speak the protocol

        async def hang_up(stream):
            await stream.read(100)

        host.handle(REPORT_PROTOCOL, hang_up)
        with pytest.raises(ProtocolError, match="without a report"):
            await observe._question(asker, node, connections=True)
    for payload in (b"", b"[]", b"[" * 100_000, b"\xff"):
        with pytest.raises(ProtocolError, match="not a JSON object"):
            observe._parse(payload)


async def test_asking_finds_a_node_over_tcp_and_none_is_none(caplog):
    async with hosts("tcp", 1) as (host,):
        Reporter(host, KEY)
        nodes = [
            RunningNode(1, host.peer_id, "main", host.listen_addrs, KEY),
            RunningNode(2, key(5).peer_id, "main", (Multiaddr.parse("/ip4/127.0.0.1/tcp/1"),), KEY),
        ]
        found, missing = await observe.ask_all(nodes, connections=True)
        assert found["peer_id"] == str(host.peer_id)
        assert missing is None


@pytest.mark.virtual
async def test_rates_are_those_between_two_looks():
    async with hosts("memory", 2) as (one, other):

        async def sink(stream):
            while await stream.read(65536):
                pass

        other.handle("/test/sink", sink)
        stream = await one.open_stream(other.peer_id, "/test/sink")
        stream.set_priority(Priority.BULK)
        await asyncio.sleep(1)
        looks = 0

        async def look():
            nonlocal looks
            looks += 1
            if looks == 2:
                await stream.write(bytes(500_000))
            return report(one, connections=True)

        (row,) = (await with_rates(look))["connections"]
        assert looks == 2
        assert row["rate_out"] == pytest.approx(1_000_000, rel=0.01)
        assert row["rate_in"] < 10_000
        stream.reset()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 KB"),
        (123_456, "123 KB"),
        (5e6, "5.0 MB"),
        (7.7e10, "77.0 GB"),
        (2e12, "2.0 TB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(1, "1.0 s"), (90, "2 min"), (7200, "2.0 h"), (864_000, "10.0 d")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_protocols_in_few_words():
    text = protocols_text({"/swarmnode/session/1.0.0": 2, "/ipfs/ping/1.0.0": 1, "": 1})
    assert text == "1 (negotiating), 1 /ipfs/ping/1.0.0, 2 session"


@pytest.mark.virtual
async def test_every_field_is_documented():
    network = MemoryNetwork(random.Random(0))
    host, guest = await crowd(network)
    try:
        body = report_with_rates(host)
    finally:
        await host.aclose()
        await guest.aclose()
    text = DOCS.read_text()
    rows = [body, body["metrics"], body["metrics"]["total"], body["connections"][0], body["ended"][0]]
    rows += [body["dial_failures"][0], next(iter(body["metrics"]["total"]["classes"].values()))]
    missing = {field for row in rows for field in row if f"`{field}`" not in text}
    assert not missing


def test_messages_are_bounded():
    assert GetReport(key=KEY, connections=True).to_header()
    with pytest.raises(ProtocolError):
        GetReport(key=bytes(31), connections=True).to_header()
