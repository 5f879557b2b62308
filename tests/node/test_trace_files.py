"""Traces of real connections as files: they replay, they are bounded, and they hold no payload."""

import asyncio
import json
import logging
import os
import random
import stat

import pytest
from helpers.hosts import hosts, key, memory_host
from swarmnode.node.clock import Clock
from swarmnode.node.transport import trace as trace_module
from swarmnode.node.transport.base import Priority
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.node.transport.trace import MAX_FILES, MAX_STRANGER_FILES, TraceFolder
from swarmnode.protocol.errors import ConfigError
from swarmnode.protocol.replay import replay

ECHO = "/test/echo/1.0.0"
SECRET = b"the prompt of somebody"


async def echo(stream):
    while data := await stream.read(65536):
        await stream.write(data)


async def rude(stream):
    await stream.read(10)
    stream.reset()


async def one_stream(host, peer, number):
    """Each stream another fate."""
    stream = await host.open_stream(peer, ECHO if number % 4 else "/test/rude")
    stream.set_priority(Priority(number % 3))
    size = (10, 5_000, 300_000)[number % 3]
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(stream.write(SECRET, bytes(size)))
            if number % 4:
                group.create_task(stream.read_exactly(size))
    except* OSError:
        pass
    if number % 5 == 0:
        stream.reset()
    else:
        await stream.close()


async def bulk(host, peer):
    """Enough for windows to grow."""
    stream = await host.open_stream(peer, ECHO)
    size = 3 << 20
    async with asyncio.TaskGroup() as group:
        group.create_task(stream.write(bytes(size)))
        group.create_task(stream.read_exactly(size))
    await stream.close()


async def live(one, other):
    """A busy connection between two hosts, from dial to good-bye."""
    other.handle(ECHO, echo)
    other.handle("/test/rude", rude)
    await one.connect(other.peer_id)
    for wire in one._wires:
        wire.note_rtt(5.0)  # slow enough for windows to grow
    for wire in other._wires:
        wire.note_rtt(5.0)
    for start in range(0, 40, 20):
        async with asyncio.TaskGroup() as group:
            for number in range(start, start + 20):
                group.create_task(one_stream(one, other.peer_id, number))
    await bulk(one, other.peer_id)
    metrics = one.metrics()
    assert metrics.total.windows_grown or other.metrics().total.windows_grown
    await one.disconnect(other.peer_id)
    await asyncio.sleep(0.1)


def traces(folder, family="trace"):
    return sorted(folder.glob(f"{family}-*.jsonl"))


def names(path):
    return [json.loads(line).get("name") for line in path.read_text().splitlines()]


async def check_replays(folder):
    assert len(traces(folder)) == 2
    sides = set()
    for path in traces(folder):
        text = path.read_text()
        found = replay(text.splitlines())
        assert found.departure is None, f"{path.name}: {found.departure}"
        assert found.complete
        assert found.streams >= 42
        assert found.frames_in > 100
        sides.add(found.client)
        assert SECRET.decode() not in text
        seen = set(names(path))
        assert {"connectivity:connection_started", "security:peer_authenticated", "yamux:stream_reset"} <= seen
        assert {"connectivity:phase_changed", "yamux:stream_protocol", "connectivity:connection_closed"} <= seen
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sides == {True, False}


@pytest.mark.virtual
async def test_a_connection_in_memory_replays(tmp_path):
    async with hosts("memory", 2, trace_dir=tmp_path) as (one, other):
        await live(one, other)
    await check_replays(tmp_path)


@pytest.mark.loops
@pytest.mark.usefixtures("leakproof")
async def test_a_connection_over_tcp_replays(tmp_path):
    async with hosts("tcp", 2, trace_dir=tmp_path) as (one, other):
        await live(one, other)
    await check_replays(tmp_path)


@pytest.mark.virtual
async def test_without_a_folder_nothing_is_recorded():
    async with hosts("memory", 2) as (one, other):
        await one.connect(other.peer_id)
        (wire,) = one._wires
        assert wire.life.tap is None
        assert type(wire.session).__name__ == "Session"


