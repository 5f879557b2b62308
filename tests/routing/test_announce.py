"""Announcements: the encoding keeps everything, is bounded, and hostile bytes only raise RemoteProtocolError."""

import hashlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing.announce import (
    MAX_ADDRESS_BYTES,
    MAX_ADDRESSES,
    MAX_BLOCK_S,
    MAX_BLOCKS,
    MAX_BYTES,
    MAX_NAME,
    MAX_PUBLIC_NAME,
    MAX_QUANT,
    Announcement,
    ModelListing,
    State,
    kv_bucket,
    newest,
)
from swarmnode.routing.coordinates import Coordinate


def peer(number):
    return PeerId(b"\x12\x20" + hashlib.sha256(str(number).encode()).digest())


def announcement(**changes):
    fields = {
        "model": "gemma3-270m",
        "digest": bytes(range(32)),
        "peer": peer(1),
        "addrs": (Multiaddr.parse("/ip4/10.0.0.1/tcp/4001"),),
        "start": 0,
        "end": 9,
        "num_blocks": 18,
        "state": State.ONLINE,
        "compute_class": b"class-01",
        "prefill_s": 0.02,
        "decode_s": 0.001,
        "kv_free": 4096,
    }
    return Announcement(**(fields | changes))


def wire(**changes):
    """The fields of a sound record, with some replaced (None removes one), packed."""
    fields = msgpack.unpackb(announcement().encode(), strict_map_key=False)
    fields |= {int(key[1:]): value for key, value in changes.items()}
    return msgpack.packb({key: value for key, value in fields.items() if value is not None})


@st.composite
def announcements(draw):
    num_blocks = draw(st.integers(1, MAX_BLOCKS))
    start = draw(st.integers(0, num_blocks - 1))
    end = draw(st.integers(start + 1, num_blocks))
    text = st.text("abcXYZ 09-_.é漢", min_size=1, max_size=8)
    return announcement(
        model=draw(text),
        digest=draw(st.binary(min_size=32, max_size=32)),
        addrs=tuple(
            Multiaddr.parse(f"/ip4/10.1.2.3/tcp/{port}") for port in draw(st.lists(st.integers(1, 65535), max_size=4))
        ),
        start=start,
        end=end,
        num_blocks=num_blocks,
        state=draw(st.sampled_from(State)),
        prefill_s=draw(st.floats(0, MAX_BLOCK_S)),
        decode_s=draw(st.floats(0, MAX_BLOCK_S)),
        kv_free=kv_bucket(draw(st.integers(-5, 1 << 40))),
        embed=start == 0 and draw(st.booleans()),
        head=end == num_blocks and draw(st.booleans()),
        quant=draw(text),
        public_name=draw(text),
        coordinate=draw(st.none() | st.builds(Coordinate, x=st.floats(-1, 1), height=st.floats(0, 1))),
    )


@given(announcements())
def test_round_trip(sent):
    assert Announcement.decode(sent.peer, sent.encode()) == sent


def test_the_largest_announcement_fits():
    name = "a" * 60 + ".com"
    address = Multiaddr.parse(f"/dns4/{name}/tcp/65535")
    address = address.with_peer(PeerId(bytes((0, 18)) + bytes(18)))
    assert len(address.to_bytes()) <= MAX_ADDRESS_BYTES
    largest = announcement(
        model="m" * MAX_NAME,
        addrs=(address,) * MAX_ADDRESSES,
        start=MAX_BLOCKS - 1,
        end=MAX_BLOCKS,
        num_blocks=MAX_BLOCKS,
        head=True,
        kv_free=1 << 30,
        quant="q" * MAX_QUANT,
        public_name="p" * MAX_PUBLIC_NAME,
        coordinate=Coordinate(x=0.1, y=0.2, height=0.3, error=0.4),
    )
    room = MAX_ADDRESSES * (MAX_ADDRESS_BYTES - len(address.to_bytes()))
    assert len(largest.encode()) + room <= MAX_BYTES


@given(st.binary(max_size=MAX_BYTES + 50))
def test_junk_is_a_remote_error(junk):
    with pytest.raises(RemoteProtocolError):
        Announcement.decode(peer(1), junk)
    with pytest.raises(RemoteProtocolError):
        ModelListing.decode(junk)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=80)
    | st.binary(max_size=120),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.integers(0, 20), inner, max_size=4),
    max_leaves=6,
)


@given(st.integers(1, 15), JUNK)
def test_a_junk_field_never_gets_through_unchecked(key, value):
    fields = msgpack.unpackb(announcement().encode(), strict_map_key=False) | {key: value}
    try:
        decoded = Announcement.decode(peer(1), msgpack.packb(fields))
    except RemoteProtocolError:
        return
    assert Announcement.decode(peer(1), decoded.encode()) == decoded


def test_unknown_keys_are_ignored():
    assert Announcement.decode(peer(1), wire(k99=[1, 2], k98="later")) == announcement()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        msgpack.packb([1, 2]),
        msgpack.packb({1: msgpack.ExtType(5, b"x")}),
        msgpack.packb({1: "x"}),
        b"\x81\x91\x01\x02",
        b"\x91" * 600,
        wire(k1="a\x1b[31m"),
        wire(k1="é" * 40),
        wire(k2=bytes(31)),
        wire(k3=[bytes(5)]),
        wire(k3=[Multiaddr.parse("/ip4/1.2.3.4/tcp/1").to_bytes()] * 5),
        wire(k3=[Multiaddr.parse("/dns/" + "a" * 60 + "." + "b" * 60 + "/tcp/1").to_bytes()]),
        wire(k4=9),
        wire(k5=19),
        wire(k4=-1),
        wire(k4=True),
        wire(k7=3),
        wire(k8=b"short"),
        wire(k9=float("nan")),
        wire(k9=-1.0),
        wire(k10=float("inf")),
        wire(k10="fast"),
        wire(k10=None),
        wire(k11=4097),
        wire(k11=1 << 31),
        wire(k12=2),
        wire(k15=[0.0, 0.0, 0.0]),
        wire(k15=[0.0, 0.0, float("nan"), 0.5]),
        wire(k15=[99.0, 0.0, 0.0, 0.5]),
        wire(k99="x" * MAX_BYTES),
    ],
)
def test_hostile_records(payload):
    with pytest.raises(RemoteProtocolError):
        Announcement.decode(peer(1), payload)


def test_our_own_nonsense_is_a_config_error():
    with pytest.raises(ConfigError, match="span 9:9"):
        announcement(start=9)
    with pytest.raises(ConfigError, match="block 0 embeds"):
        announcement(start=1, embed=True)
    with pytest.raises(ConfigError, match="over 700"):
        announcement(addrs=(Multiaddr.parse("/dns/" + ".".join(["a" * 60] * 3) + "/tcp/1"),) * 4).encode()


def test_kv_buckets_never_promise_more_than_there_is():
    assert [kv_bucket(n) for n in (-1, 0, 63, 64, 127, 128, 1 << 50)] == [0, 0, 0, 64, 64, 128, 1 << 30]


def test_newest_keeps_the_last_of_each_peer():
    old, new, other = announcement(), announcement(start=3), announcement(peer=peer(2))
    assert set(newest([old, other, new])) == {new, other}


def test_listing_round_trip():
    listing = ModelListing(name="gemma3-270m", digest=bytes(32), num_blocks=18, family="gemma3", hidden_size=640)
    assert ModelListing.decode(listing.encode()) == listing
    with pytest.raises(ConfigError):
        ModelListing(name="", digest=bytes(32), num_blocks=18, family="gemma3", hidden_size=640)
