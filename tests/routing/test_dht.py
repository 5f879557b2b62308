from __future__ import annotations

import dataclasses
from random import Random

import pytest
from sim.network import EPOCH, Network, key_of
from sim.population import grow
from swarmnode.protocol.errors import LocalProtocolError, RemoteProtocolError
from swarmnode.protocol.kad import KadPeer, LeasedEntry, Message, MessageType
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.records import SignedEntry, sign_entry
from swarmnode.routing.actions import Ask, Finished
from swarmnode.routing.dht import Dht
from swarmnode.routing.keys import distance, models_key, position
from swarmnode.routing.table import Contact

KEY = models_key("test")
NOW = 100.0


def machine(name="own", **options):
    dht = Dht(key_of(name), rng=Random(1), now=NOW, **options)
    dht.addrs = (Multiaddr.parse("/memory/1000"),)
    return dht


def entry(name="alice", seq=1, payload=b"here", issued=EPOCH + NOW, ttl_s=100, key=KEY):
    return sign_entry(key_of(name), key, payload, seq=seq, issued_ms=int(issued * 1000), ttl_s=ttl_s)


def put(dht, *entries, remote="remote", lease_s=100, now=NOW):
    leased = tuple(LeasedEntry(one, min(lease_s, one.ttl_s)) for one in entries)
    request = Message(type=MessageType.PUT_ENTRIES, key=KEY, entries=leased)
    return dht.handle(key_of(remote).peer_id, None, request, now, EPOCH + now)


def held(dht, now=NOW):
    return {leased.entry for leased in dht.store.live(KEY, now)}


# A swarm of one


def test_alone_everything_is_instant_and_asks_nobody():
    dht = machine()
    query = dht.publish(KEY, b"me", 100, NOW, EPOCH + NOW)
    finished = dht.actions()
    assert [action.query for action in finished] == [query]
    assert finished[0].holders == 0
    read = dht.read(KEY, NOW)
    (found,) = dht.actions()
    assert isinstance(found, Finished)
    assert found.query == read
    assert [one.payload for one in found.entries] == [b"me"]
    dht.withdraw(KEY, NOW, EPOCH + NOW)
    dht.read(KEY, NOW)
    assert dht.actions()[-1].entries == ()


def test_alone_our_own_entry_lives_on_by_republishing_and_ends_with_withdrawal():
    swarm = Network()
    node = swarm.add()
    swarm.publish(node, KEY)
    first = node.dht.store.live(KEY, swarm.now)[0].entry
    swarm.run(300)
    (again,) = swarm.read(node, KEY)[0].entries
    assert again.seq > first.seq
    assert node.dht.published == [KEY]
    assert node.dht.withdraw(KEY, swarm.now, node.wall) is not None
    assert node.dht.withdraw(KEY, swarm.now, node.wall) is None
    swarm.run(400)
    assert len(node.dht.store) == 0


def test_bad_payload_or_ttl_is_our_callers_fault():
    dht = machine()
    for payload, ttl_s in ((bytes(1001), 100), (b"x", 0), (b"x", 601)):
        with pytest.raises(LocalProtocolError):
            dht.publish(KEY, payload, ttl_s, NOW, EPOCH)
    assert dht.published == []


# Swarms


@pytest.mark.parametrize("count", [2, 5, 30])
def test_everybody_finds_everybodys_entry(count):
    swarm = Network(count, rtt=(0.02, 0.12))
    nodes = grow(swarm, count)
    for node in nodes:
        result, _ = swarm.publish(node, KEY, str(node.addr).encode())
        assert result.holders >= min(8, count - 1)
    for node in nodes:
        result, took_s = swarm.read(node, KEY)
        assert {one.payload for one in result.entries} == {str(one.addr).encode() for one in nodes}
        assert took_s < 1.0


def test_located_peers_are_the_true_nearest():
    swarm = Network(3)
    nodes = grow(swarm, 60)
    found = wanted = 0
    for number in range(20):
        asker, key = nodes[number], position(bytes([number]))
        result, _ = swarm.ask(asker, asker.dht.locate(key, swarm.now))
        others = [node.key.peer_id for node in nodes if node is not asker]
        truth = sorted(others, key=lambda peer, key=key: distance(peer.kad_key, position(key)))[:20]
        found += len({contact.peer for contact in result.contacts} & set(truth))
        wanted += 20
    assert found / wanted > 0.98


