"""multistream-select: golden bytes, pairs of ends, any split, any junk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from swarmnode.protocol import multistream
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.multistream import Dialer, Responder, message

HEADER = b"\x13/multistream/1.0.0\n"


def talk(dialer, responder):
    """Carry bytes back and forth until both are done."""
    to_responder, to_dialer = dialer.opening, b""
    while to_responder or to_dialer:
        to_dialer += responder.feed(to_responder) if to_responder and not responder.done else b""
        to_responder = b""
        if to_dialer and not dialer.done:
            to_responder = dialer.feed(to_dialer)
        to_dialer = b""


def test_known_bytes():
    assert message("/multistream/1.0.0") == HEADER
    assert Dialer(["/noise"]).opening == HEADER + b"\x07/noise\n"
    assert Responder(lambda name: False).feed(HEADER + b"\x03no\n") == HEADER + b"\x03na\n"


@pytest.mark.parametrize(
    ("wanted", "spoken", "agreed"),
    [(["/a"], {"/a"}, "/a"), (["/a", "/b"], {"/b"}, "/b"), (["/a", "/b"], {"/c"}, None)],
)
def test_pairs(wanted, spoken, agreed):
    dialer, responder = Dialer(wanted), Responder(spoken.__contains__)
    talk(dialer, responder)
    assert (dialer.done, dialer.protocol) == (True, agreed)
    assert (responder.protocol, responder.done) == (agreed, agreed is not None)


@given(st.lists(st.integers(1, 12), max_size=20), st.binary(max_size=30))
def test_any_split_and_what_follows(sizes, tail):
    wire = HEADER + message("/none") + message("/echo") + tail
    responder = Responder({"/echo"}.__contains__)
    sizes = iter(sizes)
    reply = b""
    while wire and not responder.done:
        size = next(sizes, len(wire))
        reply += responder.feed(wire[:size])
        wire = wire[size:]
    assert reply == HEADER + message("na") + message("/echo")
    assert responder.leftover + wire == tail


@given(st.binary(max_size=100), st.booleans())
def test_junk_is_the_peers_fault(junk, dialing):
    end = Dialer(["/a", "/b"]) if dialing else Responder({"/a"}.__contains__)
    try:
        end.feed(junk)
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "wire",
    [
        message("/multistream/2.0.0"),
        HEADER + b"\x02no",
        HEADER + message("/other"),
        HEADER + b"\x02\xff\n",
        b"\x81\x08" + bytes(1025),
    ],
)
def test_malformed_answers(wire):
    with pytest.raises(RemoteProtocolError):
        Dialer(["/a"]).feed(wire)


def test_limits_are_exact():
    responder = Responder(lambda name: False)
    proposal = message("/x")
    responder.feed(HEADER + proposal * (multistream.MAX_PROPOSALS - 1))
    with pytest.raises(RemoteProtocolError, match="32 protocols"):
        responder.feed(proposal)
    longest = "/" + "x" * (multistream.MAX_MESSAGE - 2)
    assert Responder(lambda name: True).feed(HEADER + message(longest)).endswith(message(longest))
    with pytest.raises(RemoteProtocolError, match="limit"):
        Responder(lambda name: True).feed(HEADER + message(longest + "x"))


def test_feeding_after_the_end_is_our_own_mistake():
    responder = Responder(lambda name: True)
    responder.feed(HEADER + message("/a"))
    with pytest.raises(LocalProtocolError):
        responder.feed(b"x")
