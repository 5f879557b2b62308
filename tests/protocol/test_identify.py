"""identify messages: round trip, unknown transports left out, bounds, text made safe."""

from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import identify, protobuf
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.identify import Identify
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.multiaddr import Multiaddr

KEY = PrivateKey.from_seed(bytes(32))
ADDRESS = Multiaddr.parse("/ip4/1.2.3.4/tcp/4001")


def test_round_trip():
    message = Identify(
        public_key=KEY.public.marshal(),
        listen_addrs=(ADDRESS, Multiaddr.parse("/ip6/::1/tcp/9")),
        protocols=("/ipfs/ping/1.0.0", "/x"),
        observed_addr=ADDRESS,
        protocol_version="v",
        agent_version="swarmnode/1",
    )
    assert Identify.decode(message.encode()) == message
    assert Identify.decode(b"") == Identify()


def test_addresses_we_cannot_parse_are_left_out():
    unknown = bytes.fromhex("d103") + b"\1\2"  # webtransport
    data = protobuf.encode([(2, unknown), (2, ADDRESS.with_peer(KEY.peer_id).to_bytes()), (4, unknown)])
    message = Identify.decode(data)
    assert message.listen_addrs == (ADDRESS,)
    assert message.observed_addr is None


def test_lists_are_bounded():
    fields = [(2, ADDRESS.to_bytes())] * (identify.MAX_ADDRS + 1) + [(3, "/p")] * (identify.MAX_PROTOCOLS + 1)
    message = Identify.decode(protobuf.encode(fields))
    assert len(message.listen_addrs) == identify.MAX_ADDRS
    assert len(message.protocols) == identify.MAX_PROTOCOLS


def test_a_peer_cannot_draw_on_our_terminal():
    message = Identify.decode(protobuf.encode([(6, "evil\x1b[2J\u202e" + "x" * 500)]))
    assert message.agent_version.startswith("evil?[2J?xxx")
    assert len(message.agent_version) == identify.MAX_AGENT


@given(st.binary(max_size=200))
def test_junk_is_the_peers_fault(junk):
    try:
        Identify.decode(junk)
    except RemoteProtocolError:
        pass
