"""Identities on the wire: libp2p keys and peer ids, as `cryptography` objects behind two small value classes.

Our own keys are always Ed25519, so a peer id contains the public key and a signature can be checked without
asking anybody. Peers of the wider libp2p network may own RSA, secp256k1 or ECDSA keys: those are parsed and
verified too. Format: libp2p specs, peer-ids; vectors in tests/protocol/test_ids.py.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from . import protobuf
from .errors import ConfigError, RemoteProtocolError

_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS: Final = {letter: digit for digit, letter in enumerate(_ALPHABET)}
_MAX_INLINE: Final = 42
"""Marshalled keys up to this size are the peer id itself; longer ones are hashed (libp2p peer-ids spec)."""
_MAX_KEY: Final = 4096
"""Longest marshalled key accepted: RSA 8192 takes about 1,100 bytes."""
_MIN_RSA_BITS: Final = 2048
_MAX_RSA_BITS: Final = 8192
_MAX_RSA_EXPONENT: Final = (1 << 31) - 1
"""Real keys have 65537; a huge one makes each check of a signature take 14 ms."""
_MAX_TEXT: Final = 128
_LIBP2P_KEY_CODEC: Final = 0x72
_COMPRESSED_POINT: Final = 33


def base58_encode(data: bytes) -> str:
    """Bitcoin-alphabet base58: each leading zero byte is a leading '1'."""
    zeros = len(data) - len(data.lstrip(b"\0"))
    number = int.from_bytes(data, "big")
    letters = []
    while number:
        number, digit = divmod(number, 58)
        letters.append(_ALPHABET[digit])
    return "1" * zeros + "".join(reversed(letters))


def base58_decode(text: str) -> bytes:
    """Inverse of base58_encode. Raises ValueError naming the bad character."""
    number = 0
    for letter in text:
        if letter not in _DIGITS:
            raise ValueError(f"{letter!r} is not a base58 character")
        number = number * 58 + _DIGITS[letter]
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


class KeyType(IntEnum):
    """Key types of libp2p's PublicKey and PrivateKey messages."""

    RSA = 0
    ED25519 = 1
    SECP256K1 = 2
    ECDSA = 3


@dataclass(frozen=True, slots=True, order=True)
class PeerId:
    """A peer's name: the multihash of its public key. Hashable, orderable, printed in base58.

    The constructor takes bytes from the wire and raises RemoteProtocolError unless they are an identity
    multihash of at most 42 bytes or a sha256 multihash (`b"\\x12\\x20"` + 32 bytes). Text from users goes
    through parse().
    """

    raw: bytes
    """The multihash bytes."""

    def __post_init__(self) -> None:
        raw = self.raw
        hashed = len(raw) == 34 and raw[:2] == b"\x12\x20"
        inline = 2 < len(raw) <= 2 + _MAX_INLINE and raw[0] == 0 and raw[1] == len(raw) - 2
        if not (hashed or inline):
            raise RemoteProtocolError(f"not a peer id: {raw[:40].hex()} ({len(raw)} bytes)")

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """Read base58 (12D3Koo…, Qm…) or a CIDv1 (bafz…). Raises ConfigError naming the text."""
        try:
            if len(text) > _MAX_TEXT:
                raise ValueError("too long")
            if text.startswith(("1", "Qm")):
                return cls(base58_decode(text))
            return cls(_cid_multihash(text))
        except (ValueError, RemoteProtocolError) as exc:
            raise ConfigError(
                f"{text[:_MAX_TEXT]!r} is not a peer id: {exc}; "
                "one looks like 12D3KooW… and `swarmnode id` prints yours"
            ) from None

    @classmethod
    def from_public_key(cls, key: PublicKey) -> PeerId:
        """The peer id a public key stands for."""
        marshalled = key.marshal()
        if len(marshalled) <= _MAX_INLINE:
            return cls(bytes((0, len(marshalled))) + marshalled)
        return cls(b"\x12\x20" + hashlib.sha256(marshalled).digest())

    def public_key(self) -> PublicKey | None:
        """The key inside an inline (Ed25519, secp256k1) id; None when the id is only a hash.

        Raises RemoteProtocolError when the inline bytes are no valid key.
        """
        return PublicKey.unmarshal(self.raw[2:]) if self.is_inline else None

    @property
    def is_inline(self) -> bool:
        """The id contains the key: a short one, Ed25519 or secp256k1, whose signatures are quick to check."""
        return self.raw[0] == 0

    @property
    def short(self) -> str:
        """The last 8 characters, for logs: the first ones are the same for everybody."""
        return str(self)[-8:]

    @property
    def kad_key(self) -> bytes:
        """Position in the Kademlia key space: sha256 of the raw bytes."""
        return hashlib.sha256(self.raw).digest()

    def __hash__(self) -> int:
        return hash(self.raw)  # bytes remember theirs; the generated method hashes a new tuple each time

    def __str__(self) -> str:
        return _peer_text(self.raw)

    def __repr__(self) -> str:
        return f"PeerId({self})"


