"""Circuit relay messages: js-libp2p's bytes to the byte, every round trip, every tampering."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import protobuf, relay
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.ids import PeerId, PrivateKey
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.relay import (
    CircuitAddress,
    HopMessage,
    HopType,
    Limit,
    Reservation,
    Status,
    StopMessage,
    StopType,
    Voucher,
)

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "relay.json").read_text())
RELAY_KEY = PrivateKey.from_seed(bytes(31) + b"\1")
PEER_KEY = PrivateKey.from_seed(bytes(31) + b"\2")
RELAY, PEER = RELAY_KEY.peer_id, PEER_KEY.peer_id
ADDRESS = Multiaddr.parse(f"/ip4/203.0.113.1/tcp/4001/p2p/{RELAY}")
VOUCHER = Voucher(relay=RELAY, peer=PEER, expires=VECTORS["expires"])
LIMIT = Limit(duration_s=120, data_bytes=131072)


def vector(name):
    return bytes.fromhex(VECTORS[name])


def reserved():
    place = Reservation(expires=VECTORS["expires"], addrs=(ADDRESS,), voucher=VOUCHER.seal(RELAY_KEY))
    return HopMessage(type=HopType.STATUS, status=Status.OK, reservation=place, limit=LIMIT)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reserve", HopMessage(type=HopType.RESERVE)),
        ("connect", HopMessage(type=HopType.CONNECT, peer=PEER)),
        ("reserved", reserved()),
        ("refused", HopMessage(type=HopType.STATUS, status=Status.RESERVATION_REFUSED)),
        ("connected", HopMessage(type=HopType.STATUS, status=Status.OK)),
        ("stop_connect", StopMessage(type=StopType.CONNECT, peer=PEER, limit=LIMIT)),
        ("stop_ok", StopMessage(type=StopType.STATUS, status=Status.OK)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bytes_of_another_implementation(name, message):
    assert message.encode().hex() == VECTORS[name]
    assert type(message).decode(vector(name)) == message


def test_what_others_add_is_read_over():
    connect = HopMessage(type=HopType.CONNECT, peer=PEER)
    assert HopMessage.decode(vector("connect_with_address")) == connect
    assert HopMessage.decode(vector("reserve_py")) == HopMessage(type=HopType.RESERVE, peer=PEER)
    assert HopMessage.decode(connect.encode() + protobuf.encode([(6, b"a signed record")])) == connect


def test_a_type_left_out_is_zero():
    assert HopMessage.decode(b"") == HopMessage(type=HopType.RESERVE)
    assert StopMessage.decode(b"") == StopMessage(type=StopType.CONNECT)


def test_a_voucher_is_for_one_peer_by_one_relay():
    assert VOUCHER.seal(RELAY_KEY).hex() == VECTORS["voucher"]
    assert Voucher.open(vector("voucher"), relay=RELAY, peer=PEER) == VOUCHER
    with pytest.raises(RemoteProtocolError, match="instead of"):
        Voucher.open(vector("voucher"), relay=PEER, peer=PEER)
    with pytest.raises(RemoteProtocolError, match="a voucher of"):
        Voucher.open(vector("voucher"), relay=RELAY, peer=RELAY)
    forged = Voucher(relay=RELAY, peer=PEER, expires=1).seal(PEER_KEY)  # in another relay's name
    with pytest.raises(RemoteProtocolError, match="a voucher of"):
        Voucher.open(forged, relay=PEER, peer=PEER)


@pytest.mark.parametrize("at", range(0, len(VECTORS["voucher"]) // 2, 7))
def test_a_changed_voucher_is_none(at):
    changed = bytearray(vector("voucher"))
    changed[at] ^= 1
    with pytest.raises(RemoteProtocolError):
        Voucher.open(bytes(changed), relay=RELAY, peer=PEER)


def test_numbers_out_of_range():
    with pytest.raises(RemoteProtocolError, match="unknown type 3"):
        HopMessage.decode(b"\x08\x03")
    with pytest.raises(RemoteProtocolError, match="unknown type 2"):
        StopMessage.decode(b"\x08\x02")
    assert HopMessage.decode(b"\x08\x02\x28\x65").status is Status.UNUSED
    assert StopMessage.decode(b"\x08\x01\x20\xff\xff\x03").status is Status.UNUSED


@pytest.mark.parametrize("name", ["connect_with_address", "reserved", "stop_connect", "stop_ok"])
def test_cut_short(name):
    """A prefix either is a smaller message or none, and never an accident."""
    whole = vector(name)
    kind = StopMessage if name.startswith("stop") else HopMessage
    for size in range(len(whole)):
        try:
            kind.decode(whole[:size])
        except RemoteProtocolError:
            continue


def test_addresses_are_bounded_and_unknown_ones_left_out():
    many = [(2, Multiaddr.parse(f"/ip4/1.2.3.4/tcp/{port}").to_bytes()) for port in range(1, 100)]
    found = Reservation.decode(protobuf.encode([(1, 5), (2, b"\xff\xff\x03x"), *many]))
    assert len(found.addrs) == relay.MAX_ADDRS - 1  # what is cut off is cut off before it is parsed
    assert found.addrs[0].port == 1


@pytest.mark.parametrize(
    ("limit", "ample"),
    [
        (Limit(), True),
        (LIMIT, False),
        (Limit(duration_s=relay.AMPLE_S, data_bytes=relay.AMPLE_BYTES), True),
        (Limit(duration_s=relay.AMPLE_S - 1), False),
        (Limit(data_bytes=relay.AMPLE_BYTES - 1), False),
    ],
)
def test_which_limits_hinder(limit, ample):
    assert limit.is_ample is ample


PREFIX = f"/ip4/203.0.113.1/tcp/4001/p2p/{RELAY}"


def test_the_parts_of_a_circuit_address():
    place = Multiaddr.parse("/ip4/203.0.113.1/tcp/4001")
    whole = Multiaddr.parse(f"{PREFIX}/p2p-circuit/p2p/{PEER}")
    assert CircuitAddress.of(whole) == CircuitAddress(RELAY, place, PEER)
    assert CircuitAddress.of(whole.without_peer()) == CircuitAddress(RELAY, place, None)
    assert relay.through(place, RELAY) == whole.without_peer()
    assert relay.through(place, RELAY).with_peer(PEER) == whole
    assert CircuitAddress.of(Multiaddr.parse(f"/p2p/{RELAY}/p2p-circuit")) == CircuitAddress(RELAY, Multiaddr(()), None)


@pytest.mark.parametrize(
    "text",
    [
        PREFIX,
        "/ip4/203.0.113.1/tcp/4001/p2p-circuit",  # whose relay?
        f"/p2p-circuit/p2p/{PEER}",
        f"{PREFIX}/p2p-circuit/p2p/{PEER}/p2p-circuit",  # over two relays
        f"{PREFIX}/p2p-circuit/ip4/10.0.0.1/tcp/1/p2p/{PEER}",
    ],
)
def test_other_addresses_are_no_circuit(text):
    assert CircuitAddress.of(Multiaddr.parse(text)) is None


peers = st.integers(1, 5).map(lambda n: PrivateKey.from_seed(n.to_bytes(32, "big")).peer_id)
limits = st.builds(Limit, duration_s=st.integers(0, 2**32 - 1), data_bytes=st.integers(0, 2**64 - 1))
places = st.builds(
    Reservation,
    expires=st.integers(0, 2**64 - 1),
    addrs=st.lists(st.just(ADDRESS), max_size=4).map(tuple),
    voucher=st.binary(max_size=200),
)
statuses = st.sampled_from(Status)


@given(
    st.builds(
        HopMessage,
        type=st.sampled_from(HopType),
        peer=st.none() | peers,
        reservation=st.none() | places,
        limit=st.none() | limits,
        status=st.none() | statuses,
    )
)
def test_hop_round_trip(message):
    assert HopMessage.decode(message.encode()) == message


@given(
    st.builds(
        StopMessage,
        type=st.sampled_from(StopType),
        peer=st.none() | peers,
        limit=st.none() | limits,
        status=st.none() | statuses,
    )
)
def test_stop_round_trip(message):
    assert StopMessage.decode(message.encode()) == message


@given(st.binary(max_size=300))
def test_junk(data):
    for kind in (HopMessage, StopMessage):
        try:
            found = kind.decode(data)
        except RemoteProtocolError:
            continue
        assert kind.decode(found.encode()) == found
        assert found.peer is None or isinstance(found.peer, PeerId)
