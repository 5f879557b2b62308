"""Multiaddrs: text and binary forms, the parts a node asks for, malformed input from users and from peers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.multiaddr import MAX_BYTES, Multiaddr

PEER = PrivateKey.from_seed(bytes(32)).peer_id
CERTIFICATE = "uEiDDq4_xNyDorZBH3TlGazyJdOWSwvo4PUo5YHFMrvDE8g"
"""The SHA-256 of some certificate."""
OTHER = PrivateKey.from_seed(bytes(31) + b"\1").peer_id


@pytest.mark.parametrize(
    ("text", "binary"),
    [
        ("/ip4/127.0.0.1/tcp/4001", "047f000001060fa1"),
        ("/ip4/1.2.3.4/udp/1234/quic-v1", "0401020304910204d2cd03"),
        ("/ip6/::1/tcp/80", "2900000000000000000000000000000001060050"),
        ("/dns4/example.com/tcp/443", "360b6578616d706c652e636f6d0601bb"),
        ("/ip4/127.0.0.1/udp/4002/webrtc-direct/certhash/uEiAB", "047f00000191020fa29802d20303122001"),
    ],
)
def test_known_bytes(text, binary):
    assert Multiaddr.parse(text).to_bytes().hex() == binary
    assert str(Multiaddr.from_bytes(bytes.fromhex(binary))) == text


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/0.0.0.0/tcp/0/p2p/{PEER}",
        f"/ip4/9.8.7.6/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{OTHER}",
        "/memory/18446744073709551615",
        "/ip6zone/eth0/ip6/fe80::1/tcp/7",
        "/dnsaddr/bootstrap.libp2p.io",
        "/dns6/a-b.example/tcp/1/ws",
        f"/ip4/1.2.3.4/udp/4001/quic-v1/webtransport/certhash/{CERTIFICATE}/certhash/{CERTIFICATE}/p2p/{PEER}",
        "/dns/a.example/tcp/443/tls/sni/b.example/http",
        "/ip4/1.2.3.4/sctp/5/utp",
        "/ip4/1.2.3.4/dccp/5/udt",
        f"/p2p/{PEER}/p2p-circuit/webrtc/p2p/{OTHER}",
        "/ip4/1.2.3.4/tcp/5/noise",
        "/ip4/1.2.3.4/tcp/5/https",
    ],
)
def test_round_trip(text):
    address = Multiaddr.parse(text)
    assert str(address) == text
    assert Multiaddr.from_bytes(address.to_bytes()) == address


def test_spellings_become_canonical():
    assert str(Multiaddr.parse("/ip6/0:0::1/tcp/080/")) == "/ip6/::1/tcp/80"
    assert str(Multiaddr.parse(f"/ip4/1.1.1.1/tcp/1/ipfs/{PEER}")) == f"/ip4/1.1.1.1/tcp/1/p2p/{PEER}"


def test_parts():
    address = Multiaddr.parse(f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}")
    assert (address.host, address.port, address.peer_id) == ("127.0.0.1", 4001, PEER)
    assert address.is_loopback
    assert address.is_tcp
    assert str(address.without_peer()) == "/ip4/127.0.0.1/tcp/4001"
    assert address.with_peer(OTHER).peer_id == OTHER
    relayed = Multiaddr.parse(f"/ip4/9.8.7.6/tcp/1/p2p/{PEER}/p2p-circuit/p2p/{OTHER}")
    assert relayed.is_relayed
    assert not relayed.is_tcp
    assert relayed.peer_id == OTHER
    assert Multiaddr.parse("/ip4/0.0.0.0/tcp/1").is_unspecified
    assert Multiaddr.parse("/ip6zone/eth0/ip6/fe80::1/tcp/7").host == "fe80::1%eth0"
    assert Multiaddr.parse("/memory/1").is_loopback
    assert Multiaddr.parse("/dns4/localhost/tcp/1").is_loopback


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty|start with"),
        ("127.0.0.1:4001", "start with"),
        ("/ip4/1.2.3/tcp/1", "1.2.3"),
        ("/ip4/1.2.3.4/tcp/65536", "65535"),
        ("/ip4/1.2.3.4/tcp/-1", "65535"),
        ("/ip4/1.2.3.4/tcp", "/tcp needs a value"),
        ("/ip4/1.2.3.4/tcp/1/p2p/Qm123", "peer id"),
        ("/ip5/1.2.3.4", "unknown protocol 'ip5'"),
        ("/dns4/a..b/tcp/1", "DNS name"),
        ("/ip6/fe80::1%eth0/tcp/1", "zone"),
        ("/ip4/1.2.3.4" * 13, "more than 12"),
        ("/" * 2000, "too long"),
        ("/", "empty"),
        ("/ip4/1.2.3.4/udp/1/quic-v1/webtransport/certhash/zQm", "certificate hash"),
        ("/ip4/1.2.3.4/udp/1/quic-v1/webtransport/certhash/u=", "certificate hash"),
        ("/ip4/1.2.3.4/udp/1/quic-v1/webtransport/certhash/uA", "malformed"),
    ],
)
def test_malformed_text_names_the_part(text, part):
    with pytest.raises(ConfigError, match=part):
        Multiaddr.parse(text)


@given(st.binary(max_size=80))
def test_junk_bytes_are_the_peers_fault(data):
    try:
        address = Multiaddr.from_bytes(data)
    except RemoteProtocolError:
        return
    assert Multiaddr.parse(str(address)) == address


@pytest.mark.parametrize("binary", ["3500", "2a00", "c10300", "d20300", "a50300"])
def test_parts_without_their_value(binary):
    with pytest.raises(RemoteProtocolError, match="needs a value"):
        Multiaddr.from_bytes(bytes.fromhex(binary))


@given(st.sampled_from(["35", "36", "37", "38", "2a", "c103", "d203"]), st.binary(max_size=40))
def test_junk_values_of_variable_length(code, value):
    data = bytes.fromhex(code) + bytes((len(value),)) + value
    try:
        address = Multiaddr.from_bytes(data)
    except RemoteProtocolError:
        return
    assert Multiaddr.parse(str(address)).to_bytes() == data


@given(st.text(max_size=60))
def test_junk_text_is_a_config_error(text):
    try:
        Multiaddr.parse(text)
    except ConfigError:
        pass


def test_size_limit_is_exact():
    name = ".".join(["a" * 60] * 4)
    part = Multiaddr.parse(f"/dns4/{name}").to_bytes()
    filler = bytes.fromhex("a202") * ((MAX_BYTES - len(part)) // 2)
    with pytest.raises(RemoteProtocolError, match="more than 12"):
        Multiaddr.from_bytes((part + filler)[:MAX_BYTES])
    with pytest.raises(RemoteProtocolError, match="bytes"):
        Multiaddr.from_bytes(bytes(MAX_BYTES + 1))