@lru_cache(maxsize=4096)
def _peer_text(raw: bytes) -> str:
    return base58_encode(raw)


def _cid_multihash(text: str) -> bytes:
    """Multihash of a CIDv1 with codec libp2p-key, in any of the usual multibases."""
    decoder = _MULTIBASES.get(text[:1])
    if decoder is None:
        raise ValueError("neither base58 nor a CID")
    try:
        data = decoder(text[1:])
    except binascii.Error as exc:
        raise ValueError(str(exc)) from None
    if data[:2] != bytes((1, _LIBP2P_KEY_CODEC)):
        raise ValueError("the CID is not a version 1 libp2p-key")
    return data[2:]


def _base32(text: str) -> bytes:
    return base64.b32decode(text + "=" * (-len(text) % 8))


def _base36(text: str) -> bytes:
    if not text.isascii() or not text.isalnum():
        raise ValueError("not base36")
    number = int(text, 36)
    zeros = len(text) - len(text.lstrip("0"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


# each prefix stands for one case of letters only
_MULTIBASES: Final[dict[str, Callable[[str], bytes]]] = {
    "b": lambda text: _base32(text.swapcase()),
    "B": _base32,
    "f": binascii.unhexlify,
    "F": binascii.unhexlify,
    "k": _base36,
    "K": _base36,
    "z": base58_decode,
}


_Key = ed25519.Ed25519PublicKey | rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A libp2p public key of any type.

    `data` is the type's own encoding (raw Ed25519, compressed point, DER SPKI).
    """

    type: KeyType
    """Which signature scheme."""
    data: bytes
    """The key's bytes as they stand in the protobuf."""
    _key: _Key = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_key", _load_public(self.type, self.data))
        except (ValueError, UnsupportedAlgorithm) as exc:
            raise RemoteProtocolError(f"not a valid {self.type.name} public key: {exc}") from None

    @classmethod
    def unmarshal(cls, data: bytes) -> PublicKey:
        """Parse libp2p's PublicKey protobuf. Raises RemoteProtocolError."""
        key_type, body = _split_key(data)
        return cls(key_type, body)

    def marshal(self) -> bytes:
        """libp2p's PublicKey protobuf, fields in order: peer ids are hashes of exactly these bytes."""
        return protobuf.encode([(1, int(self.type)), (2, self.data)])

    @property
    def peer_id(self) -> PeerId:
        """The peer id this key stands for."""
        return PeerId.from_public_key(self)

    def verify(self, data: bytes, signature: bytes) -> bool:
        """True when `signature` over `data` was made by this key's owner."""
        key = self._key
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, data)
            elif isinstance(key, rsa.RSAPublicKey):
                key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
            else:
                key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


def _split_key(data: bytes) -> tuple[KeyType, bytes]:
    if len(data) > _MAX_KEY:
        raise RemoteProtocolError(f"key of {len(data)} bytes is over the limit of {_MAX_KEY}")
    fields = protobuf.decode(data)
    number = protobuf.first_int(fields, 1)
    try:
        key_type = KeyType(number)
    except ValueError:
        raise RemoteProtocolError(f"unknown key type {number}") from None
    return key_type, protobuf.first_bytes(fields, 2)


def _load_public(key_type: KeyType, data: bytes) -> _Key:
    if key_type is KeyType.ED25519:
        return ed25519.Ed25519PublicKey.from_public_bytes(data)
    if key_type is KeyType.SECP256K1:
        if len(data) != _COMPRESSED_POINT:  # the long form of the same key would be another peer id
            raise ValueError(f"a compressed point has {_COMPRESSED_POINT} bytes, not {len(data)}")
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), data)
    key = serialization.load_der_public_key(data)
    if key_type is KeyType.RSA and isinstance(key, rsa.RSAPublicKey):
        return _checked_rsa(key)
    if key_type is KeyType.ECDSA and isinstance(key, ec.EllipticCurvePublicKey):
        return key
    raise ValueError("the key inside is of another type")


