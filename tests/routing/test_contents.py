"""libp2p's values and providers in whole swarms, simulated: put and got, told and found, and what liars achieve."""

import dataclasses
from random import Random

import pytest
from sim.network import EPOCH, Network, key_of
from sim.population import grow
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.kad import MAX_PEERS, KadPeer, Message, MessageType, Record
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing import contents as module
from swarmnode.routing.content_queries import MAX_FOUND
from swarmnode.routing.contents import REPLICAS, REPROVIDE_S, Contents
from swarmnode.routing.dht import Dht
from swarmnode.routing.keys import content_key

KEY = content_key(bytes(32))
NOW = 100.0
FAR = Multiaddr.parse("/ip4/9.9.9.9/tcp/1")


def record(name):
    public = key_of(name).public
    return Record(b"/pk/" + PeerId.from_public_key(public).raw, public.marshal())


def contents(node):
    return Contents(node.dht, Random(1))


@pytest.fixture(scope="module")
def swarm():
    network = Network(3)
    grow(network, 40)
    return network


def machine():
    return Dht(key_of("own"), rng=Random(1), now=NOW)


def handle(dht, remote, seen=FAR, **fields):
    return dht.handle(key_of(remote).peer_id, seen, Message(**fields), NOW, EPOCH + NOW)


# Among each other


def test_a_value_put_by_one_is_got_by_all(swarm):
    one = record("alice")
    put, _ = swarm.ask(swarm.live[0], contents(swarm.live[0]).put_value(one.key, one.value, swarm.now))
    assert put.holders >= REPLICAS
    holders = [node for node in swarm.live[1:] if node.dht.values.get(one.key, swarm.now) is not None]
    assert len(holders) == put.holders
    for node in swarm.live[1:]:
        got, _ = swarm.ask(node, contents(node).get_value(one.key, swarm.now))
        assert got.record == one
        assert (got.asked == 0) == (node in holders)
    none, _ = swarm.ask(swarm.live[5], contents(swarm.live[5]).get_value(record("bob").key, swarm.now))
    assert none.record is None


def test_providers_are_found_by_all_and_forgotten_when_withdrawn(swarm):
    first, second = swarm.live[:2]
    told, _ = swarm.ask(first, contents(first).provide(KEY, swarm.now))
    ours = contents(second)
    swarm.ask(second, ours.provide(KEY, swarm.now))
    assert told.holders >= REPLICAS
    for node in swarm.live:
        found, _ = swarm.ask(node, contents(node).find_providers(KEY, swarm.now))
        assert {contact.peer: contact.addrs for contact in found.providers} == {
            first.peer: (first.addr,),
            second.peer: (second.addr,),
        }
    ours.withdraw(KEY)
    assert ours.provided == []
    assert [peer.peer for peer in second.dht.providers.get(KEY, swarm.now)] in ([], [first.peer])
    ours.withdraw(KEY)  # again: nothing happens


def test_what_is_provided_is_told_anew_until_withdrawn(swarm):
    node, key = swarm.live[7], content_key(b"\x07" * 32)
    ours = contents(node)
    swarm.ask(node, ours.provide(key, swarm.now))
    began = swarm.now
    for holder in swarm.live:
        holder.dht.providers.remove(key, node.peer)
    ours.tick(began + 0.85 * REPROVIDE_S)
    swarm.pump(node)
    swarm.run(5)
    assert not any(holder.dht.providers.get(key, swarm.now) for holder in swarm.live)
    ours.tick(began + REPROVIDE_S)
    swarm.pump(node)
    swarm.run(5)
    assert (
        sum(bool(holder.dht.providers.get(key, swarm.now)) for holder in swarm.live if holder is not node) >= REPLICAS
    )
    assert ours._due[key] > began + REPROVIDE_S


