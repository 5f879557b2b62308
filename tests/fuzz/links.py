"""Whole connections as a target: a scripted peer with real keys, so that damage reaches what is inside encryption.

An input is a head byte and operations `kind u8 | length u16 | payload`. The peer does the handshake for real, but with
the payload that the script gives it, and encrypts whatever the script says.
"""

import hashlib
import zlib

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from swarmnode.protocol import multistream, noise, protobuf, yamux
from swarmnode.protocol.connection import Connection
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.noise import XX, Opener, Sealer, StaticKey
from swarmnode.protocol.yamux import MAX_UNACKED

from . import muxes
from .mutate import mutate, mutate_parts
from .seeds import KEYS, multistream_dialog, public_key
from .targets import KIB, Target

US, THEM = KEYS[0], KEYS[1]
PIECE = 4 * KIB
"""Plaintext of one Noise message of the peer's."""
RAW, HELLO, HANDSHAKE, SEALED, CORRUPT, MUXER, LOCAL = range(7)
DIALED, EARLY, STUCK, STRANGER = 1, 2, 4, 8
"""Bits of the head: we dial; we offer early muxer negotiation; we never send; we expect somebody else."""
GREETING = multistream.message(multistream.HEADER) + multistream.message(noise.PROTOCOL)
AGREED = multistream.message(multistream.HEADER) + multistream.message(yamux.PROTOCOL)


def _x25519(name):
    return X25519PrivateKey.from_private_bytes(hashlib.sha256(name).digest())


OUR_STATIC = StaticKey.create(US, _x25519(b"our static"))
THEIR_STATIC = StaticKey.create(THEM, _x25519(b"their static"))


def operation(kind, payload=b""):
    return bytes([kind]) + len(payload).to_bytes(2, "big") + payload


def operations(data):
    at = 1
    while at + 3 <= len(data):
        size = int.from_bytes(data[at + 1 : at + 3], "big")
        yield data[at] % 7, data[at + 3 : at + 3 + size]
        at += 3 + size


def noise_payload(*, muxers=(yamux.PROTOCOL,), key=None, signature=THEIR_STATIC.signature):
    """What the peer proves in the handshake; sound by default."""
    fields = [(1, THEM.public.marshal() if key is None else key), (2, signature)]
    if muxers:
        fields.append((4, protobuf.encode([(2, name) for name in muxers])))
    return protobuf.encode(fields)


def seed(rng):
    head = (
        rng.choice((0, DIALED))
        | rng.choice((EARLY, EARLY, 0))
        | rng.choice((0, 0, STUCK))
        | rng.choice((*(0,) * 11, STRANGER))
    )
    payload = rng.choice(
        (
            *(noise_payload(),) * 12,
            noise_payload(muxers=()),
            noise_payload(muxers=("/mplex/6.7.0", yamux.PROTOCOL)),
            noise_payload(muxers=("x",) * 40),
            noise_payload(key=public_key(rng)),
            noise_payload(signature=rng.randbytes(64)),
            b"",
        )
    )
    hello = operation(HELLO) if rng.random() < 0.9 else operation(RAW, multistream_dialog(rng))
    out = [bytes([head]), hello]
    out += (
        [operation(HANDSHAKE, b""), operation(HANDSHAKE, payload)]
        if not head & DIALED
        else [operation(HANDSHAKE, payload)]
    )
    if not head & EARLY or rng.random() < 0.2:
        out.append(operation(MUXER))
    for _ in range(rng.choice((0, 1, 2, 4))):
        body = muxes.frames(rng, odd=not head & DIALED)
        kind = rng.choice((SEALED, SEALED, SEALED, SEALED, CORRUPT, RAW, LOCAL))
        out += [operation(kind, body[at : at + PIECE]) for at in range(0, len(body), PIECE)]
    return b"".join(out)


