"""Encrypted streams on loopback, two processes, beside js-libp2p in the same run.

    python tests/bench/transport.py [--js] [--quick]

Both stacks do the same work over Noise and yamux: 16 KB echo (p50 of the best run), 1 MB messages one way
with an acknowledgement at the end (MB/s), and the sender's CPU per MB. Runs alternate, the best of them
counts: the machine is shared, and only noise makes a run slower. Ratios are ours over theirs.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from helpers import js_peer  # noqa: E402
from helpers.echo import ECHO, answer_echo  # noqa: E402
from swarmnode.node.allocator import keep_freed_memory  # noqa: E402
from swarmnode.node.host import Host  # noqa: E402
from swarmnode.protocol.ids import PrivateKey  # noqa: E402
from swarmnode.protocol.multiaddr import Multiaddr  # noqa: E402

REPEATS = 5
LOOPS = ("uvloop", "asyncio")


def run(main, loop):
    """asyncio.run on the loop of that name, as a node process would."""
    keep_freed_memory()
    factory = asyncio.SelectorEventLoop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


async def serve():
    """A listening process: prints its address and answers until it is killed."""
    async with Host(PrivateKey.generate(), listen=[Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]) as host:
        host.handle(ECHO, answer_echo)
        print(host.listen_addrs[0], flush=True)
        await asyncio.Event().wait()


async def measure(address, quick):
    """A dialing process: one round of every figure."""
    figures = {}
    async with Host(PrivateKey.generate()) as host:
        peer = await host.connect(None, [Multiaddr.parse(address)])
        stream = await host.open_stream(peer, ECHO)
        for size, count in ((32, 300), (16384, 500), (1 << 20, 20)):
            figures[f"echo_{size}_ms"] = await _echo(stream, size, count // (5 if quick else 1))
        for size, count in ((16384, 4000), (1 << 20, 200)):
            await _bulk(stream, size, count // (5 if quick else 1), figures)
        await stream.close()
    return figures


async def _echo(stream, size, count):
    header, payload = b"\0" + size.to_bytes(4, "big"), os.urandom(size)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await stream.write(header, payload)
        await stream.read_exactly(5)
        await stream.read_exactly(size)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


async def _bulk(stream, size, count, figures):
    header, payload = b"\1" + size.to_bytes(4, "big"), os.urandom(size)
    cpu, start = _cpu_s(), time.perf_counter()
    for _ in range(count):
        await stream.write(header, payload)
    await stream.write(b"\2" + bytes(4))
    await stream.read_exactly(5)
    megabytes = size * count / 1e6
    figures[f"bulk_{size}_mb_s"] = megabytes / (time.perf_counter() - start)
    figures[f"bulk_{size}_cpu_us_per_mb"] = (_cpu_s() - cpu) * 1e6 / megabytes


def _cpu_s():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _ours(loop, quick):
    command = [sys.executable, "-P", str(Path(__file__).resolve())]
    listener = subprocess.Popen([*command, "--serve", loop], stdout=subprocess.PIPE, text=True)
    try:
        address = listener.stdout.readline().strip()
        dialer = [*command, "--measure", loop, address, *(["--quick"] if quick else [])]
        return json.loads(subprocess.run(dialer, capture_output=True, text=True, check=True).stdout)
    finally:
        listener.kill()
        listener.communicate()


async def _js(folder):
    async with js_peer.js_peer(folder, "listen") as listener:
        address = (await listener.line())["addrs"][0]
        async with js_peer.js_peer(folder, "dial", address, "bench") as dialer:
            await dialer.line()
            return await dialer.line()


def _best(runs):
    """Per figure the best of all runs: rates up, everything else down."""
    return {name: (max if name.endswith("mb_s") else min)(r[name] for r in runs) for name in runs[0]}


def rows(*, quick=False, js=True, repeats=REPEATS):
    """[(figure, {stack: value})]: `uvloop`, `asyncio` and, where npm is, `js-libp2p`."""
    stacks = {loop: lambda loop=loop: _ours(loop, quick) for loop in LOOPS}
    if js and js_peer.npm():
        folder = js_peer.install()
        stacks["js-libp2p"] = lambda: asyncio.run(_js(folder))
    runs = {name: [] for name in stacks}
    for _ in range(1 if quick else repeats):
        for name, once in stacks.items():
            runs[name].append(once())
    best = {name: _best(found) for name, found in runs.items()}
    return [(figure, {name: best[name][figure] for name in best}) for figure in best["uvloop"]]


def table(found):
    """The rows as text, with our ratio to js-libp2p: above 1 is better for us."""
    stacks = list(found[0][1])
    lines = [f"{'loopback, 2 processes':28}" + "".join(f"{name:>12}" for name in stacks) + f"{'uvloop/js':>12}"]
    for figure, values in found:
        cells = "".join(f"{values[name]:12.3f}" if values[name] < 10 else f"{values[name]:12.0f}" for name in stacks)
        ratio = ""
        if "js-libp2p" in values:
            up = figure.endswith("mb_s")
            ours, theirs = values["uvloop"], values["js-libp2p"]
            ratio = f"{(ours / theirs if up else theirs / ours):11.1f}x"
        lines.append(f"{figure:28}{cells}{ratio}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run: does it work at all?")
    parser.add_argument("--no-js", action="store_true", help="leave js-libp2p out")
    parser.add_argument("--serve", metavar="LOOP", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("LOOP", "ADDR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        run(serve(), options.serve)
    elif options.measure:
        print(json.dumps(run(measure(options.measure[1], options.quick), options.measure[0])))
    else:
        print(table(rows(quick=options.quick, js=not options.no_js)))


if __name__ == "__main__":
    main()