def test_any_live_node_serves_as_bootstrap_and_survivors_still_find_entries():
    swarm = Network(4)
    nodes = grow(swarm, 30)
    for node in nodes[:6]:
        swarm.publish(node, KEY, str(node.addr).encode())
    for node in nodes[20:]:
        swarm.kill(node)
    newcomer = swarm.add(nodes[7])
    swarm.run(5)
    result, took_s = swarm.read(newcomer, KEY)
    assert len(result.entries) == 6
    assert took_s < 3.0


def test_dead_peers_cost_little_the_first_time_and_nothing_later():
    """A third of the swarm falls silent (no refusals: the worst case) on a network like a loopback's."""
    swarm = Network(5, rtt=(0.001, 0.004))
    nodes = grow(swarm, 30)
    swarm.publish(nodes[0], KEY)
    for node in nodes[20:]:
        swarm.kill(node)
    times = []
    for _ in range(4):
        result, took_s = swarm.ask(nodes[1], nodes[1].dht._read(KEY, swarm.now, 1))
        assert len(result.entries) == 1
        times.append(took_s)
    assert times[0] < 0.8
    assert times[-1] < 0.05


def test_two_nodes_one_dead():
    swarm = Network(6, rtt=(0.001, 0.004))
    first, second = grow(swarm, 2)
    swarm.publish(first, KEY)
    swarm.kill(second)
    result, took_s = swarm.ask(first, first.dht._read(KEY, swarm.now, 1))
    assert len(result.entries) == 1
    assert took_s < 1.0


def test_clients_read_and_write_but_nobody_hears_of_them():
    swarm = Network(7)
    nodes = grow(swarm, 10)
    client = swarm.add(nodes[3], server_mode=False)
    swarm.run(5)
    swarm.publish(client, KEY)
    assert len(swarm.read(nodes[5], KEY)[0].entries) == 1
    assert len(swarm.read(client, KEY)[0].entries) == 1
    swarm.run(200)
    assert len(client.dht.table) == 10
    assert all(client.key.peer_id not in node.dht.table for node in nodes)


def test_withdrawn_entries_vanish_at_once_although_old_copies_remain():
    swarm = Network(8)
    nodes = grow(swarm, 20)
    swarm.publish(nodes[0], KEY)
    assert len(swarm.read(nodes[9], KEY)[0].entries) == 1
    swarm.ask(nodes[0], nodes[0].dht.withdraw(KEY, swarm.now, nodes[0].wall))
    assert swarm.read(nodes[9], KEY)[0].entries == ()


def test_entry_of_a_dead_node_is_gone_when_its_lease_is():
    swarm = Network(9)
    nodes = grow(swarm, 12)
    swarm.publish(nodes[0], KEY)
    swarm.run(30)
    swarm.kill(nodes[0])
    swarm.run(105)
    assert swarm.read(nodes[5], KEY)[0].entries == ()


def test_newcomers_next_to_a_key_are_handed_its_entries_with_the_rest_of_the_lease():
    swarm = Network(10)
    nodes = grow(swarm, 20)
    swarm.publish(nodes[0], KEY)
    published = swarm.now
    swarm.kill(nodes[0])
    swarm.run(20)
    newcomers = [swarm.add(swarm.rng.choice(nodes[1:])) for _ in range(20)]
    swarm.run(20)
    everybody = [node for node in (*nodes, *newcomers) if node.alive]
    nearest = sorted(everybody, key=lambda node: distance(node.key.peer_id.kad_key, position(KEY)))[:4]
    assert any(node in newcomers for node in nearest)
    for node in nearest:
        (leased,) = node.dht.store.live(KEY, swarm.now)
        assert leased.lease_s <= 100 - (swarm.now - published) + 1


def test_reads_of_a_hot_key_are_shared_cached_and_refreshed_ahead():
    swarm = Network(11)
    nodes = grow(swarm, 12)
    swarm.publish(nodes[0], KEY, b"old")
    reader = nodes[5]
    query = reader.dht.read(KEY, swarm.now)
    assert reader.dht.read(KEY, swarm.now) == query
    swarm.ask(reader, query)
    asked = reader.asked
    assert [one.payload for one in reader.dht.recent(KEY, swarm.now)] == [b"old"]
    assert reader.asked == asked
    swarm.publish(nodes[0], KEY, b"new")
    swarm.run(15)
    assert [one.payload for one in reader.dht.recent(KEY, swarm.now)] == [b"new"], "read anew unasked"
    swarm.run(100)
    assert reader.dht.recent(KEY, swarm.now) is None, "a cold key is not kept warm"