def test_a_swarm_of_one_provides_and_finds_itself():
    dht = machine()
    ours, one = Contents(dht, Random(1)), record("alice")
    ours.put_value(one.key, one.value, NOW)
    ours.get_value(one.key, NOW)
    ours.provide(KEY, NOW)
    ours.find_providers(KEY, NOW)
    put, got, told, found = dht.actions()
    assert (put.holders, got.record, told.holders) == (0, one, 0)
    assert [contact.peer for contact in found.providers] == [dht.own]


def test_our_own_mistakes(monkeypatch):
    ours, one = Contents(machine(), Random(1)), record("alice")
    with pytest.raises(LocalProtocolError, match="/pk/"):
        ours.put_value(b"/v/hello", b"world", NOW)
    with pytest.raises(LocalProtocolError, match="/pk/"):
        ours.put_value(one.key, record("bob").value, NOW)
    for act in (ours.provide, ours.find_providers, ours.get_value):
        for key in (b"", bytes(81)):
            with pytest.raises(LocalProtocolError, match="1 to 80"):
                act(key, NOW)
    monkeypatch.setattr(module, "MAX_OWN_KEYS", 2)
    for key in (b"1", b"2", b"1"):
        ours.provide(key, NOW)
    with pytest.raises(LocalProtocolError, match="at most 2"):
        ours.provide(b"3", NOW)
    assert ours.provided == [b"1", b"2"]


def test_what_expired_is_given_back_in_time():
    dht, one = machine(), record("alice")
    dht.values.put(one, NOW)
    dht.providers.add(KEY, KadPeer(key_of("bob").peer_id), NOW)
    dht.tick(NOW + 40 * 3600, EPOCH)
    assert (len(dht.values), len(dht.providers)) == (0, 0)


# What strangers ask


def test_a_value_comes_back_from_whom_it_is_put_to():
    dht, one = machine(), record("alice")
    reply = handle(dht, "js", type=MessageType.PUT_VALUE, key=one.key, record=one)
    assert reply.record == one
    assert handle(dht, "another", type=MessageType.GET_VALUE, key=one.key).record == one


def test_unproven_values_are_refused_and_nonsense_is_a_fault():
    dht, one = machine(), record("alice")
    forged = dataclasses.replace(one, value=record("bob").value)
    assert handle(dht, "js", type=MessageType.PUT_VALUE, key=one.key, record=forged).record is None
    assert handle(dht, "js", type=MessageType.GET_VALUE, key=one.key).record is None
    assert len(dht.values) == 0
    for fields in ({"key": one.key}, {"key": b"another", "record": one}):
        with pytest.raises(RemoteProtocolError, match="record"):
            handle(dht, f"js{len(fields)}", type=MessageType.PUT_VALUE, **fields)


def test_only_the_sender_itself_becomes_a_provider_and_only_with_addresses_that_mean_something():
    dht = machine()
    loopback = Multiaddr.parse("/ip4/127.0.0.1/tcp/5").to_bytes()
    named = [KadPeer(key_of(name).peer_id, (loopback, FAR.to_bytes(), b"\xff")) for name in ("victim", "js")]
    handle(dht, "js", type=MessageType.ADD_PROVIDER, key=KEY, provider_peers=tuple(named))
    handle(dht, "empty", type=MessageType.ADD_PROVIDER, key=KEY)
    (found,) = handle(dht, "another", type=MessageType.GET_PROVIDERS, key=KEY).provider_peers
    assert (found.peer, found.addrs) == (key_of("js").peer_id, (FAR.to_bytes(),))


def test_a_neighbours_loopback_address_is_told_on_this_machine_only():
    dht = machine()
    near = Multiaddr.parse("/ip4/127.0.0.1/tcp/5")
    own = KadPeer(key_of("js").peer_id, (near.to_bytes(),))
    handle(dht, "js", near, type=MessageType.ADD_PROVIDER, key=KEY, provider_peers=(own,))
    for seen, addrs in ((near, (near.to_bytes(),)), (FAR, ())):
        (found,) = handle(dht, "another", seen, type=MessageType.GET_PROVIDERS, key=KEY).provider_peers
        assert found.addrs == addrs


