from __future__ import annotations

import warnings
from random import Random
from types import SimpleNamespace

import pytest
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing import table as tables
from swarmnode.routing.keys import distance
from swarmnode.routing.table import Contact, Table, subnet_of

OWN = bytes(32)


def contact(number):
    return Contact(PeerId(b"\x12\x20" + number.to_bytes(32, "big")), (Multiaddr.parse(f"/memory/{number}"),))


def crowd(count):
    return [contact(number) for number in range(1, count + 1)]


def near(contacts, key, count):
    return sorted(contacts, key=lambda one: distance(one.key, key))[:count]


def far_bucket(count):
    """Contacts that all fall into bucket 0 of OWN."""
    return [one for one in crowd(4 * count + 40) if one.key[0] & 0x80][:count]


@pytest.mark.parametrize("count", [0, 1, 5, 60, 500])
def test_closest_equals_brute_force_over_what_is_held(count):
    table = Table(OWN)
    for one in crowd(count):
        table.heard(one, 0.0)
    held = list(table)
    assert len(table) == len(held)
    rng = Random(count)
    for _ in range(50):
        key = rng.randbytes(32)
        assert table.closest(key, 20) == near(held, key, 20)


def test_nothing_near_ourselves_is_ever_crowded_out():
    """The 20 nearest of all peers met are in the table: what lookups of our own neighbourhood rest on."""
    everybody = crowd(800)
    table = Table(OWN)
    for one in everybody:
        table.heard(one, 0.0)
    assert table.closest(OWN, 20) == near(everybody, OWN, 20)