def test_same_seed_same_history():
    def history():
        swarm = Network(12)
        nodes = grow(swarm, 15)
        swarm.publish(nodes[0], KEY)
        swarm.run(120)
        return swarm.messages, swarm.bytes, [len(node.dht.table) for node in nodes]

    assert history() == history()


@pytest.mark.parametrize(
    ("count", "rounds", "silent"),
    [(30, 40, True), (30, 40, False), pytest.param(100, 90, True, marks=pytest.mark.slow)],
)
def test_churn(count, rounds, silent):
    """Every 2 s one node leaves without a word and another joins: at 30 nodes all of them once a minute."""
    swarm = Network(13, silent=silent)
    nodes = grow(swarm, count)
    servers = nodes[:5]
    for node in servers:
        swarm.publish(node, KEY, str(node.addr).encode())
    good = total = 0
    for _ in range(rounds):
        live = [node for node in nodes if node.alive and node not in servers]
        swarm.kill(swarm.rng.choice(live))
        nodes.append(swarm.add(swarm.rng.choice([node for node in nodes if node.alive])))
        swarm.run(2)
        reader = swarm.rng.choice([node for node in nodes if node.alive])
        result, _ = swarm.ask(reader, reader.dht._read(KEY, swarm.now, 1))
        good += len(result.entries) == 5
        total += 1
    assert good / total >= 0.99


@pytest.mark.slow
def test_two_hundred_nodes():
    swarm = Network(14)
    nodes = grow(swarm, 200)
    swarm.publish(nodes[0], KEY)
    for node in nodes[1::5]:
        swarm.kill(node)
    asked = 0
    for node in nodes[2::10]:
        if node.alive:
            before = node.asked
            result, took_s = swarm.ask(node, node.dht._read(KEY, swarm.now, 1))
            asked += node.asked - before
            assert len(result.entries) == 1
            assert took_s < 2.0
    assert asked / 20 < 40


# Enemies


def forged():
    return dataclasses.replace(entry(), payload=b"lies")


def test_genuine_entry_is_taken():
    dht = machine()
    assert put(dht, entry()).accepted == 1
    assert held(dht) == {entry()}


@pytest.mark.parametrize(
    "bad",
    [
        forged(),
        dataclasses.replace(entry(), signature=bytes(64)),
        dataclasses.replace(entry(), subkey=key_of("mallory").peer_id),
        dataclasses.replace(entry(key=bytes(32)), key=KEY),
    ],
    ids=["forged", "unsigned", "another signer", "another key"],
)
def test_forgeries_are_refused_and_their_bringer_avoided(bad):
    dht = machine()
    with pytest.raises(RemoteProtocolError):
        put(dht, bad)
    assert held(dht) == set()
    with pytest.raises(RemoteProtocolError, match="lately"):
        put(dht, entry())
    assert put(dht, entry(), remote="honest").accepted == 1, "the victim's own entry is welcome from others"
    assert put(dht, entry("alice", seq=2), now=NOW + 100).accepted == 1, "and from it after a while"


@pytest.mark.parametrize(
    "bad",
    [entry(issued=EPOCH + NOW + 95), entry(issued=EPOCH + NOW - 195), entry(issued=0)],
    ids=["future", "expired", "ancient"],
)
def test_untimely_entries_are_left_out_without_a_fuss(bad):
    dht = machine()
    reply = put(dht, bad)
    assert (reply.accepted, reply.stale) == (0, ())
    assert held(dht) == set()
    assert put(dht, entry()).accepted == 1


def test_replays_change_nothing():
    dht = machine()
    put(dht, entry(seq=5), entry("bob", seq=1))
    reply = put(dht, entry(seq=4), entry("bob", seq=1), remote="mallory", now=NOW + 50)
    assert [(stale.subkey, stale.seq) for stale in reply.stale] == [(key_of("alice").peer_id, 5)]
    assert [leased.lease_s for leased in dht.store.live(KEY, NOW + 50)] == [50, 50]
    dht.store.expire(NOW + 101)
    put(dht, entry(seq=5), remote="mallory", now=NOW + 101)
    assert held(dht, NOW + 101) == set()


