from __future__ import annotations

from sim.network import key_of
from swarmnode.protocol.records import sign_entry
from swarmnode.routing import handover as handovers
from swarmnode.routing.handover import Handover
from swarmnode.routing.keys import distance, models_key, position
from swarmnode.routing.store import Source, Store
from swarmnode.routing.table import Contact, Table

KEY = models_key("test")
PEERS = sorted((key_of(number) for number in range(30)), key=lambda key: distance(key.peer_id.kad_key, position(KEY)))


def node(own, settled, keys=(KEY,)):
    """A node that knows PEERS[i] for i in `settled` since long ago and holds an entry under each key."""
    table, store = Table(PEERS[own].peer_id.kad_key), Store(PEERS[own].peer_id)
    for number in settled:
        table.heard(Contact(PEERS[number].peer_id), 0.0)
    for key in keys:
        entry = sign_entry(PEERS[20], key, b"x", seq=1, issued_ms=0, ttl_s=600)
        store.put(entry, 600, Source(PEERS[20].peer_id), 0.0)
    return table, Handover(PEERS[own].peer_id, table, store, replicas=4)


def join(table, handover, number, now):
    contact = Contact(PEERS[number].peer_id)
    table.heard(contact, now)
    handover.note(contact.peer)
    return contact


def test_a_newcomer_nearer_to_a_key_is_given_what_lies_there_once():
    table, handover = node(1, [2, 3, 4])
    newcomer = join(table, handover, 0, 100.0)
    assert list(handover.due(100.0)) == [(KEY, newcomer)]
    assert list(handover.due(102.0)) == []


def test_far_newcomers_get_nothing():
    table, handover = node(0, [1, 2, 3, 4])
    join(table, handover, 9, 100.0)
    assert list(handover.due(100.0)) == []


def test_two_settled_holders_nearer_than_us_do_it():
    table, handover = node(3, [1, 2, 4])
    join(table, handover, 0, 100.0)
    assert list(handover.due(100.0)) == []
    table, handover = node(3, [1, 4])
    newcomer = join(table, handover, 0, 100.0)
    assert list(handover.due(100.0)) == [(KEY, newcomer)]


def test_newcomers_do_not_relieve_the_old_holders():
    table, handover = node(3, [4, 5])
    for number in (0, 1):
        join(table, handover, number, 100.0)
    assert len(list(handover.due(100.0))) == 2
    third = join(table, handover, 2, 110.0)
    assert list(handover.due(110.0)) == [(KEY, third)], "the two before may still have nothing"


def test_rounds_are_bounded():
    keys = [position(bytes([number // 256, number % 256])) for number in range(handovers.MAX_KEYS + 40)]
    table, handover = node(0, [], keys)
    given = set()
    for number in (1, 2):
        join(table, handover, number, 100.0)
        due = list(handover.due(100.0))
        assert len(due) <= 2 * handovers.MAX_KEYS
        given |= {key for key, _ in due}
    assert len(given) > handovers.MAX_KEYS, "the next round goes on where the last one ended"
    for number in range(3 * handovers.MAX_NEWCOMERS):
        handover.note(key_of(f"crowd {number}").peer_id)
    assert len(handover._newcomers) == handovers.MAX_NEWCOMERS