def test_an_answer_names_the_twenty_freshest():
    dht = machine()
    for number in range(30):
        dht.providers.add(KEY, KadPeer(key_of(number).peer_id), NOW + number)
    named = handle(dht, "js", type=MessageType.GET_PROVIDERS, key=KEY).provider_peers
    assert [peer.peer for peer in named] == [key_of(29 - number).peer_id for number in range(MAX_PEERS)]


def test_who_looks_for_us_hears_of_us_even_from_us():
    dht = machine()
    for mode, addrs in ((False, ()), (True, (FAR.to_bytes(),))):
        dht.server_mode, dht.addrs = mode, (FAR,)
        closer = handle(dht, "js", type=MessageType.FIND_NODE, key=dht.own.raw).closer_peers
        assert [peer.addrs for peer in closer if peer.peer == dht.own] == [addrs] * mode
    assert handle(dht, "js", type=MessageType.FIND_NODE, key=b"another").closer_peers == ()


# Liars


def test_what_liars_invent_comes_last_and_is_bounded():
    network = Network(4)
    nodes = grow(network, 30)
    server = nodes[0]
    network.ask(server, contents(server).provide(KEY, network.now))
    for number, node in enumerate(nodes[1:-1:3]):

        def answer(remote, seen, request, now, wall, *, node=node, number=number):
            reply = node.dht.handle(remote, seen, request, now, wall)
            if request.type is not MessageType.GET_PROVIDERS:
                return reply
            made_up = (KadPeer(key_of(f"{number}/{i}").peer_id, (FAR.to_bytes(),)) for i in range(MAX_PEERS))
            return dataclasses.replace(reply, provider_peers=tuple(made_up))

        node.answer = answer
    found, _ = network.ask(nodes[-1], contents(nodes[-1]).find_providers(KEY, network.now))
    assert found.providers[0].peer == server.peer
    assert 1 < len(found.providers) <= MAX_FOUND


def test_no_more_than_so_many_inventions_are_kept(monkeypatch):
    monkeypatch.setattr("swarmnode.routing.content_queries.MAX_FOUND", 5)
    network = Network(5)
    nodes = grow(network, 5)
    for node in nodes[:-1]:
        for number in range(9):
            node.dht.providers.add(KEY, KadPeer(key_of(number).peer_id, (FAR.to_bytes(),)), network.now)
    found, _ = network.ask(nodes[-1], contents(nodes[-1]).find_providers(KEY, network.now))
    assert len(found.providers) == 5


def test_a_value_from_a_liar_is_no_value():
    network = Network(6)
    nodes = grow(network, 10)
    one = record("alice")
    forged = dataclasses.replace(one, value=record("bob").value)
    for node in nodes[:-1]:

        def answer(remote, seen, request, now, wall, *, node=node):
            reply = node.dht.handle(remote, seen, request, now, wall)
            return dataclasses.replace(reply, record=forged) if request.type is MessageType.GET_VALUE else reply

        node.answer = answer
    got, _ = network.ask(nodes[-1], contents(nodes[-1]).get_value(one.key, network.now))
    assert got.record is None
    nodes[3].answer = nodes[3].dht.handle
    nodes[3].dht.values.put(one, network.now)
    got, _ = network.ask(nodes[-1], contents(nodes[-1]).get_value(one.key, network.now))
    assert got.record == one


def test_a_refused_value_is_not_counted_as_held():
    network = Network(7, rtt=(0.02, 0.12))
    nodes = grow(network, 6)
    for node in nodes[1:3]:

        def answer(remote, seen, request, now, wall, *, node=node):
            reply = node.dht.handle(remote, seen, request, now, wall)
            return dataclasses.replace(reply, record=None)

        node.answer = answer
    one = record("alice")
    put, _ = network.ask(nodes[0], contents(nodes[0]).put_value(one.key, one.value, network.now))
    assert put.holders == 3