def test_each_signature_is_checked_once():
    dht = machine()
    for _ in range(5):
        put(dht, entry())
    assert dht.verifier.checked == 1


def test_liars_in_a_read_are_dropped_and_the_honest_answer_is_found():
    swarm = Network(15)
    nodes = grow(swarm, 15)
    swarm.publish(nodes[0], KEY, b"true")
    victim = nodes[0].key.peer_id
    lie = SignedEntry(
        key=KEY, subkey=victim, payload=b"false", seq=2**50, issued_ms=int(nodes[0].wall * 1000), ttl_s=600,
        signature=bytes(64),
    )  # fmt: skip
    liars = sorted(nodes[1:], key=lambda node: distance(node.key.peer_id.kad_key, position(KEY)))[:5]
    for liar in liars:
        genuine = liar.dht.handle

        def handle(remote, seen, request, now, wall, genuine=genuine):
            reply = genuine(remote, seen, request, now, wall)
            return dataclasses.replace(reply, entries=(LeasedEntry(lie, 600),)) if request.have == b"" else reply

        liar.dht.handle = handle
    for node in nodes[1:]:
        if node not in liars:
            result, _ = swarm.read(node, KEY)
            assert [one.payload for one in result.entries] == [b"true"]


def test_nobody_is_marked_offline_by_what_others_say():
    """A liar names wrong addresses for a victim: the words are avoided, the victim is not."""
    dht = machine()
    liar, victim = key_of("liar").peer_id, key_of("victim").peer_id
    wrong, right = Multiaddr.parse("/memory/666"), Multiaddr.parse("/memory/7")
    query = dht.locate(b"anything", NOW, seeds=[Contact(liar, (Multiaddr.parse("/memory/6"),))])
    (ask,) = dht.actions()
    reply = Message(type=MessageType.FIND_NODE, closer_peers=(KadPeer(victim, (wrong.to_bytes(),)),))
    dht.on_reply(ask.id, None, reply, NOW, EPOCH + NOW)
    (bad_ask,) = dht.actions()
    assert bad_ask.contact == Contact(victim, (wrong,))
    dht.on_failure(bad_ask.id, NOW)
    assert [action.query for action in dht.actions()] == [query]
    request = Message(type=MessageType.PING, sender=KadPeer(victim, (right.to_bytes(),)))
    dht.handle(victim, right, request, NOW, EPOCH + NOW)
    assert dht.table.get(victim) == Contact(victim, (right,))
    dht.locate(b"something", NOW)
    assert Contact(victim, (right,)) in [action.contact for action in dht.actions() if isinstance(action, Ask)]


def test_who_connects_is_greeted_although_it_was_silent_before():
    """A dial may take longer than we wait for an answer: when the connection is there at last, the peer is alive."""
    dht = machine()
    slow = Contact(key_of("slow").peer_id, (Multiaddr.parse("/memory/5"),))
    dht.locate(b"x", NOW, seeds=[slow])
    (ask,) = [action for action in dht.actions() if isinstance(action, Ask)]
    dht.on_failure(ask.id, NOW + 1)
    dht.actions()
    dht.greet(slow, NOW + 1.1)
    (greeting,) = dht.actions()
    dht.on_reply(greeting.id, None, Message(type=MessageType.PING), NOW + 1.2, EPOCH + NOW)
    assert slow.peer in dht.table
    dht.misbehaved(slow.peer, NOW + 2)
    dht.greet(slow, NOW + 3)
    assert dht.actions() == [], "but a liar is not"


def test_addresses_come_from_the_peer_itself_once_it_answers():
    dht = machine()
    peer = key_of("peer").peer_id
    hearsay, own = Multiaddr.parse("/memory/5"), Multiaddr.parse("/memory/6")
    dht.locate(b"x", NOW, seeds=[Contact(peer, (hearsay,))])
    (ask,) = dht.actions()
    reply = Message(type=MessageType.FIND_NODE, sender=KadPeer(peer, (own.to_bytes(),)))
    dht.on_reply(ask.id, None, reply, NOW, EPOCH + NOW)
    assert dht.table.get(peer) == Contact(peer, (own,))