def _checked_rsa(key: rsa.RSAPublicKey) -> rsa.RSAPublicKey:
    if not _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS:
        raise ValueError(f"RSA keys must have {_MIN_RSA_BITS} to {_MAX_RSA_BITS} bits, not {key.key_size}")
    if key.public_numbers().e > _MAX_RSA_EXPONENT:
        raise ValueError(f"the RSA exponent must be at most {_MAX_RSA_EXPONENT}")
    return key


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """An Ed25519 identity. Built from its 32-byte seed; equal seeds are equal keys; never printed."""

    seed: bytes = field(repr=False)
    """The 32 secret bytes everything else is derived from."""
    public: PublicKey = field(init=False, compare=False)
    peer_id: PeerId = field(init=False, compare=False)
    _key: ed25519.Ed25519PrivateKey = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.seed) != 32:
            raise ConfigError(f"an Ed25519 seed has 32 bytes, not {len(self.seed)}")
        key = ed25519.Ed25519PrivateKey.from_private_bytes(self.seed)
        public = PublicKey(KeyType.ED25519, key.public_key().public_bytes_raw())
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "public", public)
        object.__setattr__(self, "peer_id", PeerId.from_public_key(public))

    @classmethod
    def generate(cls) -> PrivateKey:
        """A fresh identity from the system's random source."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def from_seed(cls, seed: bytes) -> PrivateKey:
        """The identity of a 32-byte seed. Raises ConfigError on another length."""
        return cls(seed)

    def sign(self, data: bytes) -> bytes:
        """A 64-byte Ed25519 signature over `data`."""
        return self._key.sign(data)

    def marshal(self) -> bytes:
        """libp2p's PrivateKey protobuf (seed followed by public key), the format of key files."""
        return protobuf.encode([(1, int(KeyType.ED25519)), (2, self.seed + self.public.data)])

    @classmethod
    def unmarshal(cls, data: bytes) -> PrivateKey:
        """Read a key file's bytes, also the old 96-byte form.

        Raises ConfigError on anything but a sound Ed25519 key.
        """
        try:
            key_type, body = _split_key(data)
        except RemoteProtocolError as exc:
            raise ConfigError(f"not a libp2p private key: {exc}") from None
        if key_type is not KeyType.ED25519 or len(body) not in (64, 96):
            raise ConfigError(f"identity keys must be Ed25519 (64 bytes), this is {key_type.name} ({len(body)} bytes)")
        key = cls(body[:32])
        if body[32:64] != key.public.data or body[64:] not in (b"", key.public.data):
            raise ConfigError("the private key file is damaged: its public half does not belong to it")
        return key