def test_against_the_kademlia_package():
    """Its table splits buckets as a tree; where nothing overflows, both must name the same neighbours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kademlia.node import Node
        from kademlia.routing import KBucket, RoutingTable
    k = 20
    ours = Table(OWN, k=k)
    asked = SimpleNamespace(call_ping=lambda node: None)
    theirs = RoutingTable(SimpleNamespace(protocol=asked), k, Node(OWN))
    theirs.buckets = [KBucket(0, 2**256, k)]
    everybody = crowd(k)
    for one in everybody:
        ours.heard(one, 0.0)
        theirs.add_contact(Node(one.key, ip="x", port=1))
    rng = Random(5)
    for _ in range(30):
        key = rng.randbytes(32)
        expected = [node.id for node in theirs.find_neighbors(Node(key), k=k)]
        assert [one.key for one in ours.closest(key, k)] == expected


def test_full_bucket_keeps_the_old_and_remembers_the_new():
    table = Table(OWN, k=4)
    members = far_bucket(6)
    assert [table.heard(one, 0.0) for one in members] == [True] * 4 + [False] * 2
    assert members[4].peer not in table
    table.remove(members[0].peer)
    assert members[5].peer in table, "the freshest replacement moves up"
    assert len(table) == 4


def test_failed_contact_is_hidden_then_replaced_or_dropped():
    table = Table(OWN, k=2)
    first, second, spare = far_bucket(3)
    table.heard(first, 0.0)
    table.heard(second, 0.0)
    assert not table.failed(first.peer, 0.0)
    assert table.closest(OWN, 9) == near([second], OWN, 9)
    assert first.peer in table
    table.heard(first, 1.0)
    assert first in table.closest(OWN, 9), "one answer clears it"
    table.heard(spare, 0.0)
    assert table.failed(first.peer, 0.0)
    assert set(table) == {second, spare}
    assert not table.failed(second.peer, 0.0)
    assert table.failed(second.peer, 0.0)
    assert set(table) == {spare}


def test_newcomer_takes_the_place_of_a_failing_contact():
    table = Table(OWN, k=2)
    first, second, third = far_bucket(3)
    table.heard(first, 0.0)
    table.heard(second, 0.0)
    table.failed(first.peer, 0.0)
    assert table.heard(third, 0.0)
    assert set(table) == {second, third}


def test_replacements_are_bounded():
    table = Table(OWN, k=1)
    members = far_bucket(tables.REPLACEMENTS + 5)
    for one in members:
        table.heard(one, 0.0)
    seen = set()
    while len(table):
        (held,) = table
        seen.add(held)
        table.remove(held.peer)
    assert len(seen) == 1 + tables.REPLACEMENTS
    assert members[1] not in seen, "the oldest replacement went"


def test_addresses_are_updated_but_never_lost():
    table = Table(OWN)
    one = contact(1)
    moved = Contact(one.peer, (Multiaddr.parse("/memory/99"),))
    table.heard(one, 0.0)
    table.heard(moved, 1.0)
    table.heard(Contact(one.peer), 2.0)
    assert table.get(one.peer) == moved
    assert table.seen_at(one.peer) == 2.0


def test_we_are_not_in_our_own_table():
    own = contact(1)
    table = Table(own.key)
    assert not table.heard(own, 0.0)
    assert len(table) == 0
    assert table.closest(own.key, 5) == []


@pytest.mark.parametrize(
    ("address", "subnet"),
    [
        ("/ip4/8.8.4.77/tcp/1", "8.8.4.0/24"),
        ("/ip4/203.0.113.9/tcp/1", "203.0.113.0/24"),
        ("/ip6/2001:db8:1:2::5/tcp/1", "2001:db8:1::/48"),
        ("/ip6/::ffff:8.8.4.77/tcp/1", "8.8.4.0/24"),
        ("/ip4/127.0.0.1/tcp/1", None),
        ("/ip4/192.168.1.5/tcp/1", None),
        ("/ip6/::1/tcp/1", None),
        ("/memory/5", None),
        ("/dns4/example.org/tcp/1", None),
    ],
)
def test_subnets(address, subnet):
    assert subnet_of(Multiaddr.parse(address)) == subnet


def test_no_address_no_subnet():
    assert subnet_of(None) is None


def test_one_subnet_gets_two_places_a_bucket_and_ten_in_the_table():
    table = Table(OWN)
    for index, one in enumerate(crowd(2000)):
        table.heard(one, 0.0, Multiaddr.parse(f"/ip4/9.9.9.{index % 250}/tcp/1"))
    held = list(table)
    assert len(held) == tables.TABLE_SUBNET_LIMIT
    buckets = [distance(one.key, OWN).bit_length() for one in held]
    assert max(buckets.count(bucket) for bucket in buckets) == tables.BUCKET_SUBNET_LIMIT
    honest = contact(5000)
    assert table.heard(honest, 0.0, Multiaddr.parse("/ip4/9.9.8.1/tcp/1"))
    table.remove(held[0].peer)
    assert len(table) == tables.TABLE_SUBNET_LIMIT + 1, "a place that became free is given to a replacement"


def test_local_swarms_are_not_limited():
    table = Table(OWN)
    for one in crowd(15):
        assert table.heard(one, 0.0, Multiaddr.parse("/ip4/127.0.0.1/tcp/1"))


def test_silent_contacts_longest_first_and_suspects_before_all():
    table = Table(OWN)
    members = crowd(5)
    for index, one in enumerate(members):
        table.heard(one, float(index))
    assert table.silent(12.5, 10.0, 2) == members[:2]
    assert table.silent(10.0, 10.0, 9) == []
    table.suspect(members[4].peer)
    table.suspect(contact(99).peer)
    assert table.silent(12.5, 10.0, 2) == [members[4], members[0]]


def test_who_failed_once_is_asked_again_soon():
    table = Table(OWN)
    members = crowd(5)
    for one in members:
        table.heard(one, 0.0)
    table.failed(members[2].peer, 20.0)
    soon = 20.0 + tables.RECHECK_S
    assert table.silent(soon, 1000.0, 9) == []
    assert table.silent(soon + 1, 1000.0, 9) == [members[2]]
    table.heard(members[2], soon + 1)
    assert table.silent(soon + 2, 1000.0, 9) == []


def test_contacts_known_for_long_may_be_silent_for_longer():
    table = Table(OWN)
    old, young = crowd(2)
    for heard_at in (0.0, 100.0):
        table.heard(old, heard_at)
    table.heard(young, 100.0)
    assert table.silent(111.0, 10.0, 9) == [young]
    assert table.silent(151.0, 10.0, 9) == near([old, young], OWN, 2)
    table.heard(old, 10_000.0)
    assert old in table.silent(10_001.0 + tables.SILENCE_FACTOR * 10.0, 10.0, 9), "but not for ever"


def test_reach_follows_the_density_around_us():
    table = Table(OWN)
    assert table.reach(20) == 1 << 256, "knowing hardly anybody, everybody counts"
    everybody = crowd(2000)
    for one in everybody:
        table.heard(one, 0.0)
    rng = Random(3)
    inside = [
        sum(distance(one.key, key) <= table.reach(20) for one in everybody)
        for key in (rng.randbytes(32) for _ in range(100))
    ]
    assert 10 < sum(inside) / 100 < 40
    assert table.reach(40) >= 2 * table.reach(20) - 1
