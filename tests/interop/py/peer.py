"""py-libp2p as an interop peer, in a venv of its own. Tasks, protocols and output as of js/node.mjs.

    python peer.py listen [OPTION...]             a free loopback port: {ready, id, addrs}
    python peer.py dial ADDR [TASK...] [OPTION...]  {connected, encryption, muxer}, then the tasks'

Options: --key Ed25519|RSA|secp256k1, --host IP, --hurry MS (keepalives this often). Only Noise and yamux are
offered: py-libp2p's own defaults include plaintext.
"""

import argparse
import hashlib
import json
import logging
import os
import resource
import statistics
import sys
import time

import trio
from libp2p import new_host
from libp2p.crypto import ed25519, rsa, secp256k1
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.host.ping import ID as PING
from libp2p.host.ping import perform_ping_roundtrip
from libp2p.identity.identify.identify import ID as IDENTIFY
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.identity.identify_push.identify_push import push_identify_to_peer
from libp2p.io.exceptions import IncompleteReadError
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.peer.peerstore import PeerStoreError
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux import yamux
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

ECHO = "/swarmnode/test-echo/1.0.0"
DIGEST = "/swarmnode/test-digest/1.0.0"
GOODBYE = "/swarmnode/test-goodbye/1.0.0"
HOP = "/libp2p/circuit/relay/0.2.0/hop"
HEADER = 5
KEYS = {
    "Ed25519": ed25519.create_new_key_pair,
    "RSA": rsa.create_new_key_pair,
    "secp256k1": secp256k1.create_new_key_pair,
}


def say(**value):
    print(json.dumps(value), flush=True)


def make_host(key):
    keys = KEYS[key]()
    noise = NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)
    host = new_host(key_pair=keys, sec_opt={NOISE: noise}, muxer_opt={YAMUX: Yamux})
    host.set_stream_handler(ECHO, answer)
    host.set_stream_handler(DIGEST, answer_digest)
    host.set_stream_handler(GOODBYE, answer_goodbye)
    return host


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


async def read_all(stream):
    """Everything up to the peer's end of its direction."""
    data = bytearray()
    while True:
        try:
            piece = await stream.read(65536)
        except StreamEOF:
            piece = b""
        if not piece:
            return bytes(data)
        data += piece


async def answer_digest(stream):
    await stream.write(hashlib.sha256(await read_all(stream)).digest())
    await stream.close()


async def answer_goodbye(stream):
    await stream.write(b"bye")
    await stream.close_write()
    say(received=len(await read_all(stream)))


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


async def digest(host, peer, size):
    stream = await host.new_stream(peer, [DIGEST])
    payload = os.urandom(size)
    await stream.write(payload)
    await stream.close_write()
    return await read_all(stream) == hashlib.sha256(payload).digest()


async def goodbye(host, peer, size):
    stream = await host.new_stream(peer, [GOODBYE])
    heard = (await read_all(stream)).decode()
    await stream.write(os.urandom(size))
    await stream.close()
    return heard


async def identify(host, peer):
    stream = await host.new_stream(peer, [IDENTIFY])
    found = parse_identify_response(await read_all(stream))
    await stream.close()
    return {
        "id": str(peer),
        "agent": found.agent_version,
        "protocols": list(found.protocols),
        "addrs": [str(Multiaddr(raw)) for raw in found.listen_addrs],
        "observed": str(Multiaddr(found.observed_addr)) if found.observed_addr else None,
    }


async def eventually(look):
    while not (found := look()):  # noqa: ASYNC110 - py-libp2p tells of nothing
        await trio.sleep(0.005)
    return found


async def book(host, peer):
    """What its peer store has; the certified addresses as soon as there are some."""
    envelope = await eventually(lambda: host.get_peerstore().get_peer_record(peer))
    return {
        "certified": [str(address) for address in envelope.record().addrs],
        "protocols": protocols_of(host, peer),
    }


def protocols_of(host, peer):
    """What identify said; nothing before it."""
    try:
        return list(host.get_peerstore().get_protocols(peer))
    except PeerStoreError:
        return []


