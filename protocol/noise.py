"""Noise XX as libp2p speaks it: Noise_XX_25519_ChaChaPoly_SHA256 with signed identities. Spec:
docs/spec/noise.md.

Three parts: XX is the plain Noise handshake (checked against published vectors), Handshake adds libp2p's
payload (identity key, its signature over the Noise static key, early muxer negotiation), Sealer and Opener
are the transport phase. Sans-IO: messages in, messages out, the caller frames them with FrameReader and two
length bytes.

    initiator                     responder
    e                  ->
                       <-         e, ee, s, es, payload
    s, se, payload     ->
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from . import protobuf
from .errors import LocalProtocolError, RemoteProtocolError
from .ids import PeerId, PrivateKey, PublicKey

PROTOCOL: Final = "/noise"
MAX_MESSAGE: Final = 65535
"""A Noise message with its tag; the length field has 16 bits."""
TAG: Final = 16
MAX_PLAINTEXT: Final = MAX_MESSAGE - TAG
MAX_PAYLOAD: Final = 4096
"""Handshake payloads: an RSA-4096 identity with signature takes about 1,200 bytes."""
MAX_MUXERS: Final = 32
"""Muxers a peer may offer in its payload."""

_NAME: Final = b"Noise_XX_25519_ChaChaPoly_SHA256"
_SIGNED: Final = b"noise-libp2p-static-key:"
_KEY: Final = 32


_nonce: Final = struct.Struct("<4xQ").pack
"""The nonce of a counter: four zero bytes, then little endian."""


class XX:
    """The three messages of Noise XX with payloads. Call write() and read() in turn; keys() when `done`."""

    def __init__(
        self,
        *,
        initiator: bool,
        static: X25519PrivateKey,
        ephemeral: X25519PrivateKey,
        prologue: bytes = b"",
    ) -> None:
        self._initiator = initiator
        self._static = static
        self._ephemeral = ephemeral
        self._remote_ephemeral = b""
        self.remote_static = b""
        """The peer's X25519 static key, once its message has been read."""
        self.step = 0
        """Messages written and read so far."""
        self._hash = _NAME.ljust(32, b"\0")
        self._chain = self._hash
        self._cipher: ChaCha20Poly1305 | None = None
        self._counter = 0
        self._mix_hash(prologue)

    @property
    def done(self) -> bool:
        """All three messages are through."""
        return self.step == 3

    def write(self, payload: bytes = b"") -> bytes:
        """The next message from this side."""
        if self.done or (self.step % 2 == 0) != self._initiator:
            raise LocalProtocolError("it is not this side's turn in the Noise handshake")
        out = b""
        if self.step < 2:
            public = self._ephemeral.public_key().public_bytes_raw()
            self._mix_hash(public)
            out = public
        if self.step == 1:
            self._mix_key(self._ephemeral, self._remote_ephemeral)  # ee
            out += self._seal(self._static.public_key().public_bytes_raw())
            self._mix_key(self._static, self._remote_ephemeral)  # es
        elif self.step == 2:
            out += self._seal(self._static.public_key().public_bytes_raw())
            self._mix_key(self._static, self._remote_ephemeral)  # se
        self.step += 1
        return out + self._seal(payload)

    def read(self, message: bytes) -> bytes:
        """Take the peer's next message, return its payload. Raises RemoteProtocolError."""
        if self.done or (self.step % 2 == 1) != self._initiator:
            raise LocalProtocolError("it is not the peer's turn in the Noise handshake")
        offset = 0
        if self.step < 2:
            self._remote_ephemeral, offset = self._part(message, 0, _KEY)
            self._mix_hash(self._remote_ephemeral)
        if self.step > 0:
            if self.step == 1:
                self._mix_key(self._ephemeral, self._remote_ephemeral)  # ee
            sealed, offset = self._part(message, offset, _KEY + TAG)
            self.remote_static = self._open(sealed)
            self._mix_key(self._ephemeral, self.remote_static)  # es, se
        self.step += 1
        return self._open(message[offset:])

    def keys(self) -> tuple[bytes, bytes]:
        """Transport keys: (initiator to responder, responder to initiator)."""
        if not self.done:
            raise LocalProtocolError("the Noise handshake is not over")
        return self._derive(b"")

    @staticmethod
    def _part(message: bytes, offset: int, size: int) -> tuple[bytes, int]:
        if len(message) < offset + size:
            raise RemoteProtocolError(f"Noise handshake message of {len(message)} bytes is too short")
        return message[offset : offset + size], offset + size

    def _mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def _mix_key(self, private: X25519PrivateKey, public: bytes) -> None:
        try:
            secret = private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise RemoteProtocolError("Noise handshake: the peer sent a degenerate X25519 key") from None
        self._chain, key = self._derive(secret)
        self._cipher = ChaCha20Poly1305(key)
        self._counter = 0

    def _derive(self, secret: bytes) -> tuple[bytes, bytes]:
        """HKDF with two outputs, as the Noise specification defines it."""
        temporary = hmac.digest(self._chain, secret, "sha256")
        first = hmac.digest(temporary, b"\x01", "sha256")
        return first, hmac.digest(temporary, first + b"\x02", "sha256")

    def _seal(self, plain: bytes) -> bytes:
        out = plain
        if self._cipher is not None:
            out = self._cipher.encrypt(_nonce(self._counter), plain, self._hash)
            self._counter += 1
        self._mix_hash(out)
        return out

    def _open(self, data: bytes) -> bytes:
        plain = data
        if self._cipher is not None:
            try:
                plain = self._cipher.decrypt(_nonce(self._counter), data, self._hash)
            except InvalidTag:
                raise RemoteProtocolError("Noise handshake: a message does not decrypt") from None
            self._counter += 1
        self._mix_hash(data)
        return plain


