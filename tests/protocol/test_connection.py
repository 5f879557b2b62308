"""Whole connections as pairs: both muxer negotiations, pipelining, any split, tampering, plain junk."""

import random

import pytest
from helpers.muxes import ALICE, BOB, ConnectionPair
from hypothesis import given, settings
from hypothesis import strategies as st
from swarmnode.protocol.connection import Connection, Phase
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.multistream import message
from swarmnode.protocol.noise import StaticKey, WrongPeer
from swarmnode.protocol.yamux import Opened


@pytest.mark.parametrize("early", [(True, True), (True, False), (False, True), (False, False)])
def test_handshake_with_and_without_early_muxer(early):
    pair = ConnectionPair(early=early)
    pair.exchange()
    assert pair.dialer.is_open
    assert pair.listener.is_open
    assert (pair.dialer.remote, pair.listener.remote) == (BOB.peer_id, ALICE.peer_id)
    stream = pair.dialer.session.open()
    stream.send((bytes(300_000),))
    pair.exchange()
    opened = [event.stream for event in pair.events[pair.listener] if isinstance(event, Opened)]
    assert len(opened[0].take(10**6)) == 300_000


def test_a_dialer_is_ready_after_one_round_trip():
    pair = ConnectionPair()
    pair.exchange()
    # dialer's first flight, listener's answer, dialer's last handshake message
    assert len(pair.flights) == 3
    assert pair.flights[0].startswith(message("/multistream/1.0.0") + message("/noise") + b"\x00\x20")


@settings(deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_any_split(seed, early):
    rng = random.Random(seed)

    def split(data):
        while data:
            size = rng.randint(1, min(len(data), 500))
            yield data[:size]
            data = data[size:]

    pair = ConnectionPair(early=(early, True), split=split)
    pair.exchange()
    stream = pair.dialer.session.open()
    payload = rng.randbytes(5000)
    stream.send((payload,))
    pair.exchange()
    opened = [event.stream for event in pair.events[pair.listener] if isinstance(event, Opened)]
    assert opened[0].take(10**6) == payload


def test_the_wrong_peer_is_named():
    pair = ConnectionPair(expected=ALICE.peer_id)
    with pytest.raises(WrongPeer, match=str(BOB.peer_id)):
        pair.exchange()


@given(st.binary(max_size=300), st.booleans())
def test_junk_is_the_peers_fault(junk, initiator):
    connection = Connection(StaticKey.create(ALICE), initiator=initiator)
    try:
        connection.receive(junk)
    except RemoteProtocolError:
        pass
    assert not connection.is_open


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_tampering_after_the_handshake_is_noticed(position, flip):
    pair = ConnectionPair()
    pair.exchange()
    stream = pair.dialer.session.open()
    stream.send((b"the truth",))
    flight = bytearray(pair.dialer.pull())
    flight[2 + position % (len(flight) - 2)] ^= flip
    with pytest.raises(RemoteProtocolError):
        pair.listener.receive(bytes(flight))


def test_a_peer_without_noise_is_told_apart():
    connection = Connection(StaticKey.create(ALICE), initiator=True)
    with pytest.raises(RemoteProtocolError, match="does not speak /noise"):
        connection.receive(message("/multistream/1.0.0") + message("na"))
    assert connection.phase is Phase.SECURITY
    with pytest.raises(LocalProtocolError):
        _ = connection.remote


def test_quiet_connections_give_memory_back():
    pair = ConnectionPair()
    pair.exchange()
    stream = pair.dialer.session.open()
    stream.send((bytes(200_000),))
    pair.exchange()
    for side in (pair.dialer, pair.listener):
        side.trim()
        assert len(side.get_buffer()) == 4096
    stream.send((b"more",))
    pair.exchange()


def test_go_away_is_the_last_word():
    pair = ConnectionPair()
    pair.exchange()
    pair.dialer.go_away()
    pair.exchange()
    assert pair.listener.session.went_away
