"""Vectors that other implementations publish (sources: tests/vectors/README.md)."""

import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from swarmnode.protocol import multistream, protobuf
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.ids import PeerId, base58_decode, base58_encode
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.noise import MAX_PLAINTEXT, XX, Opener, Sealer
from swarmnode.protocol.yamux import Session
from swarmnode.protocol.yamux_frames import HEADER, INITIAL_WINDOW

FOLDER = Path(__file__).parents[1] / "vectors"
NOISE = json.loads((FOLDER / "noise_published.json").read_text())
FORMATS = json.loads((FOLDER / "multiformats.json").read_text())
YAMUX = json.loads((FOLDER / "yamux.json").read_text())


def x25519(text):
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


# -- Noise --


@pytest.mark.parametrize("vector", NOISE["vectors"], ids=lambda vector: vector["set"])
def test_noise_handshake_and_transport(vector):
    sides = [
        XX(
            initiator=initiator,
            static=x25519(vector[f"{name}_static"]),
            ephemeral=x25519(vector[f"{name}_ephemeral"]),
            prologue=bytes.fromhex(vector["prologue"]),
        )
        for initiator, name in ((True, "init"), (False, "resp"))
    ]
    messages = [(bytes.fromhex(plain), bytes.fromhex(sealed)) for plain, sealed in vector["messages"]]
    for step, (plain, sealed) in enumerate(messages[:3]):
        assert sides[step % 2].write(plain) == sealed
        assert sides[1 - step % 2].read(sealed) == plain
    assert sides[0].remote_static == x25519(vector["resp_static"]).public_key().public_bytes_raw()
    keys = sides[0].keys()
    assert keys == sides[1].keys()
    sealers, openers = [Sealer(key) for key in keys], [Opener(key) for key in keys]
    assert len(messages) > 3
    for step, (plain, sealed) in enumerate(messages[3:], start=3):
        assert bytes(sealers[step % 2].seal(plain)) == len(sealed).to_bytes(2, "big") + sealed
        assert openers[step % 2].open(sealed) == plain


@pytest.mark.parametrize("vector", NOISE["vectors"], ids=lambda vector: vector["set"])
def test_one_flipped_bit_of_a_published_message_is_refused(vector):
    responder = XX(
        initiator=False,
        static=x25519(vector["resp_static"]),
        ephemeral=x25519(vector["resp_ephemeral"]),
        prologue=bytes.fromhex(vector["prologue"]),
    )
    first, third = (bytearray.fromhex(vector["messages"][step][1]) for step in (0, 2))
    responder.read(bytes(first))
    responder.write(bytes.fromhex(vector["messages"][1][0]))
    third[-1] ^= 1
    with pytest.raises(RemoteProtocolError, match="does not decrypt"):
        responder.read(bytes(third))


# -- multiformats --


@pytest.mark.parametrize(("number", "encoded"), FORMATS["uvarint"])
def test_uvarint(number, encoded):
    raw = bytes.fromhex(encoded)
    assert protobuf.uvarint(number) == raw
    assert protobuf.read_uvarint(raw + b"\x55") == (number, len(raw))


@pytest.mark.parametrize("encoded", FORMATS["uvarint_bad"])
def test_uvarint_that_never_ends_or_overflows(encoded):
    with pytest.raises(RemoteProtocolError):
        protobuf.read_uvarint(bytes.fromhex(encoded))


@pytest.mark.parametrize(("raw", "text"), FORMATS["base58"])
def test_base58(raw, text):
    assert base58_encode(bytes.fromhex(raw)) == text
    assert base58_decode(text).hex() == raw


@pytest.mark.parametrize(("text", "multihash"), FORMATS["sha2_256_multihash"])
def test_multihash(text, multihash):
    peer = PeerId(b"\x12\x20" + hashlib.sha256(text.encode()).digest())
    assert peer.raw.hex() == multihash
    assert PeerId.parse(str(peer)) == peer


@pytest.mark.parametrize(("text", "encoded"), FORMATS["multiaddr_bytes"])
def test_multiaddr_bytes(text, encoded):
    assert Multiaddr.parse(text).to_bytes().hex() == encoded
    assert str(Multiaddr.from_bytes(bytes.fromhex(encoded))) == text


@pytest.mark.parametrize("text", FORMATS["multiaddr_good"])
def test_multiaddr_text_survives(text):
    address = Multiaddr.parse(text)
    assert Multiaddr.from_bytes(address.to_bytes()) == address == Multiaddr.parse(str(address))


@pytest.mark.parametrize("text", FORMATS["multiaddr_other"])
def test_multiaddr_of_other_transports_is_whole_or_refused(text):
    try:
        address = Multiaddr.parse(text)
    except ConfigError:
        return
    assert Multiaddr.from_bytes(address.to_bytes()) == address


@pytest.mark.parametrize("text", FORMATS["multiaddr_bad"])
def test_multiaddr_that_others_refuse(text):
    with pytest.raises(ConfigError):
        Multiaddr.parse(text)


@pytest.mark.parametrize("encoded", FORMATS["multiaddr_bytes_fuzzed"])
def test_multiaddr_bytes_on_which_others_once_failed(encoded):
    try:
        address = Multiaddr.from_bytes(bytes.fromhex(encoded))
    except RemoteProtocolError:
        return
    assert Multiaddr.parse(str(address)) == address


# -- multistream --


def test_multistream_lines():
    assert multistream.message("/multistream/1.0.0").hex() == "132f6d756c746973747265616d2f312e302e300a"
    assert multistream.message("na").hex() == "036e610a"
    assert multistream.message("/yamux/1.0.0").hex() == "0d2f79616d75782f312e302e300a"


# -- yamux --


@pytest.mark.parametrize(("encoded", "kind", "flags", "stream", "length"), YAMUX["headers"])
def test_yamux_header(encoded, kind, flags, stream, length):
    assert HEADER.pack(0, kind, flags, stream, length).hex() == encoded
    assert HEADER.unpack(bytes.fromhex(encoded)) == (0, kind, flags, stream, length)


def named(event):
    return f"{type(event).__name__} {event.stream.id if hasattr(event, 'stream') else event.code}"


def output(session):
    out = memoryview(bytearray(MAX_PLAINTEXT))
    return bytes(out[: session.fill(out)])


@pytest.mark.parametrize("vector", YAMUX["to_a_listener"], ids=lambda vector: vector["case"])
def test_yamux_frames_to_a_listener(vector):
    session = Session(client=False)
    events = session.receive(bytes.fromhex(vector["receive"]))
    if "then" in vector:
        events += session.receive(bytes.fromhex(vector["then"]))
    assert [named(event) for event in events] == vector["events"]
    stream = events[0].stream if events and hasattr(events[0], "stream") else None
    if stream is None:
        assert output(session).hex().startswith(vector.get("answer_starts", ""))
        return
    assert stream.send_credit == vector.get("credit", INITIAL_WINDOW)
    assert stream.take(100) == vector.get("read", "").encode()
    assert stream.at_eof == vector.get("eof", False)
    assert (stream.reset_by is not None) == vector.get("gone", False)
    assert output(session).hex().startswith(vector.get("answer_starts", ""))


@pytest.mark.parametrize(("case", "encoded"), YAMUX["refused"], ids=[case for case, _ in YAMUX["refused"]])
def test_yamux_frames_a_listener_refuses(case, encoded):
    with pytest.raises(RemoteProtocolError):
        Session(client=False).receive(bytes.fromhex(encoded))
