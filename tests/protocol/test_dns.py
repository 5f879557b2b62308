"""TXT questions and answers against zeroconf's codec, hostile answers, and what /dnsaddr stands for."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import dns
from swarmnode.protocol.dns import NoSuchName, Truncated, dnsaddr_targets, txt_answer, txt_query
from swarmnode.protocol.errors import ConfigError, RemoteProtocolError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.multiaddr import Multiaddr
from zeroconf import DNSIncoming, DNSOutgoing, DNSQuestion, DNSText

NAME = "_dnsaddr.example.org"
PEERS = [PrivateKey.from_seed(bytes([number]) * 32).peer_id for number in (1, 2)]


def answer(*texts, number=7, flags=0x8180, name=NAME):
    """An answer as zeroconf writes it, with compressed names; texts are tuples of strings."""
    out = DNSOutgoing(flags, multicast=False)
    out.add_question(DNSQuestion(name + ".", 16, 1))
    for strings in texts:
        data = b"".join(bytes((len(one),)) + one.encode() for one in strings)
        out.add_answer_at_time(DNSText(name + ".", 16, 1, 60, data), 0)
    (packet,) = out.packets()
    return struct.pack("!H", number) + packet[2:]


def test_a_question_reads_as_meant():
    query = txt_query(7, NAME)
    (question,) = DNSIncoming(query).questions
    assert (question.name, question.type, question.class_) == (NAME + ".", 16, 1)
    assert query[:4] == b"\x00\x07\x01\x00"


def test_answers_are_read():
    found = txt_answer(7, txt_query(7, NAME), answer(("dnsaddr=/ip4/1.2.3.4/tcp/1",), ("a", "b")))
    assert found == ["dnsaddr=/ip4/1.2.3.4/tcp/1", "ab"]
    assert txt_answer(7, txt_query(7, NAME.upper()), answer(("x",))) == ["x"], "names have no case"


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (answer(("x",), number=8), RemoteProtocolError),
        (answer(("x",), flags=0x0100), RemoteProtocolError),
        (answer(("x",), name="_dnsaddr.evil.org"), RemoteProtocolError),
        (answer(flags=0x8183), NoSuchName),
        (answer(flags=0x8182), RemoteProtocolError),
        (answer(flags=0x8380), Truncated),
        (answer(("x",))[:-1], RemoteProtocolError),
        (b"", RemoteProtocolError),
    ],
)
def test_other_answers_are_not(made, error):
    with pytest.raises(error):
        txt_answer(7, txt_query(7, NAME), made)


@given(st.binary(max_size=200))
def test_junk_is_refused_or_read(raw):
    query = txt_query(7, NAME)
    for packet in (raw, b"\x00\x07\x81\x80\x00\x01\x00\x05\x00\x00\x00\x00" + query[12:-11] + raw):
        try:
            assert all(len(text) <= dns.MAX_TEXT for text in txt_answer(7, query, packet))
        except (RemoteProtocolError, Truncated):
            continue


def test_records_are_bounded():
    made = bytearray(answer(("x",)))
    record = made[-14:]
    made[6:8] = struct.pack("!H", dns.MAX_RECORDS + 9)
    many = bytes(made[:-14] + record * (dns.MAX_RECORDS + 9))
    assert len(txt_answer(7, txt_query(7, NAME), many)) == dns.MAX_RECORDS


@pytest.mark.parametrize("name", ["", "a..b", "x" * 64 + ".org", ".".join(["abc"] * 70)])
def test_what_is_no_name(name):
    with pytest.raises(ConfigError):
        txt_query(1, name)


def test_what_a_dnsaddr_stands_for():
    texts = [f"dnsaddr=/ip4/1.1.1.{n}/tcp/4001/p2p/{peer}" for n, peer in enumerate(PEERS)]
    texts += ["dnsaddr=nonsense", "v=spf1", "dnsaddr=/dnsaddr/deeper.example.org"]
    anybody, second = Multiaddr.parse("/dnsaddr/example.org"), Multiaddr.parse(f"/dnsaddr/example.org/p2p/{PEERS[1]}")
    assert dns.dnsaddr_name(anybody) == NAME
    assert dns.dnsaddr_name(Multiaddr.parse("/ip4/1.1.1.1/tcp/1")) is None
    assert [str(one) for one in dnsaddr_targets(anybody, texts)] == [
        text.removeprefix("dnsaddr=") for text in (texts[0], texts[1], texts[4])
    ]
    assert [str(one) for one in dnsaddr_targets(second, texts)] == [texts[1].removeprefix("dnsaddr=")]