class Ticking(Clock):
    def now(self):
        return 1.0

    def wall(self):
        return 2.0


@pytest.fixture
async def folder(tmp_path):
    made = TraceFolder(tmp_path / "deep" / "traces", Ticking(), key(1).peer_id)
    yield made
    await made.aclose()


async def finished(folder):
    await folder.aclose()
    return sorted(folder._folder.iterdir())


async def test_files_are_few_and_strangers_have_their_own(folder):
    for number in range(MAX_FILES + MAX_STRANGER_FILES + 10):
        trace = folder.begin("/memory/1", outbound=False)
        if number % 2 or number >= 2 * MAX_STRANGER_FILES:
            trace.authenticated(str(key(2).peer_id))
        trace.close()
        trace.close()
    left = await finished(folder)
    assert len([p for p in left if p.name.startswith("trace-")]) == MAX_FILES
    assert len([p for p in left if p.name.startswith("stranger-")]) == MAX_STRANGER_FILES
    assert stat.S_IMODE(folder._folder.stat().st_mode) == 0o700
    for number in range(MAX_STRANGER_FILES + 1):
        folder.begin(f"/memory/{number}", outbound=False).close()
    again = await finished(folder)
    assert len(again) == MAX_FILES + MAX_STRANGER_FILES
    assert [p for p in left if p.name.startswith("trace-")] == [p for p in again if p.name.startswith("trace-")]


async def test_a_file_ends_at_its_size(folder, monkeypatch):
    monkeypatch.setattr(trace_module, "MAX_FILE_BYTES", 200_000)
    trace = folder.begin("/memory/1", outbound=True)
    for number in range(10_000):
        trace.emit("test:event", {"number": number})
    trace.close()
    (path,) = await finished(folder)
    assert 190_000 < path.stat().st_size < 200_300
    assert names(path)[-1] == "trace:truncated"


async def test_a_disk_that_does_not_follow_ends_traces(folder, monkeypatch):
    monkeypatch.setattr(trace_module, "MAX_PENDING_BYTES", 100_000)
    trace = folder.begin("/memory/1", outbound=True)
    for number in range(10_000):
        trace.emit("test:event", {"number": number})
    assert folder._pending <= 100_000
    trace.close()
    (path,) = await finished(folder)
    assert path.stat().st_size < 100_000


async def test_a_disk_that_fails_is_told_once(folder, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace_module.os, "open", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            folder.begin("/memory/1", outbound=True).close()
        await folder.aclose()
        await asyncio.sleep(0)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert not folder.write(folder._folder / "x", "y", new=True)


async def test_an_open_trace_that_was_removed_is_not_made_again_without_its_beginning(folder):
    trace = folder.begin("/memory/1", outbound=True)
    trace._flush()
    await folder.aclose()
    for path in folder._folder.iterdir():
        path.unlink()
    trace.close()
    assert await finished(folder) == []


def test_a_folder_that_cannot_be_is_a_config_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="name another folder"):
        TraceFolder(tmp_path / "file" / "x", Clock(), key(1).peer_id)


@pytest.mark.virtual
async def test_strangers_leave_a_trace_of_how_far_they_came(tmp_path):
    network = MemoryNetwork(random.Random(0))
    async with memory_host(network, 1, trace_dir=tmp_path) as host:

        class Http(asyncio.BufferedProtocol):
            def connection_made(self, link):
                link.write(b"GET /secret HTTP/1.0\r\n\r\n")

            def get_buffer(self, sizehint):
                return memoryview(bytearray(100))

            def buffer_updated(self, nbytes):
                pass

        await network.transport().dial(host.listen_addrs[0].without_peer(), lambda _: Http())
        await asyncio.sleep(20)
    (path,) = traces(tmp_path, "stranger")
    assert names(path)[-2] == "connectivity:connection_closed"
    assert "secret" not in path.read_text()
    assert os.listdir(tmp_path) == [path.name]