class Sealer:
    """Encrypts one direction of the transport phase."""

    __slots__ = ("_cipher", "_counter")

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._counter = 0

    def seal(self, plain: bytes | bytearray | memoryview) -> bytearray:
        """One wire frame: two length bytes and the ciphertext, written once into its own buffer."""
        size = len(plain) + TAG
        frame = bytearray(2 + size)
        frame[0] = size >> 8
        frame[1] = size & 0xFF
        self._cipher.encrypt_into(_nonce(self._counter), plain, None, memoryview(frame)[2:])
        self._counter += 1
        return frame


class Opener:
    """Decrypts the other direction."""

    __slots__ = ("_cipher", "_counter")

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._counter = 0

    def open(self, message: bytes | bytearray | memoryview) -> bytes:
        """The plaintext of one Noise message. Raises RemoteProtocolError when it was tampered with."""
        try:
            plain = self._cipher.decrypt(_nonce(self._counter), message, None)
        except InvalidTag:
            raise RemoteProtocolError("a Noise message does not decrypt") from None
        self._counter += 1
        return plain


@dataclass(frozen=True, slots=True)
class StaticKey:
    """A node's Noise key, signed by its identity once: signing at each handshake would cost 50 µs for
    nothing."""

    private: X25519PrivateKey
    """The X25519 key used in every handshake of this process."""
    identity: PublicKey
    """Whose key it is."""
    signature: bytes
    """The identity's signature over the public half."""

    @classmethod
    def create(cls, identity: PrivateKey, private: X25519PrivateKey | None = None) -> StaticKey:
        """Sign `private`, or a fresh key."""
        private = private or X25519PrivateKey.generate()
        signed = _SIGNED + private.public_key().public_bytes_raw()
        return cls(private, identity.public, identity.sign(signed))


class Handshake:
    """One side of libp2p's Noise handshake, from first message to transport ciphers.

    The initiator starts with write(); then each read() is answered by write() until `done`. read() raises
    RemoteProtocolError on any fault of the peer, including an identity other than `expected`.
    """

    def __init__(
        self,
        static: StaticKey,
        *,
        initiator: bool,
        expected: PeerId | None = None,
        muxers: Sequence[str] = (),
        ephemeral: X25519PrivateKey | None = None,
    ) -> None:
        self._static = static
        self._initiator = initiator
        self._expected = expected
        self._muxers = tuple(muxers)
        self._noise = XX(
            initiator=initiator,
            static=static.private,
            ephemeral=ephemeral or X25519PrivateKey.generate(),
        )
        self.remote_key: PublicKey | None = None
        """The peer's identity key, proven by signature, after its payload has been read."""
        self.remote_muxers: tuple[str, ...] = ()
        """Muxers the peer offered; empty when it does not negotiate early."""

    @property
    def done(self) -> bool:
        """Both sides are authenticated and keys can be taken."""
        return self._noise.done

    def write(self) -> bytes:
        """The next message for the peer, with its two length bytes."""
        message = self._noise.write(b"" if self._noise.step == 0 else self._payload())
        return len(message).to_bytes(2, "big") + message

    def read(self, message: bytes) -> None:
        """Take the peer's next message, without length bytes. Raises RemoteProtocolError."""
        payload = self._noise.read(message)
        if self._noise.step == 1:
            return  # message 1 is not encrypted: nothing in it may be believed
        if len(payload) > MAX_PAYLOAD:
            raise RemoteProtocolError(f"Noise payload of {len(payload)} bytes is over {MAX_PAYLOAD}")
        self._check(payload)

    def ciphers(self) -> tuple[Sealer, Opener]:
        """(sending, receiving) ciphers of this side."""
        to_responder, to_initiator = self._noise.keys()
        if self._initiator:
            return Sealer(to_responder), Opener(to_initiator)
        return Sealer(to_initiator), Opener(to_responder)

    def muxer(self) -> str | None:
        """The initiator's first muxer that the responder offers too; None means: negotiate inside."""
        first, second = self._muxers, self.remote_muxers
        if not self._initiator:
            first, second = second, first
        return next((name for name in first if name in second), None)

    def _payload(self) -> bytes:
        fields: list[tuple[int, bytes]] = [(1, self._static.identity.marshal()), (2, self._static.signature)]
        if self._muxers:
            fields.append((4, protobuf.encode([(2, name) for name in self._muxers])))
        return protobuf.encode(fields)

    def _check(self, payload: bytes) -> None:
        fields = protobuf.decode(payload)
        key = PublicKey.unmarshal(protobuf.first_bytes(fields, 1))
        if self._expected is not None and key.peer_id != self._expected:
            raise WrongPeer(f"the peer is {key.peer_id}, not the expected {self._expected}")
        if not key.verify(_SIGNED + self._noise.remote_static, protobuf.first_bytes(fields, 2)):
            raise RemoteProtocolError("the peer's identity signature does not match its Noise key")
        extensions = protobuf.decode(protobuf.first_bytes(fields, 4))
        muxers = protobuf.all_bytes(extensions, 2)
        if len(muxers) > MAX_MUXERS:
            raise RemoteProtocolError(f"the peer offers {len(muxers)} muxers, over {MAX_MUXERS}")
        self.remote_key = key
        self.remote_muxers = tuple(map(protobuf.text, muxers))


