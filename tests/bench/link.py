"""Tokens and bulk over an emulated wide-area link, beside raw TCP sockets in the same run. Needs root.

    python tests/bench/link.py [--rate 100 1000] [--rtt 100] [--quick]

Two network namespaces joined by tests/lab. Echoes of a decode step's size: warm, after 2 s of silence, and while bulk
fills the line; once with the bulk on connections of its own, as it is by default, and once all on one connection.
Raw is what TCP itself does: cubic for echoes, and as many BBR sockets for bulk as we had lanes. Rates are payload that
arrived, once every lane is up; the line's rate counts IP packets, of which at best 96.5 % are payload.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import struct
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lab.spaces import Lab, Unavailable  # noqa: E402
from swarmnode.node.allocator import keep_freed_memory  # noqa: E402
from swarmnode.node.host import Host  # noqa: E402
from swarmnode.node.transport import tcp  # noqa: E402
from swarmnode.node.transport.base import Priority  # noqa: E402
from swarmnode.protocol.ids import PrivateKey  # noqa: E402
from swarmnode.protocol.multiaddr import Multiaddr  # noqa: E402

ECHO, SINK, COUNT = "/bench/echo/1.0.0", "/bench/sink/1.0.0", "/bench/count/1.0.0"
SIZES = (2048, 14_000)
"""A small model's token, and the largest that fits TCP's first flight."""
IDLE_S = 2.0
RAMP_S = 6.0
"""Until every lane is open and its windows are wide."""
LOOK_S = 0.25
"""Time between two questions how many lanes there should be."""
CHUNK = 1 << 20
U64 = struct.Struct(">Q")


class Sums:
    """Bytes that arrived, on the serving side."""

    def __init__(self):
        self.total = 0


# -- the serving process --


async def serve(ip):
    """Answers until it is killed; prints its address and the port of the raw echo."""
    sums = Sums()
    loop = asyncio.get_running_loop()
    raw = await loop.create_server(lambda: Raw(sums), sock=_listening(ip))
    async with Host(PrivateKey.generate(), listen=[Multiaddr.parse(f"/ip4/{ip}/tcp/0")]) as host:
        host.handle(ECHO, _echo)
        host.handle(SINK, lambda stream: _sink(stream, sums))
        host.handle(COUNT, lambda stream: _count(stream, sums))
        print(json.dumps([str(host.listen_addrs[0]), raw.sockets[0].getsockname()[1]]), flush=True)
        await asyncio.Event().wait()


def _listening(ip):
    sock = socket.socket()
    tcp.tune(sock)
    sock.bind((ip, 0))
    return sock


class Raw(asyncio.Protocol):
    """Plain TCP: after b"e" an echo, after b"s" a sink, b"c" asks for the count."""

    def __init__(self, sums):
        self.sums = sums
        self.kind = b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if not self.kind:
            self.kind, data = data[:1], data[1:]
            if self.kind == b"s":
                tcp.control_congestion(self.transport.get_extra_info("socket"), tcp.BULK)
        if self.kind == b"e":
            self.transport.write(data)
        elif self.kind == b"s":
            self.sums.total += len(data)
        else:
            self.transport.write(U64.pack(self.sums.total) * len(data))


async def _echo(stream):
    stream.set_priority(Priority.DECODE)
    while True:
        try:
            size = await stream.read_exactly(4)
            payload = await stream.read_exactly(int.from_bytes(size, "big"))
        except asyncio.IncompleteReadError:
            return
        await stream.write(size, payload)


async def _sink(stream, sums):
    while data := await stream.read(CHUNK):
        sums.total += len(data)


async def _count(stream, sums):
    stream.set_priority(Priority.CONTROL)
    while await stream.read(1):
        await stream.write(U64.pack(sums.total))


# -- the measuring process --


class RawLink:
    """Echo, count and bulk over plain sockets."""

    def __init__(self, ip, port):
        self._where = (ip, port)
        self._open = []

    async def connect(self, kind, *, bulk=False):
        sock = socket.socket()
        sock.setblocking(False)
        tcp.tune(sock, bulk=bulk)
        await asyncio.get_running_loop().sock_connect(sock, self._where)
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(kind)
        self._open.append(writer)
        return reader, writer

    async def echo(self, link, payload):
        reader, writer = link
        writer.write(payload)
        await reader.readexactly(len(payload))

    async def count(self, link):
        link[1].write(b"?")
        return U64.unpack(await link[0].readexactly(U64.size))[0]

    async def pump(self, link):
        writer = link[1]
        while True:
            writer.write(bytes(CHUNK))
            await writer.drain()

    def end(self, link):
        link[1].transport.abort()


class OurLink:
    """The same over streams of a host."""

    def __init__(self, host, peer):
        self._host = host
        self._peer = peer

    async def connect(self, kind, *, bulk=False):
        protocol = {b"e": ECHO, b"s": SINK, b"c": COUNT}[kind]
        stream = await self._host.open_stream(self._peer, protocol, bulk=bulk)
        if kind != b"s":
            stream.set_priority(Priority.DECODE)
        return stream

    async def echo(self, stream, payload):
        await stream.write(len(payload).to_bytes(4, "big"), payload)
        await stream.read_exactly(4 + len(payload))

    async def count(self, stream):
        await stream.write(b"?")
        return U64.unpack(await stream.read_exactly(U64.size))[0]

    async def pump(self, stream):
        payload = bytes(CHUNK)
        while True:
            await stream.write(payload)

    def end(self, stream):
        stream.reset()


async def _timed(link, line, payload):
    start = time.perf_counter()
    await link.echo(line, payload)
    return (time.perf_counter() - start) * 1e3


async def idle_figures(link, count):
    """Echo of every size, warm and after silence, p50 in ms."""
    figures = {}
    line = await link.connect(b"e")
    for size in SIZES:
        payload = os.urandom(size)
        for _ in range(4):  # let the window open
            await link.echo(line, payload)
        figures[f"echo {size} B"] = statistics.median([await _timed(link, line, payload) for _ in range(count)])
    for size in SIZES:
        payload = os.urandom(size)
        samples = []
        for _ in range(max(2, count // 5)):
            await asyncio.sleep(IDLE_S)
            samples.append(await _timed(link, line, payload))
        figures[f"echo {size} B after {IDLE_S:g} s"] = statistics.median(samples)
    link.end(line)
    return figures


async def _fill(link, lanes, bulk, lines):
    """Pump through as many lines as `lanes()` says at the time; they are added to `lines`."""
    async with asyncio.TaskGroup() as group:
        while True:
            while len(lines) < lanes():
                lines.append(await link.connect(b"s", bulk=bulk))
                group.create_task(link.pump(lines[-1]))
            await asyncio.sleep(LOOK_S)


async def loaded_figures(link, lanes, seconds, *, bulk=True):
    """Bulk in MB/s, and echoes meanwhile: p50 and worst."""
    echo, counter = await link.connect(b"e"), await link.connect(b"c")
    sinks = []
    figures = {}
    async with asyncio.TaskGroup() as group:
        filling = group.create_task(_fill(link, lanes, bulk, sinks))
        await asyncio.sleep(RAMP_S)
        before, start = await link.count(counter), time.perf_counter()
        for size in SIZES:
            payload, samples, until = os.urandom(size), [], time.perf_counter() + seconds / len(SIZES)
            while time.perf_counter() < until:
                samples.append(await _timed(link, echo, payload))
            figures[f"echo {size} B under bulk"] = statistics.median(samples)
            figures[f"echo {size} B under bulk, worst"] = max(samples)
        arrived = await link.count(counter) - before
        figures["bulk MB/s"] = arrived / (time.perf_counter() - start) / 1e6
        filling.cancel()
    for line in (echo, counter, *sinks):
        link.end(line)
    return figures


async def measure(address, port, what, count, seconds):
    """One stack's figures."""
    target = Multiaddr.parse(address)
    if what == "raw":
        link = RawLink(target.host, port)
        lanes = int(os.environ["LANES"])
        return await idle_figures(link, count) | await loaded_figures(link, lambda: lanes, seconds)
    async with Host(PrivateKey.generate()) as host:
        known = asyncio.Event()
        host.on_identify(lambda _: known.set())
        peer = await host.connect(None, [target])
        await known.wait()
        link = OurLink(host, peer)
        if what != "lanes":
            return await loaded_figures(link, lambda: 1, seconds, bulk=False)
        figures = await idle_figures(link, count)
        figures |= await loaded_figures(link, lambda: host.bulk_lanes(peer), seconds)
        figures["lanes"] = sum(info.bulk for info in host.connections())
        return figures