class Peer:
    """The other end, as the script wants it."""

    def __init__(self, head, early):
        self.dialing = not head & DIALED
        self.noise = XX(initiator=self.dialing, static=THEIR_STATIC.private, ephemeral=_x25519(b"their ephemeral"))
        self.inbox = bytearray()
        self.sealer = self.opener = None

    def handshake(self, payload):
        """Our part of the handshake as far as it goes; `payload` in the next message of ours."""
        if self.noise.done:
            return b""
        if (self.noise.step % 2 == 1) == self.dialing and not self._read():
            return b""
        if self.noise.done:
            return b""
        message = self.noise.write(payload)
        if self.noise.done:
            self._keys()
        return len(message).to_bytes(2, "big") + message

    def _read(self):
        """Take the victim's next handshake message, if it has sent one."""
        if not self.inbox.startswith(GREETING) and self.noise.step < 2:
            return False
        start = len(GREETING) if self.noise.step < 2 else 0
        frame = self.inbox[start:]
        size = int.from_bytes(frame[:2], "big")
        if len(frame) < 2 + size or not frame:
            return False
        self.noise.read(bytes(frame[2 : 2 + size]))
        del self.inbox[: start + 2 + size]
        if self.noise.done:
            self._keys()
        return True

    def _keys(self):
        to_responder, to_initiator = self.noise.keys()
        mine, theirs = (to_responder, to_initiator) if self.dialing else (to_initiator, to_responder)
        self.sealer, self.opener = Sealer(mine), Opener(theirs)

    def sealed(self, payload):
        if self.sealer is None and not self.noise.done and not self.dialing:
            self._read()
        if self.sealer is None:
            return b""
        return bytes(self.sealer.seal(payload[: noise.MAX_PLAINTEXT]))


class Link:
    """The victim, its peer, and what must hold."""

    def __init__(self, head, seed):
        self.victim = Connection(
            OUR_STATIC,
            initiator=bool(head & DIALED),
            expected=KEYS[2].peer_id if head & STRANGER else None,
            ephemeral=_x25519(b"our ephemeral"),
            early_muxer=bool(head & EARLY),
        )
        self.stranger = bool(head & STRANGER)
        self.stuck = bool(head & STUCK)
        self.peer = Peer(head, bool(head & EARLY))
        self.driver = muxes.Driver(client=bool(head & DIALED), stuck=True, seed=seed)
        self.driver.session = self.victim.session
        self.received = self.sent = 0
        self.raw = False
        """Bytes came outside of any message: what follows may be taken for the rest of one."""

    def step(self, kind, payload):
        self.pull()
        match kind:
            case 0:
                self.raw = True
                self.feed(payload)
            case 1:
                self.raw |= self.received > 0
                self.feed(GREETING)
            case 2:
                self.feed(self.peer.handshake(payload))
            case 3:
                self.feed(self.peer.sealed(payload))
            case 4:
                self.feed(_corrupt(self.peer.sealed(payload), payload))
            case 5:
                self.feed(self.peer.sealed(AGREED))
            case 6:
                self.local()
        self.check()

    def feed(self, data):
        self.received += len(data)
        for at in range(0, len(data), muxes.LARGEST_PIECE):
            self.driver.take(self.victim.receive(data[at : at + muxes.LARGEST_PIECE]))

    def pull(self):
        for _ in range(50):
            if (self.stuck and self.victim.is_open) or (out := self.victim.pull()) is None:
                return
            self.sent += len(out)
            self.peer.inbox += out[: 4 * KIB]

    def local(self):
        session = self.victim.session
        if self.victim.is_open and session.unacked < MAX_UNACKED and not session.went_away:
            self.driver.streams.append(session.open())
        if self.victim.is_open:
            self.driver.act()
        self.victim.trim()

    def check(self):
        assert not self.stranger or not self.victim.is_open, "open with somebody else than the one expected"
        if self.victim.is_open:
            assert self.victim.remote == THEM.peer_id, "a stranger was believed"
        else:
            assert not self.driver.streams
            assert self.sent < 4 * self.received + 2 * KIB


def _corrupt(sealed, payload):
    out = bytearray(sealed)
    if len(out) > 2:
        out[2 + zlib.crc32(payload) % (len(out) - 2)] ^= 1
    return bytes(out)


def run(data):
    link = Link(data[0] if data else 0, zlib.crc32(data))
    try:
        for kind, payload in operations(data):
            link.step(kind, payload)
            assert kind != CORRUPT or link.raw or not link.peer.sealer, "a damaged message was accepted"
    except RemoteProtocolError:
        link.pull()  # it may have a last word
        raise


def frames_of(data):
    return max(1, sum(muxes.frames_of(b"\0" + body) if kind == SEALED else 1 for kind, body in operations(data)))


def damage(data, rng, other):
    """Mostly inside an operation, so that it arrives well encrypted."""
    if rng.random() < 0.3:
        return mutate(data, rng, other)
    parts = [bytes([kind]) + payload for kind, payload in operations(data)]
    others = [bytes([kind]) + payload for kind, payload in operations(other)]
    damaged = (part or b"\0" for part in mutate_parts(parts, rng, others))
    return data[:1] + b"".join(operation(part[0] % 7, part[1:60_000]) for part in damaged)


LINKS = (Target("connection", seed, run, per_byte=150, base=1536 * KIB, frames=frames_of, weight=4, mutate=damage),)
