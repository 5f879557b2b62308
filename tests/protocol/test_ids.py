"""Peer ids and keys: the vectors of the libp2p peer-ids specification, every key type, any junk."""

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.ids import KeyType, PeerId, PrivateKey, PublicKey, base58_decode, base58_encode

# libp2p/specs peer-ids: keys in their protobuf form
SPEC_ED25519_PRIVATE = (
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3c"
    "acf6010f0e42d474fce27e"
)
SPEC_ED25519_PUBLIC = "080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
SPEC_SECP256K1_PUBLIC = "08021221037777e994e452c21604f91de093ce415f5432f701dd8cd1a7a6fea0e630bfca99"
SPEC_ECDSA_PUBLIC = (
    "0803125b3059301306072a8648ce3d020106082a8648ce3d03010703420004de3d300fa36ae0e8f5d530899d83abab44abf3161f162a4bc901"
    "d8e6ecda020e8b6d5f8da30525e71d6851510c098e5c47c646a597fb4dcec034e9f77c409e62"
)

seeds = st.binary(min_size=32, max_size=32)


def test_specification_vectors():
    key = PrivateKey.unmarshal(bytes.fromhex(SPEC_ED25519_PRIVATE))
    assert key.marshal().hex() == SPEC_ED25519_PRIVATE
    assert key.public.marshal().hex() == SPEC_ED25519_PUBLIC
    for text in (SPEC_SECP256K1_PUBLIC, SPEC_ECDSA_PUBLIC):
        assert PublicKey.unmarshal(bytes.fromhex(text)).marshal().hex() == text


def test_text_forms_of_one_id():
    # the example of the specification: base58 multihash and CIDv1 in base32
    legacy = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    cid = "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe"
    assert str(PeerId.parse(legacy)) == legacy
    assert PeerId.parse(cid) == PeerId.parse(legacy)
    assert PeerId.parse("12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA").public_key() is not None
    assert PeerId.parse(legacy).public_key() is None


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


def test_foreign_key_types_verify():
    rsa_key = rsa.generate_private_key(65537, 2048)
    curve_key = ec.generate_private_key(ec.SECP256R1())
    koblitz_key = ec.generate_private_key(ec.SECP256K1())
    point = koblitz_key.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    )
    signed = [
        (PublicKey(KeyType.RSA, spki(rsa_key)), rsa_key.sign(b"m", padding.PKCS1v15(), hashes.SHA256())),
        (PublicKey(KeyType.ECDSA, spki(curve_key)), curve_key.sign(b"m", ec.ECDSA(hashes.SHA256()))),
        (PublicKey(KeyType.SECP256K1, point), koblitz_key.sign(b"m", ec.ECDSA(hashes.SHA256()))),
    ]
    for key, signature in signed:
        assert key.verify(b"m", signature)
        assert not key.verify(b"n", signature)
        assert PublicKey.unmarshal(key.marshal()).peer_id == key.peer_id
    assert str(signed[0][0].peer_id).startswith("Qm")
    assert str(signed[2][0].peer_id).startswith("16Uiu2")


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
    "text", ["", "12D3KooW", "12D3Koo0", "Qm", "hello", "bafy", "b!", "z11", "1" * 500, "bafkreie"]
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
