"""Peer ids and keys: the vectors of the libp2p peer-ids specification, every key type, any junk."""

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import protobuf
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.ids import KeyType, PeerId, PrivateKey, PublicKey, base58_decode, base58_encode

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "peer_ids.json").read_text())
"""Keys and ids as the libp2p peer-ids specification prints them."""

seeds = st.binary(min_size=32, max_size=32)


def foreign_private(key_type, data):
    """A private key of the specification's own encodings, which a node never has to read."""
    if key_type is KeyType.SECP256K1:
        return ec.derive_private_key(int.from_bytes(data, "big"), ec.SECP256K1())
    if key_type is KeyType.ED25519:
        return ed25519.Ed25519PrivateKey.from_private_bytes(data[:32])
    return serialization.load_der_private_key(data, None)


def foreign_public(key_type, key) -> PublicKey:
    """Our form of a public key of the cryptography package."""
    if key_type is KeyType.ED25519:
        return PublicKey(key_type, key.public_key().public_bytes_raw())
    if key_type is KeyType.SECP256K1:
        form = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
        return PublicKey(key_type, key.public_key().public_bytes(*form))
    return PublicKey(key_type, spki(key))


def foreign_sign(key_type, key, message):
    if key_type is KeyType.ED25519:
        return key.sign(message)
    if key_type is KeyType.RSA:
        return key.sign(message, padding.PKCS1v15(), hashes.SHA256())
    return key.sign(message, ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize("key_type", list(KeyType))
def test_published_keys(key_type):
    vector = VECTORS["keys"][key_type.name.lower()]
    public = PublicKey.unmarshal(bytes.fromhex(vector["public"]))
    assert (public.type, public.marshal().hex()) == (key_type, vector["public"])
    fields = protobuf.decode(bytes.fromhex(vector["private"]))
    assert protobuf.first_int(fields, 1) == key_type
    private = foreign_private(key_type, protobuf.first_bytes(fields, 2))
    assert foreign_public(key_type, private) == public
    signature = foreign_sign(key_type, private, b"message")
    assert public.verify(b"message", signature)
    assert not public.verify(b"massage", signature)
    assert PeerId.from_public_key(public) == public.peer_id
    inline = key_type in (KeyType.ED25519, KeyType.SECP256K1)
    assert public.peer_id.public_key() == (public if inline else None)


def test_the_published_key_of_our_own_type():
    vector = VECTORS["keys"]["ed25519"]
    key = PrivateKey.unmarshal(bytes.fromhex(vector["private"]))
    assert key.marshal().hex() == vector["private"]
    assert key.public.marshal().hex() == vector["public"]


def cid(raw: bytes, base: str) -> str:
    """A libp2p-key CIDv1 of a multihash."""
    data = b"\x01\x72" + raw
    if base in "bB":
        text = base64.b32encode(data).decode().rstrip("=")
        return base + (text.lower() if base == "b" else text)
    if base in "kK":
        number, letters = int.from_bytes(data, "big"), ""
        while number:
            number, digit = divmod(number, 36)
            letters = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + letters
        return base + (letters if base == "k" else letters.upper())
    if base in "fF":
        return base + (data.hex() if base == "f" else data.hex().upper())
    return "z" + base58_encode(data)


@pytest.mark.parametrize("legacy", VECTORS["texts"])
def test_text_forms_of_one_id(legacy):
    peer = PeerId.parse(legacy)
    assert str(peer) == legacy
    for text in [*VECTORS["texts"][legacy], *(cid(peer.raw, base) for base in "bBfFkKz")]:
        assert PeerId.parse(text) == peer, text
    assert (peer.public_key() is None) == legacy.startswith("Qm")


def test_the_example_cid_is_what_its_bytes_say():
    for legacy, (example, *_) in [(k, v) for k, v in VECTORS["texts"].items() if v]:
        assert cid(PeerId.parse(legacy).raw, "b") == example


def test_ids_of_ed25519_keys_are_inline():
    key = PrivateKey.from_seed(bytes(32))
    assert str(key.peer_id).startswith("12D3KooW")
    assert key.peer_id.public_key() == key.public
    assert key.peer_id.short == str(key.peer_id)[-8:]
    assert len(key.peer_id.kad_key) == 32
    assert repr(key).count("seed") == 0


@given(seeds, st.binary(max_size=100))
def test_signatures(seed, message):
    key = PrivateKey.from_seed(seed)
    signature = key.sign(message)
    assert key.public.verify(message, signature)
    assert not key.public.verify(message + b"!", signature)
    assert not key.public.verify(message, signature[:-1])
    assert PrivateKey.unmarshal(key.marshal()) == key
    assert PeerId.parse(str(key.peer_id)) == key.peer_id


def spki(key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


@given(st.binary(max_size=120))
def test_junk_keys_and_ids_are_the_peers_fault(data):
    for parse in (PublicKey.unmarshal, PeerId):
        try:
            parse(data)
        except RemoteProtocolError:
            pass


@given(st.sampled_from(list(KeyType)), st.binary(max_size=120))
def test_junk_key_bodies(key_type, data):
    try:
        PublicKey(key_type, data)
    except RemoteProtocolError:
        pass


@given(st.binary(max_size=60))
def test_base58_round_trip(data):
    assert base58_decode(base58_encode(data)) == data


@pytest.mark.parametrize(
    "text",
    [
        "",
        "12D3KooW",
        "12D3Koo0",
        "Qm",
        "hello",
        "bafy",
        "b!",
        "z11",
        "1" * 500,
        "bafkreie",
        "k0",
        "k!",
        "k\u0661",
        "f0",
        "fzz",
        "mAXI",
        "b" + "7" * 40,
    ],
)
def test_bad_text_names_the_text_and_the_fix(text):
    with pytest.raises(ConfigError, match=r"is not a peer id.*12D3KooW"):
        PeerId.parse(text)


def test_bad_private_keys():
    good = PrivateKey.from_seed(bytes(32)).marshal()
    for bad in (b"", good[:-1], good[:-1] + b"!", b"\x08\x00" + good[2:], bytes(5000)):
        with pytest.raises(ConfigError):
            PrivateKey.unmarshal(bad)
    with pytest.raises(ConfigError):
        PrivateKey.from_seed(b"short")


def test_small_rsa_keys_are_refused():
    weak = rsa.generate_private_key(65537, 1024)
    with pytest.raises(RemoteProtocolError, match="2048"):
        PublicKey(KeyType.RSA, spki(weak))


def test_rsa_keys_that_are_slow_to_check_are_refused():
    numbers = rsa.generate_private_key(65537, 2048).public_key().public_numbers()
    for exponent in ((1 << 31) - 1, (1 << 31) + 1):
        slow = rsa.RSAPublicNumbers(exponent, numbers.n).public_key()
        data = slow.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        if exponent < 1 << 31:
            PublicKey(KeyType.RSA, data)
        else:
            with pytest.raises(RemoteProtocolError, match="exponent"):
                PublicKey(KeyType.RSA, data)


def test_a_secp256k1_key_has_one_form_only():
    key = PublicKey.unmarshal(bytes.fromhex(VECTORS["keys"]["secp256k1"]["public"]))
    point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), key.data)
    long = point.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    with pytest.raises(RemoteProtocolError, match="33 bytes, not 65"):
        PublicKey(KeyType.SECP256K1, long)