# -- both --


def _run(main):
    keep_freed_memory()
    with contextlib.suppress(ImportError):
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    return asyncio.run(main)


def rows(rate_mbit, rtt_ms, *, quick=False, repeats=2):
    """{stack: {figure: best of all runs}} on one link: `raw`, `lanes`, `one connection`."""
    count, seconds = (5, 4) if quick else (15, 10)
    python = [sys.executable, "-P", str(Path(__file__).resolve())]
    found = {"lanes": [], "one connection": [], "raw": []}
    with Lab() as lab:
        link = lab.wan(delay_ms=rtt_ms / 2, rate_mbit=rate_mbit)
        server = lab.start(link.b, [*python, "--serve", link.b.address], stdout=-1)
        address, port = json.loads(server.stdout.readline())
        lanes = 1
        for _ in range(1 if quick else repeats):
            for what, runs in found.items():
                command = [*python, "--measure", address, str(port), what, str(count), str(seconds)]
                done = lab.run(link.a, command, env={**os.environ, "LANES": str(lanes)})
                runs.append(json.loads(done.stdout))
                lanes = runs[-1].get("lanes", lanes)
                time.sleep(1)
    return {name: {figure: _best(figure, runs) for figure in runs[0]} for name, runs in found.items()}


def _best(figure, runs):
    return (max if "MB/s" in figure or figure == "lanes" else min)(run[figure] for run in runs)


