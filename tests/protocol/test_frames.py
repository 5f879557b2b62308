"""Frames and messages: round trips, bounds at their exact values, and junk of every kind."""

import dataclasses
import random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import messages
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.frames import MAX_HEADER, MAX_ITEMS, PREFIX, pack, unpack_header, unpack_prefix
from swarmnode.protocol.messages import TO_CLIENT, TO_SERVER, Attach, Data, Open, Truncate
from swarmnode.protocol.wire import Message

ALL = [m for m in vars(messages).values() if isinstance(m, type) and issubclass(m, Message) and m is not Message]
PETALS_KILLER = b"\x91" * 930
"""Nested arrays of this size crashed the serializer Petals uses (docs/security.md)."""


def sample(kind: type[Message], rng: random.Random) -> Message:
    """A message with every field at some legal value."""
    values = {}
    for field in dataclasses.fields(kind):
        candidates = [0, 1, 7, True, False, b"", b"x" * 8, b"y" * 16, b"z" * 32, "", "word", 0.5, [], [1, 2], ["/a"]]
        rng.shuffle(candidates)
        value = next(c for c in candidates if field.metadata["wire"].check(c))
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_wire(kind):
    for seed in range(20):
        message = sample(kind, random.Random(seed))
        frame = pack(message.to_header(), 5)
        header_size, payload_size = unpack_prefix(frame[: PREFIX.size], 5)
        assert (header_size, payload_size) == (len(frame) - PREFIX.size, 5)
        assert kind.from_header(unpack_header(frame[PREFIX.size :])) == message


def test_kinds_are_unique_within_a_protocol():
    kinds = [kind.kind for kind in ALL]
    assert len(set(kinds)) == len(kinds)


def test_unknown_fields_are_ignored_and_unknown_kinds_are_not():
    header = Attach(session=b"s" * 16, start=3).to_header()
    header[99] = "from the future"
    assert TO_SERVER.parse(header) == Attach(session=b"s" * 16, start=3)
    with pytest.raises(RemoteProtocolError, match="unknown message kind 77"):
        TO_SERVER.parse({0: 77})
    with pytest.raises(RemoteProtocolError, match="unknown message kind"):
        TO_CLIENT.parse(header)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({1: b"short"}, "session"),
        ({1: None}, "session"),
        ({4: -1}, "position"),
        ({4: messages.MAX_POSITION + 1}, "position"),
        ({5: 0}, "count"),
        ({5: messages.MAX_ROWS + 1}, "count"),
        ({5: True}, "count"),
        ({2: 1.5}, "epoch"),
        ({3: [0]}, "lane"),
    ],
)
def test_a_field_out_of_bounds_is_the_peers_fault(changes, fault):
    header = Data(session=b"s" * 16, epoch=1, position=2).to_header() | changes
    with pytest.raises(RemoteProtocolError, match=rf"Data\.{fault} must be"):
        TO_SERVER.parse(header)


def test_a_missing_field_is_named():
    header = Truncate(session=b"s" * 16, epoch=1, position=2).to_header()
    del header[4]
    with pytest.raises(RemoteProtocolError, match="Truncate lacks its field position"):
        TO_SERVER.parse(header)


def test_our_own_bad_value_is_our_bug():
    with pytest.raises(LocalProtocolError, match=r"Data\.count"):
        Data(session=b"s" * 16, epoch=1, position=2, count=0).to_header()


def test_bounds_are_exact():
    assert unpack_prefix(PREFIX.pack(MAX_HEADER, 100), 100) == (MAX_HEADER, 100)
    for sizes in ((MAX_HEADER + 1, 0), (0, 101)):
        with pytest.raises(RemoteProtocolError, match="over"):
            unpack_prefix(PREFIX.pack(*sizes), 100)
    assert len(unpack_header(msgpack.packb(dict.fromkeys(range(MAX_ITEMS), 0)))) == MAX_ITEMS
    with pytest.raises(RemoteProtocolError):
        unpack_header(msgpack.packb(dict.fromkeys(range(MAX_ITEMS + 1), 0)))
    with pytest.raises(RemoteProtocolError):
        unpack_header(msgpack.packb({1: [0] * (MAX_ITEMS + 1)}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x80\x80",
        PETALS_KILLER,
        b"\x81\x01" + PETALS_KILLER,
        msgpack.packb([1, 2]),
        msgpack.packb({"text": 1}),
        msgpack.packb({1: {2: 3}}),
        msgpack.packb({1: [[2]]}),
        msgpack.packb({1: msgpack.ExtType(5, b"x")}),
        msgpack.packb({1: msgpack.Timestamp(0)}),
        b"\x81\x01\xdd\xff\xff\xff\xff",
        b"\x81\x01\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
    ],
    ids=repr,
)
def test_hostile_headers_are_the_peers_fault(body):
    with pytest.raises(RemoteProtocolError):
        unpack_header(body)


@given(st.binary(max_size=200))
def test_junk_is_an_error_or_a_flat_map(body):
    try:
        header = unpack_header(body)
    except RemoteProtocolError:
        return
    for catalogue in (TO_SERVER, TO_CLIENT):
        try:
            catalogue.parse(header)
        except RemoteProtocolError:
            continue


def test_mutated_frames_are_an_error_or_a_message():
    rng = random.Random(1)
    frames = [pack(sample(kind, rng).to_header())[PREFIX.size :] for kind in (Open, Data, Truncate, Attach)]
    for _ in range(5_000):
        body = bytearray(rng.choice(frames))
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        try:
            TO_SERVER.parse(unpack_header(bytes(body)))
        except RemoteProtocolError:
            continue


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (b"\x81\x01\xcd\x00\x07", {1: 7}),  # an integer longer than need be
        (b"\xdf\x00\x00\x00\x01\x01\x07", {1: 7}),  # and a map
        (b"\x82\x01\x07\x01\x08", {1: 8}),  # the last of equal keys
        (b"\x81\x01\xa1a", {1: "a"}),
        (b"\x81\x01\xc4\x01a", {1: b"a"}),
        (b"\x81\xff\xca\x3f\x80\x00\x00", {-1: 1.0}),
    ],
)
def test_every_encoding_of_a_value_is_read(body, header):
    found = unpack_header(body)
    assert found == header
    assert [type(value) for value in found.values()] == [type(value) for value in header.values()]


@pytest.mark.parametrize(
    "body", [b"\x81\x01\xa1\xc3", b"\x81\x01\xa3\xed\xa0\x80", b"\x81\xc3\x01", b"\x81\x01\x01\x00"]
)
def test_text_that_is_no_utf8_keys_that_are_no_integers_and_bytes_behind(body):
    with pytest.raises(RemoteProtocolError):
        unpack_header(body)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({3: True}, "retry_after_s"),
        ({3: float("nan")}, "retry_after_s"),
        ({3: -0.1}, "retry_after_s"),
        ({2: b"full"}, "reason"),
        ({1: 1.0}, "code"),
    ],
)
def test_types_are_never_taken_for_one_another(changes, fault):
    header = messages.Refused(code=1, reason="full", retry_after_s=2).to_header()
    assert TO_CLIENT.parse(header) == messages.Refused(code=1, reason="full", retry_after_s=2)
    with pytest.raises(RemoteProtocolError, match=rf"Refused\.{fault} must be"):
        TO_CLIENT.parse(header | changes)
