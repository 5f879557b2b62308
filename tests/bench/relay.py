"""What a relay costs, and what floods take from honest traffic: python tests/bench/relay.py

One process per party: a relay, a hidden peer that echoes, an honest one that measures, and floods. All on loopback; the
floods come from other addresses than the honest peer, and are counted by address.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from swarmnode.node.commands import run
from swarmnode.node.host import Host
from swarmnode.node.limits import HostLimits
from swarmnode.node.relay.server import Relay
from swarmnode.node.transport.tcp import TcpTransport
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.relay_ledger import RelayLimits

ECHO, SINK = "/bench/echo/1.0.0", "/bench/sink/1.0.0"
PIECE = 16 * 1024
LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
FLOODS = 4
TOKENS_S = 30
"""Echoes a second of the honest peer: 1 MB/s, less than its part of the relay's 16."""


def host(number: int, address: str = "127.0.0.1", **options) -> Host:
    """A host whose connections come from an address of its own."""

    def bound(*args):
        sock = socket.socket(*args)
        if not options.get("listen"):
            sock.bind((address, 0))
        return sock

    return Host(PrivateKey.from_seed(number.to_bytes(32, "big")), transports=[TcpTransport(bound)], **options)


async def serve_relay() -> int:
    async with host(1, listen=[LOOPBACK], limits=HostLimits(limit_loopback=True)) as me, Relay(me, RelayLimits()):
        print(me.listen_addrs[0], flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    return 0


async def echo(stream):
    while data := await stream.read(1 << 20):
        await stream.write(data)


async def swallow(stream):
    while await stream.read(1 << 20):
        pass


async def serve_peer(relay: Multiaddr, number: int) -> int:
    async with host(number, f"127.0.2.{number}", listen=[LOOPBACK]) as me:
        me.handle(ECHO, echo)
        me.handle(SINK, swallow)
        place = await me.circuits.reserve(relay.peer_id, [relay.without_peer()])
        print(json.dumps([str(me.listen_addrs[0]), str(place.addrs[0].with_peer(me.peer_id))]), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    return 0


async def flood(target: Multiaddr, number: int) -> int:
    async with host(number, f"127.0.3.{number}") as me:
        await me.connect(None, [target])
        streams = [await me.open_stream(target.peer_id, SINK) for _ in range(4)]
        print("flooding", flush=True)

        async def forever(stream):
            while True:
                await stream.write(bytes(1 << 20))

        with contextlib.suppress(OSError):
            async with asyncio.TaskGroup() as group:
                for stream in streams:
                    group.create_task(forever(stream))
    return 0


async def echoes(stream, seconds: float, pace_s: float = 0.0) -> list[float]:
    """How long 16 KB took there and back, one after another, or each at its time when there is a pace."""
    times: list[float] = []
    began = due = time.perf_counter()
    while (start := time.perf_counter()) < began + seconds:
        await stream.write(bytes(PIECE))
        await stream.read_exactly(PIECE)
        times.append(time.perf_counter() - start)
        if pace_s:
            due += pace_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return times


async def measure(target: Multiaddr, seconds: float, bulk: bool) -> dict[str, float]:
    """Echoes as fast as they go, then as many as a generation has tokens, then MB/s."""
    async with host(99, "127.0.4.1") as me:
        await me.connect(None, [target])
        stream = await me.open_stream(target.peer_id, ECHO)
        times = await echoes(stream, seconds)
        found = {"echo_ms": statistics.median(times) * 1e3, "echoes_s": len(times) / seconds}
        paced = await echoes(stream, 2 * seconds, 1 / TOKENS_S)
        found |= {"paced_ms": statistics.median(paced) * 1e3, "paced_s": len(paced) / (2 * seconds)}
        if bulk:
            data, start = bytes(1 << 20), time.perf_counter()
            async with asyncio.TaskGroup() as group:
                group.create_task(stream.write(*[data] * 32))
                await stream.read_exactly(32 << 20)
            found["mb_s"] = (32 << 20) / 1e6 / (time.perf_counter() - start)
        return found


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def compare(seconds: float) -> None:
    """Print one table."""
    with contextlib.ExitStack() as stack:

        def party(*arguments: str) -> str:
            process = start(*arguments)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process.stdout.readline()

        relay = party("relay").strip()
        direct, relayed = json.loads(party("peer", relay, "2"))
        sink = json.loads(party("peer", relay, "3"))[1]
        rows = {"direct": asyncio.run(measure(Multiaddr.parse(direct), seconds, True))}
        rows["relayed"] = asyncio.run(measure(Multiaddr.parse(relayed), seconds, True))
        for number in range(FLOODS):
            party("flood", sink, str(10 + number))
        rows[f"relayed, {FLOODS} floods"] = asyncio.run(measure(Multiaddr.parse(relayed), seconds, False))
    print(
        f"| path | 16 KB echo, p50 ms | echoes/s | {TOKENS_S}/s wanted: got | p50 ms | echo of 32 MB, MB/s each way |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        bulk = f"{row['mb_s']:.1f}" if "mb_s" in row else ""
        paced = f"{row['paced_s']:.1f} | {row['paced_ms']:.2f}"
        print(f"| {name} | {row['echo_ms']:.3f} | {row['echoes_s']:.0f} | {paced} | {bulk} |")


def main() -> None:
    """Without arguments: the comparison; with: one of its parties."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("party", nargs="*")
    options = parser.parse_args()
    match options.party:
        case []:
            compare(options.seconds)
        case ["relay"]:
            run(serve_relay())
        case ["peer", relay, number]:
            run(serve_peer(Multiaddr.parse(relay), int(number)))
        case ["flood", target, number]:
            run(flood(Multiaddr.parse(target), int(number)))


if __name__ == "__main__":
    main()