async def knows(host, peer, protocol):
    await eventually(lambda: protocol in protocols_of(host, peer))


async def push(host, peer, protocol):
    host.set_stream_handler(protocol, answer)
    if not await push_identify_to_peer(host, peer):
        raise RuntimeError("the push failed")


async def ping(host, peer):
    stream = await host.new_stream(peer, [PING])
    times = [await perform_ping_roundtrip(stream) for _ in range(3)]
    await stream.close()
    return times


async def reserve(host, relay):
    """Ask a relay for a place with its own client; until when, and whether there is a voucher."""
    from libp2p.relay.circuit_v2.config import RelayConfig
    from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
    from libp2p.relay.circuit_v2.transport import CircuitV2Transport

    transport = CircuitV2Transport(host, CircuitV2Protocol(host, allow_hop=False), RelayConfig())
    stream = await host.new_stream(relay, [HOP])
    ok = await transport._make_reservation(stream, relay)
    await stream.close()
    proof = transport._reservation_proofs.get(relay)
    return {"ok": ok, "expires": transport._reservations.get(relay), "voucher": proof.voucher.hex() if proof else ""}


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
        say(mark=size)  # whoever runs us notes the listener's CPU time here and at the next mark
        cpu, start = cpu_s(), time.perf_counter()
        for _ in range(count):
            await stream.write(data)
        await stream.write(message(2, b""))
        await read_exactly(stream, HEADER)
        megabytes = size * count / 1e6
        out[f"bulk_{size}_mb_s"] = megabytes / (time.perf_counter() - start)
        out[f"bulk_{size}_cpu_us_per_mb"] = (cpu_s() - cpu) * 1e6 / megabytes
        out[f"bulk_{size}_mb"] = megabytes
        say(mark=size)
    return out


def cpu_s():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def many(host, peer, count, size):
    results = []
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one_echo, host, peer, size, results)
    return len(results) == count and all(results)


async def perform(host, task):
    what, _, argument = task.partition(":")
    if what == "connect":
        await host.connect(info_from_p2p_addr(Multiaddr(argument)))
        say(connected=argument)
        return
    peer = (await eventually(host.get_connected_peers))[-1]
    match what:
        case "ping":
            say(ping=await ping(host, peer))
        case "identify":
            say(**await identify(host, peer))
        case "book":
            say(**await book(host, peer))
        case "echo":
            say(echo=await many(host, peer, 1, int(argument)))
        case "streams":
            say(streams=await many(host, peer, int(argument), 1000))
        case "digest":
            say(digest=await digest(host, peer, int(argument)))
        case "goodbye":
            say(goodbye=await goodbye(host, peer, int(argument)))
        case "push":
            await push(host, peer, argument)
            say(pushing=argument)
        case "knows":
            await knows(host, peer, argument)
            say(knows=argument)
        case "reserve":
            say(reserve=await reserve(host, peer))
        case "bench":
            say(**await bench(host, peer))
        case _:
            raise ValueError(f"no such task: {task}")


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("listen", "dial"))
    parser.add_argument("words", nargs="*")
    parser.add_argument("--key", choices=sorted(KEYS), default="Ed25519")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--hurry", type=float)
    return parser.parse_args()


async def main():
    wanted = arguments()
    if wanted.hurry:
        yamux.RTT_MEASURE_INTERVAL = wanted.hurry / 1000
    host = make_host(wanted.key)
    family = "ip6" if ":" in wanted.host else "ip4"
    listening = wanted.mode == "listen"
    async with host.run([Multiaddr(f"/{family}/{wanted.host}/tcp/0")] if listening else []):
        if listening:
            say(ready=True, id=str(host.get_id()), addrs=[str(address) for address in host.get_addrs()])
        else:
            await host.connect(info_from_p2p_addr(Multiaddr(wanted.words[0])))
            say(connected=True, id=str(host.get_id()), encryption=NOISE, muxer=YAMUX)  # the only ones offered
            for task in wanted.words[1:]:
                await perform(host, task)
        async for line in trio.wrap_file(sys.stdin):
            await perform(host, line.strip())


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    trio.run(main)
