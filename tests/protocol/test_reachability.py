"""AutoNAT messages against js-libp2p's bytes, both ends as a pair, and what a server may be made to dial."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import autonat_v1, protobuf, reachability
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.reachability import (
    CHUNK,
    MAX_ADDRS,
    MAX_DIAL_DATA,
    MAX_MESSAGE,
    MIN_CHUNK,
    Choice,
    Client,
    DialDataRequest,
    DialDataResponse,
    DialRequest,
    DialResponse,
    DialStatus,
    ResponseStatus,
    Server,
    choose,
    decode,
    decode_dial_back,
    encode_dial_back,
    is_public,
    place,
    respond,
    vicinity,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "autonat.json").read_text())
V4, V6 = (Multiaddr.parse(text) for text in ("/ip4/203.0.113.7/tcp/4001", "/ip6/2001:db8::7/tcp/4001"))
OTHER = Multiaddr.parse("/ip4/198.51.100.9/tcp/4001")
NONCE = 0x0123456789ABCDEF
OK = ResponseStatus.OK

GOLDEN = {
    "dial_request": DialRequest((V4, V6), NONCE),
    "dial_data_request": DialDataRequest(1, 54321),
    "dial_data_response": DialDataResponse(bytes(100)),
    "dial_response_ok": DialResponse(OK, 1, DialStatus.OK),
    "dial_response_first": DialResponse(OK, 0, DialStatus.DIAL_ERROR),
    "dial_response_back_error": DialResponse(OK, 0, DialStatus.DIAL_BACK_ERROR),
    "dial_response_refused": DialResponse(ResponseStatus.DIAL_REFUSED),
    "dial_response_rejected": DialResponse(ResponseStatus.REQUEST_REJECTED),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_messages_are_those_of_js_libp2p(name):
    raw = bytes.fromhex(VECTORS["v2"][name])
    assert decode(raw) == GOLDEN[name]
    assert GOLDEN[name].encode() == raw


def test_dial_backs_are_those_of_js_libp2p():
    raw = bytes.fromhex(VECTORS["v2"]["dial_back"])
    assert (encode_dial_back(NONCE), decode_dial_back(raw)) == (raw, NONCE)
    assert bytes.fromhex(VECTORS["v2"]["dial_back_response"]) == reachability.DIAL_BACK_OK


def test_version_1_is_that_of_js_libp2p():
    known = VECTORS["v1"]
    peer = PeerId(bytes.fromhex(known["peer_id"]))
    dial = autonat_v1.Dial(peer, (V4, V6))
    assert autonat_v1.Dial.decode(bytes.fromhex(known["dial"])) == dial
    assert dial.encode().hex() == known["dial"]
    fine = autonat_v1.Answer(autonat_v1.Status.OK, "OK", V4)
    refused = autonat_v1.Answer(autonat_v1.Status.DIAL_REFUSED, "no")
    for answer, raw in ((fine, known["ok"]), (refused, known["refused"])):
        assert autonat_v1.Answer.decode(bytes.fromhex(raw)) == answer
        assert answer.encode().hex() == raw


def delimited(message):
    return protobuf.delimited(message.encode())


def pair(addrs=(V4, V6)):
    client, server = Client(addrs, NONCE), Server()
    server.feed(client.opening)
    assert server.request == DialRequest(tuple(addrs), NONCE)
    return client, server


def test_a_dial_that_costs_nothing():
    client, server = pair()
    assert server.paid
    assert list(client.feed(respond(OK, 0, DialStatus.OK))) == []
    assert (client.response, client.dialed) == (DialResponse(OK, 0, DialStatus.OK), V4)


@pytest.mark.parametrize("size", [1, CHUNK, CHUNK + 1, MAX_DIAL_DATA])
def test_a_dial_that_costs_data(size):
    client, server = pair()
    pieces = list(client.feed(server.bill(1, size)))
    for piece in pieces[:-1]:
        server.feed(piece)
    assert not server.paid
    server.feed(pieces[-1])
    assert server.paid
    list(client.feed(respond(OK, 1, DialStatus.DIAL_ERROR)))
    assert client.dialed == V6


def test_a_client_pays_once_and_not_too_much():
    client, server = pair()
    with pytest.raises(RemoteProtocolError, match="dial data"):
        list(client.feed(server.bill(0, MAX_DIAL_DATA + 1)))
    client, server = pair()
    bill = server.bill(0, 5000)
    list(client.feed(bill))
    with pytest.raises(RemoteProtocolError, match="asks twice"):
        list(client.feed(bill))


def test_a_server_takes_no_data_in_crumbs():
    _, server = pair()
    server.bill(0, MIN_CHUNK + 2)
    with pytest.raises(RemoteProtocolError, match="pieces of 2 bytes"):
        server.feed(delimited(DialDataResponse(b"xx")))
    _, server = pair()
    server.bill(0, MIN_CHUNK + 2)
    server.feed(delimited(DialDataResponse(bytes(MIN_CHUNK))))
    server.feed(delimited(DialDataResponse(b"xx")))
    assert server.paid


@pytest.mark.parametrize(
    "said",
    [
        DialRequest((V4,), 1),
        DialDataResponse(b"x"),
        DialDataRequest(0, 1),
        DialResponse(OK),
    ],
)
def test_a_server_is_told_nothing_else(said):
    _, server = pair()
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        server.feed(delimited(said))


@pytest.mark.parametrize("said", [DialRequest((V4,), 1), DialDataResponse(b"x")])
def test_a_client_is_told_nothing_else(said):
    client, _ = pair()
    with pytest.raises(RemoteProtocolError, match="client's message"):
        list(client.feed(delimited(said)))


@pytest.mark.parametrize("said", [DialResponse(OK, 2, DialStatus.OK), DialDataRequest(2, 30_000)])
def test_a_client_hears_of_no_address_it_did_not_name(said):
    client, _ = pair()
    with pytest.raises(RemoteProtocolError, match="address 2 of 2"):
        list(client.feed(delimited(said)))


def test_a_response_is_the_last_word():
    client, _ = pair()
    with pytest.raises(RemoteProtocolError, match="more after"):
        list(client.feed(respond(OK) + respond(OK)))


def test_a_server_bills_once():
    with pytest.raises(LocalProtocolError):
        Server().bill(0, 1)
    _, server = pair()
    server.bill(0, 1)
    with pytest.raises(LocalProtocolError):
        server.bill(0, 1)


def test_unknown_numbers_are_no_result():
    raw = protobuf.encode([(2, protobuf.encode([(1, 7), (3, 99)]))])
    assert decode(raw) == DialResponse(ResponseStatus.INTERNAL_ERROR, 0, DialStatus.UNUSED)


def test_bounds():
    many = DialRequest((V4,) * (MAX_ADDRS + 1), 1)
    assert len(decode(many.encode()).addrs) == MAX_ADDRS
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        Server().feed(protobuf.uvarint(MAX_MESSAGE + 1))
    dial = autonat_v1.Dial(None, (V4,) * (autonat_v1.MAX_ADDRS + 1))
    assert len(autonat_v1.Dial.decode(dial.encode()).addrs) == autonat_v1.MAX_ADDRS


@given(st.binary(max_size=300))
def test_junk_is_refused_or_read(raw):
    for read in (decode, decode_dial_back, autonat_v1.Dial.decode, autonat_v1.Answer.decode):
        try:
            read(raw)
        except RemoteProtocolError:
            continue


PRIVATE = [
    *("0.0.0.0", "10.0.0.7", "100.64.0.1", "127.0.0.1", "169.254.1.1", "172.16.0.1", "172.31.255.255", "192.168.0.1"),
    *("198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:8.8.8.8", "fc00::1", "fe80::1"),
    *("ff02::1",),
]
PUBLIC = ["1.1.1.1", "172.15.0.1", "172.32.0.1", "100.128.0.1", "192.169.0.1", "203.0.113.7", "2001:db8::7", "2600::1"]


def tcp(ip, port=4001):
    return Multiaddr.parse(f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}")


@pytest.mark.parametrize("ip", PRIVATE)
def test_private_addresses_are_not_dialed(ip):
    assert not is_public(tcp(ip))
    assert choose([tcp(ip)], OTHER) is None
    assert choose([OTHER], tcp(ip)) is None, "who shares our network gets no view from outside"


@pytest.mark.parametrize("ip", PUBLIC)
def test_public_addresses_are(ip):
    assert is_public(tcp(ip))
    assert not is_public(tcp(ip, 0))


@pytest.mark.parametrize(
    "text",
    [
        "/dns4/example.org/tcp/4001",
        "/ip4/203.0.113.7/udp/4001/quic-v1",
        f"/ip4/203.0.113.7/tcp/4001/p2p/{PeerId(bytes.fromhex(VECTORS['v1']['peer_id']))}/p2p-circuit",
    ],
)
def test_names_relays_and_other_transports_are_not(text):
    assert choose([Multiaddr.parse(text)], OTHER) is None


def test_the_first_willing_address_is_chosen_and_another_ip_costs():
    private, same_ip = tcp("192.168.0.9"), tcp("198.51.100.9", 5000)
    assert choose([None, private, same_ip, V4], OTHER) == Choice(2, same_ip, costs=False)
    assert choose([None, private, V4, same_ip], OTHER) == Choice(2, V4, costs=True)
    assert choose([V6, V4], OTHER, lambda address: address.ip.version == 4) == Choice(1, V4, costs=True)
    assert choose([], OTHER) is None


def test_one_network_is_a_24_or_a_48():
    assert vicinity(tcp("203.0.113.7")) == vicinity(tcp("203.0.113.200", 1)) != vicinity(tcp("203.0.114.7"))
    assert vicinity(tcp("2001:db8:1::1")) == vicinity(tcp("2001:db8:1:9::2")) != vicinity(tcp("2001:db8:2::1"))
    memory = [Multiaddr.parse(f"/memory/{number}") for number in (1, 2)]
    assert vicinity(memory[0]) != vicinity(memory[1])
    assert place(memory[0]) == place(memory[1])


ASKER = PeerId(bytes.fromhex(VECTORS["v1"]["peer_id"]))


def test_version_1_dials_only_the_askers_ip():
    addrs, answer = autonat_v1.wanted(autonat_v1.Dial(ASKER, (V4, tcp("198.51.100.9", 7), V6)), ASKER, OTHER)
    assert (addrs, answer) == ((tcp("198.51.100.9", 4001), tcp("198.51.100.9", 7)), None)


@pytest.mark.parametrize(
    ("dial", "seen", "status"),
    [
        (autonat_v1.Dial(PeerId(b"\x12\x20" + bytes(32)), (V4,)), V4, autonat_v1.Status.BAD_REQUEST),
        (autonat_v1.Dial(None, (V4,)), tcp("10.0.0.1"), autonat_v1.Status.DIAL_REFUSED),
        (
            autonat_v1.Dial(None, (V4,)),
            Multiaddr.parse(f"{V4}/p2p/{ASKER}/p2p-circuit"),
            autonat_v1.Status.DIAL_REFUSED,
        ),
        (autonat_v1.Dial(None, ()), V4, autonat_v1.Status.DIAL_REFUSED),
        (autonat_v1.Dial(None, (V6,)), V4, autonat_v1.Status.DIAL_REFUSED),
    ],
)
def test_version_1_refuses(dial, seen, status):
    addrs, answer = autonat_v1.wanted(dial, ASKER, seen)
    assert (addrs, answer.status) == ((), status)
