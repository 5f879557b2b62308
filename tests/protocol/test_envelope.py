"""Signed envelopes and peer records: a record of go-libp2p to the byte, every tampering, every key type."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import envelope, protobuf
from swarmnode.protocol.envelope import RECORD_DOMAIN, RECORD_TYPE, Envelope, PeerRecord
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.ids import KeyType, PrivateKey, PublicKey
from swarmnode.protocol.multiaddr import Multiaddr

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "envelopes.json").read_text())
KEY = PrivateKey.from_seed(bytes(32))
OTHER = PrivateKey.from_seed(bytes(31) + b"\1")
ADDRESS = Multiaddr.parse("/ip4/1.2.3.4/tcp/4001")
RECORD = PeerRecord(peer=KEY.peer_id, seq=1 << 63, addrs=(ADDRESS, Multiaddr.parse("/dns4/a.example/tcp/1")))


@pytest.mark.parametrize("vector", VECTORS["records"], ids=lambda vector: vector["source"])
def test_golden_records(vector):
    """Ed25519 signs the same bytes the same way: we must read the envelope, and make it."""
    key = PrivateKey.unmarshal(bytes.fromhex(vector["private_key"]))
    addrs = tuple(map(Multiaddr.parse, vector["addrs"]))
    record = PeerRecord(peer=key.peer_id, seq=vector["seq"], addrs=addrs)
    assert PeerRecord.open(bytes.fromhex(vector["envelope"])) == record
    assert record.seal(key).hex() == vector["envelope"]


def test_what_is_signed_is_a_matter_of_domain_type_and_payload():
    sealed = Envelope.seal(KEY, "domain", b"\x01\x02", b"payload")
    assert Envelope.open(sealed.encode(), "domain", b"\x01\x02") == sealed
    assert KEY.public.verify(b"\x06domain\x02\x01\x02\x07payload", sealed.signature)
    with pytest.raises(RemoteProtocolError, match="signature"):
        Envelope.open(sealed.encode(), "domains", b"\x01\x02")
    with pytest.raises(RemoteProtocolError, match="of type 0102 instead of 0103"):
        Envelope.open(sealed.encode(), "domain", b"\x01\x03")


def test_parts_cannot_be_moved_into_each_other():
    sealed = Envelope.seal(KEY, "domain", b"ab", b"c")
    forged = protobuf.encode([(1, KEY.public.marshal()), (2, b"a"), (3, b"bc"), (5, sealed.signature)])
    with pytest.raises(RemoteProtocolError, match="signature"):
        Envelope.open(forged, "domain", b"a")


def test_one_bit_of_it_anywhere():
    data = RECORD.seal(KEY)
    assert PeerRecord.open(data) == RECORD
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1
        with pytest.raises(RemoteProtocolError):
            PeerRecord.open(bytes(broken))


def test_a_record_about_somebody_else():
    with pytest.raises(RemoteProtocolError, match=f"{KEY.peer_id} is signed by {OTHER.peer_id}"):
        PeerRecord.open(RECORD.seal(OTHER))


def test_a_sound_record_of_the_wrong_peer():
    assert PeerRecord.open(RECORD.seal(KEY), peer=KEY.peer_id) == RECORD
    with pytest.raises(RemoteProtocolError, match=f"{KEY.peer_id} instead of {OTHER.peer_id}"):
        PeerRecord.open(RECORD.seal(KEY), peer=OTHER.peer_id)


def test_peers_of_other_key_types_sign_too():
    private = ec.generate_private_key(ec.SECP256K1())
    form = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    key = PublicKey(KeyType.SECP256K1, private.public_key().public_bytes(*form))
    record = PeerRecord(peer=key.peer_id, seq=1, addrs=(ADDRESS,))
    signed = b"".join(map(protobuf.delimited, (RECORD_DOMAIN.encode(), RECORD_TYPE, record.encode())))
    signature = private.sign(signed, ec.ECDSA(hashes.SHA256()))
    sealed = Envelope(key=key, payload_type=RECORD_TYPE, payload=record.encode(), signature=signature)
    assert PeerRecord.open(sealed.encode()) == record


def test_addresses_are_bounded_and_unknown_ones_left_out():
    unknown = protobuf.encode([(1, bytes.fromhex("bd03") + bytes(37))])  # onion3
    mine = protobuf.encode([(1, ADDRESS.with_peer(KEY.peer_id).to_bytes())])
    only_peer = protobuf.encode([(1, Multiaddr.parse(f"/p2p/{KEY.peer_id}").to_bytes())])
    head = [(1, KEY.peer_id.raw)]
    record = PeerRecord.decode(protobuf.encode([*head, (3, unknown), (3, b""), (3, mine), (3, only_peer), (9, b"new")]))
    assert (record.addrs, record.seq) == ((ADDRESS,), 0)
    crowd = PeerRecord.decode(protobuf.encode([*head, *[(3, mine)] * (envelope.MAX_ADDRS + 1)]))
    assert len(crowd.addrs) == envelope.MAX_ADDRS


def test_size_limit_is_exact():
    room = envelope.MAX_BYTES - len(Envelope.seal(KEY, "d", b"t", bytes(8000)).encode()) + 8000
    data = Envelope.seal(KEY, "d", b"t", bytes(room)).encode()
    assert len(data) == envelope.MAX_BYTES
    Envelope.open(data, "d", b"t")
    with pytest.raises(RemoteProtocolError, match="limit of 8192"):
        Envelope.open(data + b"\0", "d", b"t")


@given(st.binary(max_size=200))
def test_junk_is_the_peers_fault(junk):
    for parse in (PeerRecord.open, PeerRecord.decode):
        try:
            parse(junk)
        except RemoteProtocolError:
            pass


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 3))
def test_records_round_trip(seq, count):
    record = PeerRecord(peer=KEY.peer_id, seq=seq, addrs=(ADDRESS,) * count)
    assert PeerRecord.decode(record.encode()) == record
