from __future__ import annotations

from random import Random

from sim.network import Network, key_of
from sim.population import grow
from swarmnode.protocol.kad import MAX_HAVE_BYTES, KadPeer, Message, MessageType
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing import neighbours
from swarmnode.routing.actions import Ask
from swarmnode.routing.dht import Dht
from swarmnode.routing.neighbours import Neighbours
from swarmnode.routing.table import Contact, Table

OWN = key_of("own").peer_id
NOW = 100.0


def contact(number):
    return Contact(key_of(f"peer {number}").peer_id, (Multiaddr.parse(f"/ip4/11.0.{number}.1/tcp/1"),))


def table(count):
    held = Table(OWN.kad_key)
    for number in range(count):
        held.heard(contact(number), NOW)
    return held


def asked(around, until):
    return [second for second in range(int(NOW), until) if around.due(float(second)) is not None]


def test_sixteen_questions_less_and_less_often_and_then_none():
    around = Neighbours(OWN, table(30), Random(1), count=20)
    times = asked(around, 10_000)
    assert len(times) == 16
    assert times[0] == NOW + neighbours.FIRST_S
    assert sum(second < NOW + 10 for second in times) >= 3
    assert times[-1] < NOW + 450


def test_a_question_goes_to_a_neighbour_and_names_those_we_know():
    held = table(30)
    around = Neighbours(OWN, held, Random(1), count=20)
    around.due(NOW)
    whom, request = around.due(NOW + neighbours.FIRST_S)
    near = held.closest(OWN.kad_key, 20)
    assert whom in near
    assert (request.type, request.key) == (MessageType.FIND_NODE, OWN.raw)
    assert request.have == b"".join(one.key[:8] for one in near)
    assert len(request.have) <= MAX_HAVE_BYTES


def test_who_was_alone_begins_anew():
    held = table(1)
    around = Neighbours(OWN, held, Random(1), count=20)
    assert len(asked(around, 1000)) == 16
    held.remove(contact(0).peer)
    assert around.due(1000.0) is None
    held.heard(contact(1), 1000.0)
    assert around.due(1001.0) is None
    assert around.due(1001.0 + neighbours.FIRST_S) is not None


def test_strangers_are_the_nearest_we_do_not_know_and_few():
    held = table(3)
    around = Neighbours(OWN, held, Random(1), count=20)
    place = int.from_bytes(OWN.kad_key, "big")
    unknown = sorted((contact(number) for number in range(3, 40)), key=lambda one: one.place ^ place)
    assert around.strangers([contact(0), Contact(OWN), *reversed(unknown)]) == unknown[: neighbours.MAX_GREETED]


def test_those_named_are_greeted_and_enter_by_answering():
    dht = Dht(key_of("own"), rng=Random(1), now=NOW)
    dht.addrs = (Multiaddr.parse("/ip4/12.0.0.1/tcp/1"),)
    friend, stranger = contact(1), contact(2)
    dht.table.heard(friend, NOW)
    dht.tick(NOW, NOW)
    dht.actions()
    dht.tick(NOW + neighbours.FIRST_S, NOW)
    (ask,) = [action for action in dht.actions() if isinstance(action, Ask) and action.request.have]
    named = tuple(KadPeer(one.peer, (one.addrs[0].to_bytes(),)) for one in (friend, stranger))
    dht.on_reply(ask.id, friend.addrs[0], Message(type=MessageType.FIND_NODE, closer_peers=named), NOW + 2, NOW)
    (greeting,) = dht.actions()
    assert (greeting.contact, greeting.request.type) == (stranger, MessageType.PING)
    assert stranger.peer not in dht.table
    dht.on_reply(greeting.id, stranger.addrs[0], Message(type=MessageType.PING), NOW + 3, NOW)
    assert dht.table.get(stranger.peer) == stranger


def test_clients_do_not_ask_around():
    network = Network(1)
    nodes = grow(network, 5)
    client = network.add(nodes[0], server_mode=False)
    network.run(5)
    before = client.asked
    network.run(20)
    assert client.asked == before
    network.run(0)
    assert len(client.dht.table) == 5
