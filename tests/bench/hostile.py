"""What an honest peer feels while a node is attacked: latency idle, under a flood, under slow-loris, under junk.

    python tests/bench/hostile.py [--loop uvloop|asyncio] [--seconds S]

Three processes on loopback: the node, the attackers, and the honest peer, which measures. `echo` is a round trip of 32
bytes on its connection, `connect` a new connection and an echo, with the tries that were refused. Memory is the node's
peak over what it had before the attack. Quiet and attacked runs alternate; ratios are to the quiet runs.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from helpers.attackers import PING, attack_tcp, data, opening, window  # noqa: E402
from helpers.besieged import ECHO, MIB, besieged, mutes, run  # noqa: E402
from helpers.hosts import key, tcp_host  # noqa: E402
from swarmnode.protocol.connection import Connection  # noqa: E402
from swarmnode.protocol.errors import PeerUnreachable  # noqa: E402
from swarmnode.protocol.noise import StaticKey  # noqa: E402
from swarmnode.protocol.yamux_frames import INITIAL_WINDOW, Flag  # noqa: E402

FLOOD = 1000
BOTNET = [f"127.0.{subnet}.{number}" for number in range(1, 251) for subnet in (1, 2, 3, 4)]
"""Loopback addresses that the node is told to take for strangers': four subnets of 250."""
SLOW = 256
BUSY = 8


async def flood(port):
    """1,000 connections that say nothing; those that were cut come back each second."""
    there = []
    while True:
        there = [mute for mute in there if not mute.lost]
        there += await mutes(port, FLOOD - len(there), sources=BOTNET)
        for mute in there:
            mute.link.resume_reading()
        await asyncio.sleep(1)


async def slow(port):
    """256 handshakes at one byte a second."""
    words = Connection(StaticKey.create(key(8)), initiator=True).pull()
    there = []
    while True:
        there = [mute for mute in there if not mute.lost]
        there += await mutes(port, SLOW - len(there), words, sources=BOTNET)
        for mute in there:
            mute.link.resume_reading()
            mute.dribble()
        await asyncio.sleep(1)


async def pings(port):
    """Eight peers with a proven identity that ping as fast as they may, again and again."""
    await _each(port, lambda _: PING * 1000)


async def resets(port):
    """Eight that open streams and reset them at once."""
    await _each(
        port,
        lambda turn: b"".join(
            window(2 * n + 1, 0, Flag.SYN) + window(2 * n + 1, 0, Flag.RST) for n in range(500 * turn, 500 * turn + 500)
        ),
    )


async def unread(port):
    """Eight that ask for echoes and read none."""
    there = [await attack_tcp(port, 10 + number, source=BOTNET[4 * number]) for number in range(BUSY)]
    for peer in there:
        for number in range(64):
            peer.send(opening(2 * number + 1, ECHO))
            peer.send(data(2 * number + 1, bytes(INITIAL_WINDOW // 2)))
    await asyncio.Event().wait()


async def _each(port, frames):
    async def one(number):
        while True:
            with contextlib.suppress(OSError):
                peer = await attack_tcp(port, number, source=BOTNET[4 * number])
                turn = 0
                while not peer.is_cut:
                    peer.send(frames(turn))
                    turn += 1
                    await asyncio.sleep(0)
            await asyncio.sleep(0.1)

    await asyncio.gather(*(one(10 + number) for number in range(BUSY)))


ATTACKS = {attack.__name__: attack for attack in (flood, slow, pings, resets, unread)}


async def measure(node, stream, new, seconds):
    """(echo times, connect times, refused tries) of an honest peer for that long."""
    echoes, connects, refused = [], [], 0
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        await stream.write(bytes(32))
        await stream.read_exactly(32)
        echoes.append(time.perf_counter() - start)
        await asyncio.sleep(0.002)
        if len(echoes) % 20:
            continue
        start = time.perf_counter()
        while True:
            with contextlib.suppress(PeerUnreachable, OSError):
                await node.echo(new)
                break
            refused += 1
            await asyncio.sleep(0.02)
        connects.append(time.perf_counter() - start)
        await new.disconnect(node.address.peer_id)
    return echoes, connects, refused


async def scenario(name, loop, seconds):
    async with (
        besieged(loop, limit_loopback=True, accepts_per_ip=1000.0) as node,
        tcp_host(1) as steady,
        tcp_host(2) as new,
    ):
        stream = await steady.open_stream(node.address.peer_id, ECHO, addrs=[node.address])
        quiet = await measure(node, stream, new, seconds)
        base = node.memory()
        command = [sys.executable, "-P", __file__, "--attack", name, "--port", str(node.port)]
        attackers = await asyncio.create_subprocess_exec(*command)
        try:
            await asyncio.sleep(1)
            attacked = await measure(node, stream, new, seconds)
            peak = node.memory("VmHWM") - base
        finally:
            attackers.kill()
            await attackers.wait()
        reasons = (await node.status(steady))["refused"]
        await stream.close()
    return quiet, attacked, peak, reasons


def row(name, result):
    (quiet_echo, quiet_connect, _), (echo, connect, tries), peak, reasons = result
    cells = [
        name,
        *(f"{1000 * statistics.median(times):.2f}" for times in (quiet_echo, echo)),
        f"{statistics.median(echo) / statistics.median(quiet_echo):.2f}",
        f"{1000 * _p99(quiet_echo):.2f}",
        f"{1000 * _p99(echo):.2f}",
        *(f"{1000 * statistics.median(times):.1f}" if times else "-" for times in (quiet_connect, connect)),
        str(tries),
        f"{peak / MIB:.0f}",
        ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())),
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def _p99(times):
    return sorted(times)[int(0.99 * len(times))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--only", choices=ATTACKS)
    parser.add_argument("--attack", choices=ATTACKS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        run(ATTACKS[options.attack](options.port), "uvloop")
    heads = (
        "attack, echo ms quiet, attacked, ratio, p99 quiet, attacked, connect ms quiet, attacked, refused tries, MiB"
    )
    heads = [*heads.split(", "), "refused by reason"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for name in [options.only] if options.only else ATTACKS:
        row(name, run(scenario(name, options.loop, options.seconds), options.loop))


if __name__ == "__main__":
    main()