def table(rate_mbit, rtt_ms, found):
    """The rows as text, each with what it is of the round trip, of the line or of its idle value."""
    ours, one, raw = found["lanes"], found["one connection"], found["raw"]
    title = f"{rate_mbit:g} Mbit/s, {rtt_ms:g} ms, {ours['lanes']} lanes"
    lines = [f"{title:34}{'raw TCP':>10}{'ours':>10}{'one conn.':>11}{'':>4}ours is"]
    for name, value in ours.items():
        if name == "lanes":
            continue
        single = f"{one[name]:11.1f}" if name in one else f"{'':11}"
        lines.append(f"{name:34}{raw[name]:10.1f}{value:10.1f}{single}    {_meaning(name, ours, rate_mbit, rtt_ms)}")
    return "\n".join(lines)


def _meaning(name, ours, rate_mbit, rtt_ms):
    value = ours[name]
    if "MB/s" in name:
        return f"{100 * value / (rate_mbit / 8):.0f} % of the line"
    if "under bulk" in name:
        return f"{value / ours[name.split(' under')[0]]:.2f} of its idle value"
    return f"{value / rtt_ms:.2f} round trips"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, nargs="+", default=[100, 1000], metavar="MBIT")
    parser.add_argument("--rtt", type=float, default=100, metavar="MS")
    parser.add_argument("--quick", action="store_true", help="one short run: does it work at all?")
    parser.add_argument("--serve", metavar="IP", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _run(serve(options.serve))
    elif options.measure:
        address, port, what, count, seconds = options.measure
        print(json.dumps(_run(measure(address, int(port), what, int(count), float(seconds)))))
    else:
        try:
            for rate in options.rate:
                print(table(rate, options.rtt, rows(rate, options.rtt, quick=options.quick)), flush=True)
        except Unavailable as exc:
            print(f"no link to measure here: {exc}")


if __name__ == "__main__":
    main()
