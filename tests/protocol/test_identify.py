"""identify messages: round trip, unknown transports left out, bounds, text made safe."""

import pytest
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
        signed_record=b"envelope",
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


def incoming(data: bytes, size: int = 1 << 20) -> Identify | None:
    """What a reader makes of a stream that comes in pieces of that size."""
    reader = identify.Incoming()
    for start in range(0, len(data), size):
        if not reader.done:
            reader.feed(data[start : start + size])
    return reader.message


LONG = Identify(
    public_key=KEY.public.marshal(),
    listen_addrs=tuple(Multiaddr.parse(f"/ip4/1.2.3.4/tcp/{port}") for port in range(identify.MAX_ADDRS)),
    protocols=tuple(f"/{number}/{'x' * 200}" for number in range(identify.MAX_PROTOCOLS)),
    observed_addr=ADDRESS,
    protocol_version="v",
    agent_version="a",
    signed_record=bytes(4000),
)


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_a_long_message_travels_in_pieces(size):
    messages = LONG.messages()
    assert 1 < len(messages) <= identify.MAX_MESSAGES
    assert all(len(message) <= identify.MAX_MESSAGE + 2 for message in messages)
    assert incoming(b"".join(messages), size) == LONG
    assert incoming(b"".join(messages)[:-1]).agent_version == "a"  # the end is missing: what was complete counts


def test_what_fits_is_one_message():
    room = identify.MAX_MESSAGE - len(Identify(signed_record=bytes(8000)).encode()) + 8000
    message = Identify(signed_record=bytes(room))
    assert len(message.encode()) == identify.MAX_MESSAGE
    assert message.messages() == [protobuf.delimited(message.encode())]
    assert Identify().messages() == [b"\0"]
    with pytest.raises(RemoteProtocolError, match="limit of 8192"):
        incoming(protobuf.delimited(bytes(identify.MAX_MESSAGE + 1))[:3])


def test_later_messages_add_to_lists_and_replace_the_rest():
    first = Identify(protocols=("/a", "/b"), agent_version="old", observed_addr=ADDRESS, signed_record=b"1")
    second = Identify(protocols=("/b", "/c"), agent_version="new", listen_addrs=(ADDRESS,), signed_record=b"2")
    found = incoming(first.messages()[0] + second.messages()[0])
    assert (found.protocols, found.agent_version) == (("/a", "/b", "/c"), "new")
    assert (found.observed_addr, found.listen_addrs, found.signed_record) == (ADDRESS, (ADDRESS,), b"2")
    assert incoming(b"") is None


def test_messages_and_what_they_add_up_to_are_bounded():
    crowd = [Identify(protocols=tuple(f"/{n}/{m}" for m in range(20))).messages()[0] for n in range(11)]
    found = incoming(b"".join(crowd), 1000)
    assert len(found.protocols) == identify.MAX_PROTOCOLS
    last = Identify(agent_version="the eleventh").messages()[0]
    assert incoming(b"".join([*crowd[:9], last])).agent_version == "the eleventh"
    assert incoming(b"".join([*crowd[:10], last])).agent_version == ""
    addrs = [Identify(listen_addrs=(Multiaddr.parse(f"/memory/{n}"),) * 2).messages()[0] for n in range(1, 10)]
    assert len(incoming(b"".join(addrs)).listen_addrs) == 9


def test_our_own_message_never_takes_more_than_a_reader_reads():
    endless = Identify(protocols=tuple(f"/{number}/{'x' * 4000}" for number in range(100)))
    assert len(endless.messages()) == identify.MAX_MESSAGES


@given(st.binary(max_size=200))
def test_junk_is_the_peers_fault(junk):
    try:
        Identify.decode(junk)
    except RemoteProtocolError:
        pass
