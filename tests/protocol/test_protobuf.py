"""Mini protobuf codec: golden bytes, round trips, any split, any junk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import protobuf
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError

values = st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=40))
pairs = st.lists(st.tuples(st.integers(1, 2**29 - 1), values), max_size=20)


def test_known_bytes():
    # the examples of the protocol buffers encoding guide
    assert protobuf.encode([(1, 150)]) == bytes.fromhex("089601")
    assert protobuf.encode([(2, "testing")]) == bytes.fromhex("120774657374696e67")
    assert protobuf.decode(bytes.fromhex("0d01000000" + "110200000000000000")) == {1: [1], 2: [2]}


@given(pairs)
def test_round_trip_keeps_order_within_a_field(fields):
    expected = {}
    for number, value in fields:
        expected.setdefault(number, []).append(value)
    assert protobuf.decode(protobuf.encode(fields)) == expected


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varint_round_trip(number, tail):
    data = protobuf.uvarint(number)
    assert protobuf.read_uvarint(data + tail, 0) == (number, len(data))


@given(st.binary(max_size=200))
def test_junk_is_the_peers_fault(data):
    try:
        protobuf.decode(data)
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "junk",
    [
        b"\x08",  # value missing
        b"\x12\x05abc",  # shorter than it says
        b"\x0b",  # group
        b"\x00\x00",  # field 0
        b"\x80" * 11,  # endless varint
        b"\x08" + b"\xff" * 9 + b"\x7f",  # over 64 bits
        b"\x12" + b"\xff" * 9 + b"\x01",  # 16 exbibytes
        b"\x08\x01" * (protobuf.MAX_FIELDS + 1),
    ],
)
def test_malformed_messages(junk):
    with pytest.raises(RemoteProtocolError):
        protobuf.decode(junk)


def test_exactly_the_most_fields_are_accepted():
    assert len(protobuf.decode(b"\x08\x01" * protobuf.MAX_FIELDS)[1]) == protobuf.MAX_FIELDS


def test_own_mistakes_are_local():
    for number in (-1, 1 << 64):
        with pytest.raises(LocalProtocolError):
            protobuf.uvarint(number)


def test_typed_access():
    fields = protobuf.decode(protobuf.encode([(1, 7), (2, b"x"), (2, b"y"), (1, 8)]))
    assert protobuf.first_int(fields, 1) == 8
    assert protobuf.first_bytes(fields, 2) == b"y"
    assert protobuf.all_bytes(fields, 2) == [b"x", b"y"]
    assert (protobuf.first_int(fields, 3, 5), protobuf.first_bytes(fields, 3)) == (5, b"")
    for wrong in (lambda: protobuf.first_int(fields, 2), lambda: protobuf.all_bytes(fields, 1)):
        with pytest.raises(RemoteProtocolError):
            wrong()
    with pytest.raises(RemoteProtocolError):
        protobuf.text(b"\xff")


@given(st.lists(st.binary(max_size=300), max_size=6), st.data())
def test_delimited_under_any_split(messages, data):
    wire = b"".join(map(protobuf.delimited, messages))
    splitter = protobuf.Delimited(300)
    found = []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        found += splitter.feed(wire[:size])
        wire = wire[size:]
    assert found == messages
    assert splitter.pending == b""


def test_delimited_limit_is_exact_and_checked_before_buffering():
    assert list(protobuf.Delimited(10).feed(protobuf.delimited(bytes(10)))) == [bytes(10)]
    with pytest.raises(RemoteProtocolError):
        list(protobuf.Delimited(10).feed(protobuf.uvarint(11)))


def test_delimited_keeps_what_follows():
    splitter = protobuf.Delimited(10)
    assert list(splitter.feed(protobuf.delimited(b"one") + b"\x05ta")) == [b"one"]
    assert splitter.pending == b"\x05ta"