def test_speaking_for_another_is_a_lie():
    dht = machine()
    request = Message(type=MessageType.PING, sender=KadPeer(key_of("victim").peer_id, (b"",)))
    with pytest.raises(RemoteProtocolError, match="says it is"):
        dht.handle(key_of("mallory").peer_id, None, request, NOW, EPOCH)
    assert len(dht.table) == 0


def test_loopback_addresses_stay_on_the_machine():
    dht = machine()
    dht.addrs = (Multiaddr.parse("/ip4/127.0.0.1/tcp/1"), Multiaddr.parse("/ip4/8.8.8.8/tcp/1"))
    far = Multiaddr.parse("/ip4/9.9.9.9/tcp/5")
    claims = KadPeer(key_of("far").peer_id, tuple(addr.to_bytes() for addr in dht.addrs))
    reply = dht.handle(claims.peer, far, Message(type=MessageType.FIND_NODE, sender=claims), NOW, EPOCH)
    assert reply.sender.addrs == (dht.addrs[1].to_bytes(),)
    assert dht.table.get(claims.peer).addrs == (dht.addrs[1],)
    near = Multiaddr.parse("/ip4/127.0.0.1/tcp/5")
    reply = dht.handle(key_of("near").peer_id, near, Message(type=MessageType.FIND_NODE), NOW, EPOCH)
    assert len(reply.sender.addrs) == 2


def test_a_clock_that_went_back_is_overcome_at_once():
    swarm = Network(16)
    nodes = grow(swarm, 8)
    publisher = nodes[0]
    swarm.publish(publisher, KEY, b"before")
    publisher.clock_error_s = -60
    publisher.dht._publications.last_seq = 0
    publisher.dht.store = type(publisher.dht.store)(publisher.key.peer_id)
    publisher.dht._answers._store = publisher.dht.store
    swarm.publish(publisher, KEY, b"after")
    swarm.run(5)
    assert [one.payload for one in swarm.read(nodes[5], KEY)[0].entries] == [b"after"]


@pytest.mark.parametrize("error_s", [-85, 85])
def test_clocks_may_be_off_by_a_minute_and_a_half(error_s):
    swarm = Network(17)
    nodes = grow(swarm, 8)
    nodes[0].clock_error_s = error_s
    swarm.publish(nodes[0], KEY)
    assert len(swarm.read(nodes[5], KEY)[0].entries) == 1


def test_a_node_whose_clock_is_an_hour_off_is_told_that_nobody_holds_its_entry():
    swarm = Network(18)
    nodes = grow(swarm, 8)
    nodes[0].clock_error_s = 3600
    assert swarm.publish(nodes[0], KEY)[0].holders == 0


@pytest.mark.parametrize("error_s", [-3600, 3600])
def test_a_reader_whose_clock_is_an_hour_off_is_told_so(error_s):
    swarm = Network(18)
    nodes = grow(swarm, 12)
    for node in nodes[:3]:
        swarm.publish(node, KEY)
    reader = swarm.add(nodes[0])
    reader.clock_error_s = error_s
    swarm.run(5)
    result, _ = swarm.read(reader, KEY)
    assert (result.entries, result.untimely) == ((), 3)
    assert swarm.read(nodes[5], KEY)[0].untimely == 0


def test_requests_others_may_send_are_answered_politely():
    dht = machine()
    remote = key_of("js").peer_id
    for kind in (MessageType.FIND_NODE, MessageType.GET_VALUE, MessageType.ADD_PROVIDER, MessageType.GET_PROVIDERS):
        assert dht.handle(remote, None, Message(type=kind, key=b"/v/x"), NOW, EPOCH).type is kind
    with pytest.raises(RemoteProtocolError, match="32 bytes"):
        dht.handle(remote, None, Message(type=MessageType.GET_ENTRIES, key=b"short"), NOW, EPOCH)


def test_late_and_unknown_answers_are_ignored():
    dht = machine()
    dht.on_reply(12345, None, Message(type=MessageType.PING), NOW, EPOCH)
    dht.on_failure(12345, NOW)
    assert dht.actions() == []


def test_many_queries_wait_their_turn():
    swarm = Network(19)
    nodes = grow(swarm, 5)
    dht = nodes[0].dht
    queries = [dht.read(position(bytes([number])), swarm.now) for number in range(100)]
    assert len(dht._active) <= 32
    swarm.pump(nodes[0])
    swarm.run(20)
    assert all(query in nodes[0].finished for query in queries)