class WrongPeer(RemoteProtocolError):
    """The handshake is sound, but with somebody else than the one dialed."""


class FrameReader:
    """A receive buffer that the socket fills in place and that hands out Noise messages without copying.

    It starts small, for idle connections are many; it doubles when a read fills it, up to `MAX_CAPACITY`.
    """

    __slots__ = ("_data", "_end", "_start")

    MIN_CAPACITY: Final = 4096
    MAX_CAPACITY: Final = 256 * 1024
    """Four full frames: more saves no system calls worth having."""

    def __init__(self) -> None:
        self._data = memoryview(bytearray(self.MIN_CAPACITY))
        self._start = 0
        self._end = 0

    def get_buffer(self) -> memoryview:
        """Free room to receive into, never empty."""
        if self._start == self._end:  # as a rule: what came was whole messages
            self._start = self._end = 0
            return self._data
        capacity = len(self._data)
        if self._end == capacity or self._start + self._needed() > capacity:
            self._move(max(capacity, self._needed()))
        if self._end == len(self._data):
            self._move(2 * capacity)
        return self._data[self._end :]

    def commit(self, size: int) -> None:
        """`size` bytes were received into the buffer."""
        self._end += size
        capacity = len(self._data)
        if self._end == capacity < self.MAX_CAPACITY:
            self._move(2 * capacity)

    def frames(self) -> list[memoryview]:
        """Consume the complete Noise messages, without their lengths; they are valid until the next get_buffer()."""
        data, start, end = self._data, self._start, self._end
        found = []
        while end - start >= 2:
            stop = start + 2 + (data[start] << 8 | data[start + 1])
            if stop > end:
                break
            found.append(data[start + 2 : stop])
            start = stop
        self._start = start
        return found

    def peek(self) -> memoryview:
        """Everything received and not yet consumed."""
        return self._data[self._start : self._end]

    def skip(self, size: int) -> None:
        """Consume `size` bytes that were peeked at; negative: the last ones were skipped too eagerly."""
        self._start += size

    def trim(self) -> None:
        """Give memory back if nothing is pending; called now and then on quiet connections."""
        if self._start == self._end and len(self._data) > self.MIN_CAPACITY:
            self._data = memoryview(bytearray(self.MIN_CAPACITY))
            self._start = self._end = 0

    def _needed(self) -> int:
        """Room the message at the front takes; at least the two length bytes."""
        if self._end - self._start < 2:
            return 2
        return 2 + (self._data[self._start] << 8 | self._data[self._start + 1])

    def _move(self, capacity: int) -> None:
        """Bring what is pending to the front of this buffer or of one with at least that capacity."""
        size = self._end - self._start
        pending = self._data[self._start : self._end]
        if capacity > len(self._data):
            self._data = memoryview(bytearray(1 << (capacity - 1).bit_length()))
            self._data[:size] = pending
        else:
            self._data[:size] = bytes(pending)
        self._start, self._end = 0, size
