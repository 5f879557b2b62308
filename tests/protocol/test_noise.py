"""Noise XX: published vectors, libp2p's payload, hostile messages, the in-place frame reader."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import noise, protobuf
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.noise import XX, FrameReader, Handshake, Opener, Sealer, StaticKey, WrongPeer

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "noise_xx.json").read_text())
ALICE, BOB, EVE = (PrivateKey.from_seed(bytes(31) + bytes([number])) for number in (1, 2, 3))


def x25519(text: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


@pytest.mark.parametrize("case", VECTORS["cases"])
def test_published_vectors(case):
    prologue = bytes.fromhex(case["prologue"])
    sides = [
        XX(
            initiator=initiator,
            static=x25519(VECTORS[f"{name}_static"]),
            ephemeral=x25519(VECTORS[f"{name}_ephemeral"]),
            prologue=prologue,
        )
        for initiator, name in ((True, "init"), (False, "resp"))
    ]
    for step in range(3):
        payload = bytes.fromhex(case["payloads"][step])
        message = sides[step % 2].write(payload)
        assert message.hex() == case["messages"][step]
        assert sides[1 - step % 2].read(message) == payload
    assert sides[0].keys() == sides[1].keys()


def test_published_transport_messages():
    case = VECTORS["cases"][0]
    initiator = XX(initiator=True, static=x25519(VECTORS["init_static"]), ephemeral=x25519(VECTORS["init_ephemeral"]))
    initiator.write()
    initiator.read(bytes.fromhex(case["messages"][1]))
    initiator.write()
    for key, (plain, sealed) in zip(initiator.keys(), VECTORS["transport"], strict=True):
        frame = Sealer(key).seal(bytes.fromhex(plain))
        assert (frame[:2].hex(), frame[2:].hex()) == ("001f", sealed)
        assert Opener(key).open(frame[2:]).hex() == plain


def handshake(*, expected=None, muxers=(("/yamux/1.0.0",), ("/yamux/1.0.0",)), static=None, mangle=None):
    dialer = Handshake(StaticKey.create(ALICE), initiator=True, expected=expected, muxers=muxers[0])
    listener = Handshake(static or StaticKey.create(BOB), initiator=False, muxers=muxers[1])
    writer, reader = dialer, listener
    for step in range(3):
        message = writer.write()
        assert int.from_bytes(message[:2], "big") == len(message) - 2
        body = message[2:]
        reader.read(mangle(step, body) if mangle else body)
        writer, reader = reader, writer
    return dialer, listener


def test_both_sides_know_each_other_and_can_talk():
    dialer, listener = handshake(expected=BOB.peer_id)
    assert dialer.remote_key == BOB.public
    assert listener.remote_key == ALICE.public
    for (seal, _), (_, opener) in (
        (dialer.ciphers(), listener.ciphers()),
        (listener.ciphers(), dialer.ciphers()),
    ):
        for text in (b"", b"one", bytes(noise.MAX_PLAINTEXT)):
            assert opener.open(seal.seal(text)[2:]) == text


@pytest.mark.parametrize(
    ("mine", "theirs", "agreed"),
    [
        (("/a", "/b"), ("/b", "/a"), "/a"),
        (("/a",), ("/b",), None),
        (("/a",), (), None),
        ((), ("/a",), None),
    ],
)
def test_the_initiators_order_of_muxers_decides(mine, theirs, agreed):
    dialer, listener = handshake(muxers=(mine, theirs))
    assert (dialer.muxer(), listener.muxer()) == (agreed, agreed)


def test_somebody_else_answers():
    with pytest.raises(WrongPeer, match=f"{BOB.peer_id}, not the expected {EVE.peer_id}"):
        handshake(expected=EVE.peer_id)


def test_a_stolen_signature_does_not_help():
    real = StaticKey.create(BOB)
    stolen = StaticKey(X25519PrivateKey.generate(), BOB.public, real.signature)
    with pytest.raises(RemoteProtocolError, match="signature does not match"):
        handshake(expected=BOB.peer_id, static=stolen)


@given(st.integers(1, 2), st.integers(0, 60), st.integers(1, 255))
def test_every_flipped_byte_is_noticed(step, position, flip):
    def mangle(at, body):
        return body[:position] + bytes([body[position] ^ flip]) + body[position + 1 :] if at == step else body

    with pytest.raises(RemoteProtocolError):
        handshake(mangle=mangle)


@given(st.integers(0, 2), st.binary(max_size=120))
def test_junk_messages_are_the_peers_fault(step, junk):
    try:
        handshake(mangle=lambda at, body: junk if at == step else body)
    except RemoteProtocolError:
        pass


def test_degenerate_key_is_refused():
    listener = Handshake(StaticKey.create(BOB), initiator=False)
    listener.read(bytes(32))
    with pytest.raises(RemoteProtocolError, match="degenerate"):
        listener.write()


def test_oversized_payload_and_muxer_lists():
    for payload, cause in ((bytes(noise.MAX_PAYLOAD + 1), "payload"), (None, "muxers")):
        dialer = Handshake(StaticKey.create(ALICE), initiator=True)
        listener = Handshake(
            StaticKey.create(BOB), initiator=False, muxers=[f"/m{i}" for i in range(noise.MAX_MUXERS + 1)]
        )
        listener.read(dialer.write()[2:])
        message = listener._noise.write(payload) if payload else listener.write()[2:]
        with pytest.raises(RemoteProtocolError, match=cause):
            dialer.read(message)


def test_out_of_turn_is_our_own_mistake():
    listener = Handshake(StaticKey.create(BOB), initiator=False)
    with pytest.raises(LocalProtocolError):
        listener.write()
    with pytest.raises(LocalProtocolError):
        Handshake(StaticKey.create(ALICE), initiator=True).read(bytes(32))
    with pytest.raises(LocalProtocolError):
        listener.ciphers()


def test_replayed_and_reordered_messages_do_not_decrypt():
    sealer = Sealer(bytes(32))
    first, second = sealer.seal(b"one")[2:], sealer.seal(b"two")[2:]
    opener = Opener(bytes(32))
    with pytest.raises(RemoteProtocolError):
        opener.open(second)
    assert opener.open(first) == b"one"
    with pytest.raises(RemoteProtocolError):
        opener.open(first)


def feed(reader: FrameReader, data: bytes, sizes) -> list[bytes]:
    found = []
    sizes = iter(sizes)
    while data:
        buffer = reader.get_buffer()
        assert len(buffer) > 0
        size = max(1, min(len(buffer), len(data), next(sizes, len(data))))
        buffer[:size] = data[:size]
        reader.commit(size)
        data = data[size:]
        found += map(bytes, reader.frames())
    return found


@given(st.lists(st.integers(0, 20_000), max_size=12), st.lists(st.integers(1, 30_000), max_size=40), st.randoms())
def test_frame_reader_under_any_split(lengths, sizes, rng):
    frames = [rng.randbytes(length) for length in lengths]
    wire = b"".join(len(frame).to_bytes(2, "big") + frame for frame in frames)
    assert feed(FrameReader(), wire, sizes) == frames


def test_frame_reader_grows_to_its_limit_and_gives_back():
    reader = FrameReader()
    assert len(reader.get_buffer()) == FrameReader.MIN_CAPACITY
    frame = (65535).to_bytes(2, "big") + bytes(65535)
    assert len(feed(reader, frame * 20, [])) == 20
    assert len(reader.get_buffer()) == FrameReader.MAX_CAPACITY
    reader.trim()
    assert len(reader.get_buffer()) == FrameReader.MIN_CAPACITY


def test_payload_fields_are_libp2ps():
    dialer, listener = handshake()
    fields = protobuf.decode(listener._payload())
    assert sorted(fields) == [1, 2, 4]
    assert protobuf.decode(protobuf.first_bytes(fields, 4)) == {2: [b"/yamux/1.0.0"]}
    assert dialer.remote_muxers == ("/yamux/1.0.0",)
