"""Encrypted streams on loopback, two processes, beside js-libp2p and py-libp2p in the same run.

    python tests/bench/transport.py [--quick] [--no-js] [--no-py]

All stacks do the same work over Noise and yamux: echo (p50 of the best run), messages one way with an
acknowledgement at the end (MB/s), and the CPU per MB of the sender and of the receiver. Runs alternate, the best
of them counts: the machine is shared, and only noise makes a run slower. Ratios are the others' figures over
ours, so that above 1 is better for us.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from helpers import js_peer, py_peer  # noqa: E402
from helpers.outside import ECHO, outside_peer  # noqa: E402
from swarmnode.node.allocator import keep_freed_memory  # noqa: E402
from swarmnode.node.host import Host  # noqa: E402
from swarmnode.protocol.ids import PrivateKey  # noqa: E402
from swarmnode.protocol.multiaddr import Multiaddr  # noqa: E402

REPEATS = 5
BUILD = ROOT.parent / "build"
LOOPS = ("uvloop", "asyncio")
ECHOES = ((32, 1000), (16384, 1500), (1 << 20, 20))
BULKS = ((16384, 4000), (1 << 20, 200))
UNITS = {"echo": "p50 ms", "rate": "MB/s", "tx": "sender's CPU µs per MB", "rx": "receiver's CPU µs per MB"}


def run(main, loop):
    """asyncio.run on the loop of that name, as a node process would."""
    keep_freed_memory()
    factory = asyncio.SelectorEventLoop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def say(**value):
    print(json.dumps(value), flush=True)


# -- our peer, with the commands and the lines of the others --


async def answer(stream):
    """The echo protocol's listener: kind 0 comes back, 1 is swallowed, 2 is acknowledged."""
    while True:
        header = await stream.read_exactly(5)
        size = int.from_bytes(header[1:], "big")
        payload = await stream.read_exactly(size)
        if header[0] == 0:
            await stream.write(header, payload)
        elif header[0] == 2:
            await stream.write(bytes(5))


async def listen():
    """Answer until killed."""
    async with Host(PrivateKey.generate(), listen=[Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]) as host:
        host.handle(ECHO, answer)
        say(addrs=[str(host.listen_addrs[0])])
        await asyncio.Event().wait()


async def dial(address, quick):
    """One round of every figure."""
    async with Host(PrivateKey.generate()) as host:
        peer = await host.connect(None, [Multiaddr.parse(address)])
        stream = await host.open_stream(peer, ECHO)
        say(connected=True)
        figures = {}
        for size, count in ECHOES:
            figures[f"echo_{size}_ms"] = await _echo(stream, size, count // (5 if quick else 1))
        for size, count in BULKS:
            figures |= await _bulk(stream, size, count // (5 if quick else 1))
        say(**figures)
        await stream.close()


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


async def _bulk(stream, size, count):
    header, payload = b"\1" + size.to_bytes(4, "big"), os.urandom(size)
    say(mark=size)
    cpu, start = _cpu_s(), time.perf_counter()
    for _ in range(count):
        await stream.write(header, payload)
    await stream.write(b"\2" + bytes(4))
    await stream.read_exactly(5)
    megabytes = size * count / 1e6
    name = f"bulk_{size}"
    figures = {f"{name}_mb": megabytes, f"{name}_mb_s": megabytes / (time.perf_counter() - start)}
    figures[f"{name}_cpu_us_per_mb"] = (_cpu_s() - cpu) * 1e6 / megabytes
    say(mark=size)
    return figures


def _cpu_s():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# -- running them --


def _ours(loop, quick):
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *(["--quick"] if quick else []), "--peer", loop]
    return lambda *arguments: outside_peer((*command, *arguments), cwd=ROOT, env=os.environ)


async def _once(peer):
    """One run of a stack: {(kind, size): figure}."""
    async with peer("listen") as listener:
        address = (await listener.line())["addrs"][0]
        async with peer("dial", address, "bench") as dialer:
            await dialer.line()  # connected
            marks = {}
            while "mark" in (line := await dialer.line()):
                marks.setdefault(line["mark"], []).append(_cpu_of(listener.process.pid))
    found = {("echo", size): line[f"echo_{size}_ms"] for size, _ in ECHOES}
    for size, _ in BULKS:
        before, after = marks[size]
        found["rate", size] = line[f"bulk_{size}_mb_s"]
        found["tx", size] = line[f"bulk_{size}_cpu_us_per_mb"]
        found["rx", size] = (after - before) * 1e6 / line[f"bulk_{size}_mb"]
    return found


def _cpu_of(pid):
    """Seconds of CPU that a process has used: its clock, as the kernel numbers such clocks."""
    return time.clock_gettime((~pid << 3) | 2)


def _best(runs):
    """Per figure the best of all runs: rates up, everything else down."""
    return {key: (max if key[0] == "rate" else min)(run[key] for run in runs) for key in runs[0]}


def rows(*, quick=False, js=True, py=True, repeats=REPEATS):
    """[((kind, size), {stack: value})] for `uvloop`, `asyncio` and, where they can be installed, the others."""
    stacks = {loop: _ours(loop, quick) for loop in LOOPS}
    if js and js_peer.npm():
        folder = js_peer.install(BUILD / "interop_js")
        stacks["js-libp2p"] = lambda *arguments: js_peer.js_peer(folder, *arguments)
    if py and py_peer.can_install():
        python = py_peer.install(BUILD / "interop_py")
        stacks["py-libp2p"] = lambda *arguments: py_peer.py_peer(python, *arguments)
    runs = {name: [] for name in stacks}
    for _ in range(1 if quick else repeats):
        for name, peer in stacks.items():
            runs[name].append(asyncio.run(_once(peer)))
    best = {name: _best(found) for name, found in runs.items()}
    return [(key, {name: best[name][key] for name in best}) for key in best["uvloop"]]


def table(found):
    """The rows as text, with the ratios of the others to uvloop."""
    stacks = list(found[0][1])
    others = [name for name in stacks if name not in LOOPS]
    heads = [*stacks, *(f"to {name}" for name in others)]
    lines = [f"{'loopback, 2 processes':34}" + "".join(f"{head:>14}" for head in heads)]
    for (kind, size), values in found:
        name = f"{_sized(size)} {'echo' if kind == 'echo' else 'messages'}, {UNITS[kind]}"
        cells = "".join(
            f"{values[stack]:14.3f}" if values[stack] < 10 else f"{values[stack]:14.0f}" for stack in stacks
        )
        lines.append(f"{name:34}{cells}" + "".join(f"{_ratio(kind, values, other):13.1f}x" for other in others))
    return "\n".join(lines)


def _ratio(kind, values, other):
    ours, theirs = values["uvloop"], values[other]
    return ours / theirs if kind == "rate" else theirs / ours


def _sized(size):
    return f"{size >> 20} MB" if size >> 20 else f"{size >> 10} KB" if size >> 10 else f"{size} B"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run: does it work at all?")
    parser.add_argument("--no-js", action="store_true", help="leave js-libp2p out")
    parser.add_argument("--no-py", action="store_true", help="leave py-libp2p out")
    parser.add_argument("--peer", nargs="+", metavar=("LOOP", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        loop, what, *rest = options.peer
        run(listen() if what == "listen" else dial(rest[0], options.quick), loop)
    else:
        print(table(rows(quick=options.quick, js=not options.no_js, py=not options.no_py)))


if __name__ == "__main__":
    main()
