from __future__ import annotations

import math
import struct
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import kad, protobuf
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.kad import KadPeer, LeasedEntry, Message, MessageType, Stale
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.records import MAX_PAYLOAD_BYTES, MAX_SEQ, MAX_TTL_S, TAG_BYTES, sign_entry

ALICE = PrivateKey.from_seed(bytes(31) + b"\x01")
KEY = bytes(range(32))
ADDR = Multiaddr.parse("/ip4/1.2.3.4/tcp/4001").to_bytes()


def leased(payload=b"hello", seq=5, ttl_s=100, lease_s=60):
    return LeasedEntry(sign_entry(ALICE, KEY, payload, seq=seq, issued_ms=1_700_000_000_000, ttl_s=ttl_s), lease_s)


FULL = Message(
    type=MessageType.GET_ENTRIES,
    key=KEY,
    record=kad.Record(b"/v/key", b"value"),
    closer_peers=(KadPeer(ALICE.peer_id, (ADDR,), kad.Connection.CONNECTED),),
    provider_peers=(KadPeer(ALICE.peer_id),),
    entries=(leased(), leased(b"", seq=6)),
    sender=KadPeer(ALICE.peer_id, (ADDR, ADDR)),
    cursor=b"next",
    have=bytes(2 * TAG_BYTES),
    stale=(Stale(ALICE.peer_id, 99),),
    accepted=3,
    coordinate=(0.25, -0.5, 0.125, 1.0),
)


def test_round_trip_of_everything():
    assert Message.decode(FULL.encode()) == FULL
    assert Message.decode(FULL.encode()).entries[0].entry.verify()


@pytest.mark.parametrize("kind", list(MessageType))
def test_round_trip_of_each_type(kind):
    message = Message(type=kind, key=KEY)
    assert Message.decode(message.encode()) == message


def test_golden_find_node_is_libp2ps():
    """Message{type=4 FIND_NODE, key=2}, as js-libp2p sends it."""
    assert Message(type=MessageType.FIND_NODE, key=b"abc").encode() == bytes.fromhex("0804 1203 616263")


def test_absent_type_is_put_value():
    assert Message.decode(b"").type is MessageType.PUT_VALUE


def test_unknown_fields_and_unknown_transports_are_skipped():
    strange = protobuf.encode([(1, 4), (55, b"new"), (8, protobuf.encode([(1, ALICE.peer_id.raw), (2, b"\xff")]))])
    message = Message.decode(strange)
    assert message.closer_peers == (KadPeer(ALICE.peer_id, (b"\xff",)),)


def test_providers_beyond_twenty_are_not_read():
    """js-libp2p names all it knows."""
    many = [(9, protobuf.encode([(1, ALICE.peer_id.raw)]))] * (kad.MAX_PEERS + 5)
    assert len(Message.decode(protobuf.encode([(1, 3), *many])).provider_peers) == kad.MAX_PEERS


def test_golden_coordinate():
    """Field 106, 16 bytes: 1.0, -2.0, 0.5, 0.25."""
    message = Message(type=MessageType.PING, coordinate=(1.0, -2.0, 0.5, 0.25))
    assert message.encode() == bytes.fromhex("0805 d20610 0000803f 000000c0 0000003f 0000803e")


def raw_entry(**changes):
    entry = leased().entry
    fields = {
        1: entry.subkey.raw, 2: entry.payload, 3: entry.seq, 4: entry.issued_ms,
        5: entry.ttl_s, 6: entry.signature, 7: 60,
    } | {int(name[1:]): value for name, value in changes.items()}  # fmt: skip
    return protobuf.encode([(1, 65), (2, KEY), (100, protobuf.encode(list(fields.items())))])


def test_raw_entry_is_fine_as_such():
    assert Message.decode(raw_entry()).entries == (leased(),)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        protobuf.encode([(1, 99)]),
        protobuf.encode([(1, b"4")]),
        protobuf.encode([(1, 4), (2, bytes(kad.MAX_KEY_BYTES + 1))]),
        protobuf.encode([(1, 65), (2, KEY), (102, bytes(kad.MAX_CURSOR_BYTES + 1))]),
        protobuf.encode([(1, 65), (2, KEY), (103, bytes(TAG_BYTES + 1))]),
        protobuf.encode([(1, 65), (2, KEY), (103, bytes(kad.MAX_HAVE_BYTES + TAG_BYTES))]),
        protobuf.encode([(1, 4), (8, protobuf.encode([(1, b"no peer id")]))]),
        protobuf.encode([(1, 4)] + [(8, protobuf.encode([(1, ALICE.peer_id.raw)]))] * (kad.MAX_PEERS + 1)),
        protobuf.encode([(1, 64), (2, KEY[:31]), (100, kad.encode_entry(leased()))]),
        protobuf.encode([(1, 64), (2, KEY)] + [(100, kad.encode_entry(leased()))] * (kad.PAGE_ENTRIES + 1)),
        protobuf.encode([(1, 64), (2, KEY), (104, protobuf.encode([(1, ALICE.peer_id.raw), (2, MAX_SEQ + 1)]))]),
        protobuf.encode([(1, 0), (3, protobuf.encode([(2, bytes(kad.MAX_VALUE_BYTES + 1))]))]),
        protobuf.encode([(1, 4), (106, bytes(15))]),
        protobuf.encode([(1, 4), (106, struct.pack("<4f", 0, 0, math.nan, 0))]),
        protobuf.encode([(1, 4), (106, struct.pack("<4f", math.inf, 0, 0, 0))]),
        raw_entry(f1=b"\x05\x01\x02"),
        raw_entry(f2=bytes(MAX_PAYLOAD_BYTES + 1)),
        raw_entry(f3=MAX_SEQ + 1),
        raw_entry(f5=0),
        raw_entry(f5=MAX_TTL_S + 1),
        raw_entry(f6=b"short"),
        raw_entry(f7=0),
        raw_entry(f7=101),
        bytes(kad.MAX_MESSAGE_BYTES + 1),
    ],
    ids=range(25),
)
def test_bad_bytes_are_the_peers_fault(data):
    with pytest.raises(RemoteProtocolError):
        Message.decode(data)


def test_page_of_entries_is_bounded_in_bytes():
    big = kad.encode_entry(leased(bytes(MAX_PAYLOAD_BYTES)))
    count = kad.PAGE_BYTES // len(big)
    assert count < kad.PAGE_ENTRIES
    Message.decode(protobuf.encode([(1, 64), (2, KEY)] + [(100, big)] * count))
    with pytest.raises(RemoteProtocolError, match="page"):
        Message.decode(protobuf.encode([(1, 64), (2, KEY)] + [(100, big)] * (count + 1)))


@pytest.mark.parametrize("size", [0, 1, 127, 128, MAX_PAYLOAD_BYTES])
def test_entry_size_is_an_upper_bound(size):
    largest = LeasedEntry(sign_entry(ALICE, KEY, bytes(size), seq=MAX_SEQ, issued_ms=MAX_SEQ, ttl_s=600), 600)
    assert len(kad.encode_entry(largest)) <= kad.entry_size(largest.entry)


@given(st.binary(max_size=300))
def test_junk_never_escapes_as_another_error(data):
    try:
        Message.decode(data)
    except RemoteProtocolError:
        pass


def test_mutations_of_a_real_message_never_escape():
    rng = Random(1)
    good = FULL.encode()
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            Message.decode(bytes(bad[: rng.randint(1, len(bad))]))
        except RemoteProtocolError:
            continue
