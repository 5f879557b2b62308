"""py-libp2p as an interop peer, in a venv of its own. One JSON object per line on stdout, as of js/node.mjs.

    python peer.py listen            listens on a free loopback port: {ready, id, addrs}
    python peer.py dial ADDR WHAT    WHAT: ping | echo BYTES | identify | streams COUNT | bench

Echo protocol: u8 kind, u32 length, payload; kind 0 comes back, kind 1 is swallowed, kind 2 is answered by 5
zeros. Only Noise and yamux are offered: py-libp2p's own defaults include plaintext.
"""

import json
import logging
import os
import resource
import statistics
import sys
import time

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.host.ping import ID as PING
from libp2p.host.ping import perform_ping_roundtrip
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.io.exceptions import IncompleteReadError
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

ECHO = "/swarmnode/test-echo/1.0.0"
HEADER = 5


def say(**value):
    print(json.dumps(value), flush=True)


def make_host():
    keys = create_new_key_pair()
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=keys, sec_opt={NOISE: noise}, muxer_opt={YAMUX: Yamux})


async def read_exactly(stream, size):
    """py-libp2p's own helper gives up after a hundred pieces. Raises StreamEOF when the peer has ended."""
    data = bytearray()
    while len(data) < size:
        piece = await stream.read(size - len(data))
        if not piece:
            raise StreamEOF
        data += piece
    return bytes(data)


async def answer(stream):
    """The echo protocol's listener."""
    try:
        while True:
            header = await read_exactly(stream, HEADER)
            payload = await read_exactly(stream, int.from_bytes(header[1:], "big"))
            if header[0] == 0:
                await stream.write(header + payload)
            elif header[0] == 2:
                await stream.write(bytes(HEADER))
    except (StreamError, MuxedStreamError, IncompleteReadError):
        await stream.close()


def message(kind, payload):
    return bytes([kind]) + len(payload).to_bytes(4, "big") + payload


async def echo(stream, payload):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.write, message(0, payload))
        await read_exactly(stream, HEADER)
        return await read_exactly(stream, len(payload))


async def one_echo(host, peer, size, results):
    stream = await host.new_stream(peer, [ECHO])
    payload = os.urandom(size)
    results.append(await echo(stream, payload) == payload)
    await stream.close()


async def identify(host, peer):
    stream = await host.new_stream(peer, [IDENTIFY])
    data = b""
    while True:
        try:
            piece = await stream.read(65536)
        except StreamEOF:
            break
        if not piece:
            break
        data += piece
    await stream.close()
    found = parse_identify_response(data)
    say(
        id=str(peer),
        agent=found.agent_version,
        protocols=list(found.protocols),
        addrs=[str(Multiaddr(raw)) for raw in found.listen_addrs],
        observed=str(Multiaddr(found.observed_addr)) if found.observed_addr else None,
    )


async def ping(host, peer):
    stream = await host.new_stream(peer, [PING])
    say(ping=[await perform_ping_roundtrip(stream) for _ in range(3)])
    await stream.close()


async def bench(host, peer):
    stream = await host.new_stream(peer, [ECHO])
    out = {}
    for size, count in ((32, 300), (16384, 500), (1 << 20, 20)):
        data = message(0, os.urandom(size))
        times = []
        for _ in range(count):
            start = time.perf_counter()
            await stream.write(data)
            await read_exactly(stream, HEADER + size)
            times.append(time.perf_counter() - start)
        out[f"echo_{size}_ms"] = statistics.median(times) * 1e3
    for size, count in ((16384, 1000), (1 << 20, 50)):
        data = message(1, os.urandom(size))
        cpu, start = cpu_s(), time.perf_counter()
        for _ in range(count):
            await stream.write(data)
        await stream.write(message(2, b""))
        await read_exactly(stream, HEADER)
        megabytes = size * count / 1e6
        out[f"bulk_{size}_mb_s"] = megabytes / (time.perf_counter() - start)
        out[f"bulk_{size}_cpu_us_per_mb"] = (cpu_s() - cpu) * 1e6 / megabytes
    say(**out)


def cpu_s():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def listen():
    host = make_host()
    host.set_stream_handler(ECHO, answer)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        say(ready=True, id=str(host.get_id()), addrs=[str(address) for address in host.get_addrs()])
        await trio.sleep_forever()


async def dial(address, what, *arguments):
    host = make_host()
    async with host.run([]):
        info = info_from_p2p_addr(Multiaddr(address))
        await host.connect(info)
        say(connected=True, encryption=NOISE, muxer=YAMUX)  # the only ones offered
        if what == "ping":
            await ping(host, info.peer_id)
        elif what == "identify":
            await identify(host, info.peer_id)
        elif what == "bench":
            await bench(host, info.peer_id)
        elif what in ("echo", "streams"):
            results = []
            async with trio.open_nursery() as nursery:
                for _ in range(1 if what == "echo" else int(arguments[0])):
                    size = int(arguments[0]) if what == "echo" else 1000
                    nursery.start_soon(one_echo, host, info.peer_id, size, results)
            say(**{what: all(results)})


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    trio.run(*((listen,) if sys.argv[1] == "listen" else (dial, *sys.argv[2:])))
