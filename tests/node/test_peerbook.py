"""The peer book: which addresses are kept, in which order, for how long."""

import pytest
from helpers.hosts import key
from swarmnode.node import peerbook
from swarmnode.node.peerbook import ADDR_TTL_S, PeerBook
from swarmnode.protocol.envelope import PeerRecord
from swarmnode.protocol.multiaddr import Multiaddr

PEER, OTHER = key(1).peer_id, key(2).peer_id
A, B, C, D = (Multiaddr.parse(f"/memory/{number}") for number in (1, 2, 3, 4))


class Now:
    """A clock that stands."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def now():
    return Now()


@pytest.fixture
def book(now):
    return PeerBook(now)


def record(seq, *addrs):
    return PeerRecord(peer=PEER, seq=seq, addrs=addrs)


def test_the_newest_come_first_and_are_bounded(book):
    for number in range(peerbook.MAX_ADDRS + 3):
        book.add(PEER, [Multiaddr.parse(f"/memory/{number}")])
    addrs = book.get(PEER).addrs
    assert [str(addr) for addr in addrs] == [f"/memory/{number}" for number in range(10, 2, -1)]
    assert len(book.get(PEER).known) == peerbook.MAX_ADDRS
    book.add(PEER, [addrs[5], A.with_peer(PEER)])
    assert book.get(PEER).addrs[:3] == (addrs[5], A, addrs[0])


def test_an_address_of_somebody_else_is_ignored(book):
    book.add(PEER, [A.with_peer(OTHER), Multiaddr.parse(f"/p2p/{PEER}")])
    assert book.get(PEER).addrs == ()


def test_peers_are_bounded_and_the_least_used_goes(book, monkeypatch):
    monkeypatch.setattr(peerbook, "MAX_PEERS", 2)
    for number in (1, 2):
        book.add(key(number).peer_id, [A])
    book.get(PEER)
    book.add(key(3).peer_id, [A])
    assert len(book) == 2
    assert book.get(OTHER).addrs == ()
    assert book.get(PEER).addrs == (A,)


def test_protocols_are_of_this_connection_only(book):
    book.identified(PEER, ["/p"], "agent")
    book.identified(PEER, [], "")
    assert (book.get(PEER).protocols, book.get(PEER).agent) == ({"/p"}, "agent")
    book.left(PEER)
    assert book.get(PEER).protocols == frozenset()
    book.left(OTHER)
    assert len(book) == 1


def test_what_was_dialed_comes_before_what_was_signed_before_what_was_said(book):
    book.add(PEER, [A, B])
    book.certify(record(1, C, B))
    book.proven(PEER, D)
    book.add(PEER, [C, A])
    assert book.get(PEER).addrs == (D, C, B, A)
    assert book.get(PEER).certified == (C, B)


def test_no_crowd_of_claims_pushes_out_a_signed_address(book):
    book.certify(record(1, A))
    book.add(PEER, [Multiaddr.parse(f"/memory/{number}") for number in range(100, 200)])
    assert book.get(PEER).addrs[0] == A
    assert len(book.get(PEER).addrs) == peerbook.MAX_ADDRS


def test_the_highest_record_wins_and_replaces(book):
    assert book.certify(record(5, A, B))
    assert not book.certify(record(4, C))
    assert book.get(PEER).certified == (A, B)
    assert book.certify(record(5, A))
    assert book.certify(record(6, C))
    assert book.get(PEER).addrs == book.get(PEER).certified == (C,)
    assert book.get(PEER).record_seq == 6


def test_a_proven_address_outlives_the_record_it_was_in(book):
    book.certify(record(1, A, B))
    book.proven(PEER, A)
    assert book.get(PEER).certified == (A, B)
    book.certify(record(2, C))
    assert book.get(PEER).addrs == (A, C)
    assert book.get(PEER).certified == (C,)


def test_what_nobody_repeats_is_forgotten(book, now):
    book.add(PEER, [A, B])
    now.time += ADDR_TTL_S - 1
    book.add(PEER, [B])
    now.time += 1
    assert book.get(PEER).addrs == (B,)
    now.time += ADDR_TTL_S - 1
    assert book.get(PEER).addrs == ()


def test_a_claim_keeps_no_old_signed_address_alive(book, now):
    book.certify(record(1, A))
    book.proven(PEER, B)
    now.time += ADDR_TTL_S - 1
    book.add(PEER, [A, B, C])
    now.time += 1
    assert book.get(PEER).addrs == (C,)


def test_addresses_of_a_connected_peer_do_not_age(book, now):
    book.add(PEER, [A])
    book.identified(PEER, ["/p"], "")
    now.time += 10 * ADDR_TTL_S
    book.add(PEER, [B])
    assert book.get(PEER).addrs == (B, A)
    book.left(PEER)
    now.time += ADDR_TTL_S - 1
    assert book.get(PEER).addrs == (B, A)
    now.time += 1
    assert book.get(PEER).addrs == ()
    assert book.certify(record(1, A))
