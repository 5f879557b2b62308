"""Villains: what they get accepted (nothing), hide (little) and learn whom to blame for (nobody)."""

import dataclasses

import pytest
from sim.network import Network, key_of
from sim.population import acquaint, grow, nearest
from sim.scenarios import eclipse, siege
from sim.villains import STRATEGIES, Gang
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.kad import LeasedEntry, Message, MessageType
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.records import MAX_PAYLOAD_BYTES, MAX_TTL_S, sign_entry
from swarmnode.routing.keys import models_key, position
from swarmnode.routing.store import StoreLimits
from swarmnode.routing.table import BUCKET_SUBNET_LIMIT, TABLE_SUBNET_LIMIT

KEY = models_key("test")


def test_a_fifth_of_the_nodes_lies_in_every_way():
    seen = siege(150, 0.2, STRATEGIES, tries=20)
    assert seen.read == seen.held == seen.tries
    assert seen.false == 0


@pytest.mark.slow
@pytest.mark.parametrize("paths", [1, 3])
@pytest.mark.parametrize("strategies", [STRATEGIES, *((name,) for name in STRATEGIES)], ids=" ".join)
def test_a_fifth_lies(strategies, paths):
    seen = siege(500, 0.2, strategies, paths=paths)
    assert seen.read >= 0.95 * seen.tries
    assert seen.held == seen.tries


@pytest.mark.slow
def test_disjoint_paths_pass_where_one_path_is_caught():
    one, three = (siege(500, 0.5, ("accomplices",), paths=paths, tries=80) for paths in (1, 3))
    assert three.read > one.read
    assert three.read >= 0.9 * three.tries


@pytest.mark.parametrize("subnets", [1, 4])
def test_ids_chosen_around_a_key(subnets):
    seen = eclipse(120, 40, subnets, tries=2, ground=600)
    assert seen.read == seen.tries
    assert seen.most_per_bucket <= BUCKET_SUBNET_LIMIT
    assert seen.most_per_table <= TABLE_SUBNET_LIMIT
    for holders, told, honest in zip(seen.holders, seen.subnets, seen.honest_holders, strict=True):
        assert honest >= 3
        assert holders - subnets <= honest <= holders, "at most one liar of each subnet is counted"
        assert told <= holders


def test_an_announcer_is_told_that_its_key_is_crowded():
    seen = eclipse(150, 60, 60, tries=1, ground=6000)
    assert seen.crowding[0] > 4
    calm = eclipse(150, 1, 1, tries=3, ground=2)
    assert max(calm.crowding) < 4


def test_an_announcer_is_told_how_many_networks_hold_its_entry():
    network = Network(6)
    nodes = [network.add(subnet=(198, 51, number % 3)) for number in range(9)]
    acquaint(network, nodes)
    result, _ = network.publish(nodes[0], KEY)
    assert result.holders == len(result.holding) == 8
    assert result.subnets == 3


def poison(network, key, victim, honest):
    """Entries nobody may accept, by name; a tuple is several messages after one another."""
    now_ms = int(honest.wall * 1000)
    genuine = sign_entry(victim, key, b"true", seq=now_ms, issued_ms=now_ms, ttl_s=100)
    yield "forged", dataclasses.replace(genuine, payload=b"false")
    yield "unsigned", dataclasses.replace(genuine, signature=bytes(64))
    yield "renumbered", dataclasses.replace(genuine, seq=genuine.seq + 1)
    yield "prolonged", dataclasses.replace(genuine, ttl_s=MAX_TTL_S)
    yield "of another key", sign_entry(victim, models_key("elsewhere"), b"true", seq=1, issued_ms=now_ms, ttl_s=100)
    yield "future", sign_entry(victim, key, b"true", seq=2, issued_ms=now_ms + 100_000, ttl_s=100)
    yield "expired", sign_entry(victim, key, b"true", seq=3, issued_ms=now_ms - 300_000, ttl_s=100)


def test_poison_at_ten_honest_nodes():
    network = Network(1)
    nodes = grow(network, 12)
    mallory, victim, honest = nodes[0], nodes[1], nodes[2:]
    accepted = 0
    for name, entry in poison(network, KEY, victim.key, honest[0]):
        for node in honest:
            filed = dataclasses.replace(entry, key=KEY) if name == "of another key" else entry
            message = Message(type=MessageType.PUT_ENTRIES, key=KEY, entries=(LeasedEntry(filed, 100),))
            try:
                reply = node.dht.handle(
                    mallory.peer, mallory.addr, Message.decode(message.encode()), network.now, node.wall
                )
                accepted += reply.accepted
            except RemoteProtocolError:
                network.run(0.1)
            node.dht.questions._liars.succeeded(mallory.peer)  # let it try everything
            assert not node.dht.store.live(KEY, network.now), name
    assert accepted == 0


def test_a_list_flooded_from_one_network_still_names_every_honest_server():
    """Five times more invented servers than a holder keeps under a key, put to everybody again and again."""
    network = Network(7)
    nodes = grow(network, 14, limits=StoreLimits(entries_per_key=16))
    servers = nodes[:8]
    for node in servers:
        network.publish(node, KEY)
    mallory = network.add(nodes[0], subnet=(198, 51, 100))
    for wave in range(2):
        now_ms = int(mallory.wall * 1000)
        for number in range(80):
            lie = sign_entry(key_of(f"nobody {number}"), KEY, b"lie", seq=now_ms, issued_ms=now_ms, ttl_s=MAX_TTL_S)
            message = Message(type=MessageType.PUT_ENTRIES, key=KEY, entries=(LeasedEntry(lie, MAX_TTL_S),))
            for node in nodes:
                node.dht.handle(mallory.peer, mallory.addr, message, network.now, node.wall)
        network.run(45)  # the servers announce themselves anew into full shelves
        found, _ = network.read(nodes[-1 - wave], KEY)
        assert {node.peer for node in servers} <= {entry.subkey for entry in found.entries}
        assert all(len(node.dht.store.live(KEY, network.now)) <= 16 for node in nodes)


def test_oversized_entries_do_not_pass_the_parser():
    network = Network(2)
    victim = grow(network, 2)[1]
    now_ms = int(victim.wall * 1000)
    entry = sign_entry(victim.key, KEY, bytes(MAX_PAYLOAD_BYTES), seq=1, issued_ms=now_ms, ttl_s=100)
    raw = Message(type=MessageType.PUT_ENTRIES, key=KEY, entries=(LeasedEntry(entry, 100),)).encode()
    object.__setattr__(entry, "payload", bytes(MAX_PAYLOAD_BYTES + 1))
    too_long = Message(type=MessageType.PUT_ENTRIES, key=KEY, entries=(LeasedEntry(entry, 100),)).encode()
    assert Message.decode(raw).entries
    with pytest.raises(RemoteProtocolError):
        Message.decode(too_long)


def test_replays_neither_prolong_nor_resurrect():
    network = Network(3)
    nodes = grow(network, 12)
    server, mallory = nodes[0], nodes[1]
    network.publish(server, KEY, b"old")
    recorded = server.dht.store.live(KEY, network.now)[0]
    network.run(1)
    network.ask(server, server.dht.withdraw(KEY, network.now, server.wall))
    for _ in range(30):
        for node in nodes[2:]:
            replay = Message(type=MessageType.PUT_ENTRIES, key=KEY, entries=(recorded,))
            node.dht.handle(mallory.peer, mallory.addr, replay, network.now, node.wall)
        assert network.read(nodes[5], KEY)[0].entries == ()
        network.run(10)


def test_nobody_can_mark_a_victim_offline():
    """Half of the nodes tell wrong addresses of everybody; the victim's announcement and the victim are found."""
    network = Network(4)
    nodes = grow(network, 40)
    victim = nodes[7]
    network.publish(victim, KEY)
    gang = Gang(network)
    gang.recruit([node for node in nodes[::2] if node is not victim], "wrong")
    honest = [node for node in nodes[1::2] if node is not victim]
    found = seen = 0
    for _ in range(3):
        network.run(30)
        for reader in honest:
            seen += [entry.subkey for entry in network.read(reader, KEY)[0].entries] == [victim.peer]
            known = reader.dht.table.get(victim.peer)
            found += known is not None and victim.addr in known.addrs
    assert seen >= 0.95 * 3 * len(honest)
    assert found >= 0.95 * 3 * len(honest)


def test_accusations_do_not_exist():
    """There is no message that says a peer is dead; naming it with junk addresses changes nothing in a table."""
    network = Network(5)
    nodes = grow(network, 20)
    victim, reader = nodes[3], nodes[4]
    before = reader.dht.table.get(victim.peer)
    assert before is not None
    liar = nearest(nodes, victim.peer.raw, 3)[-1]
    gang = Gang(network)
    gang.recruit([liar], "wrong")
    for _ in range(20):
        network.locate(reader, position(victim.peer.raw))
    assert reader.dht.table.get(victim.peer) == before
    assert Multiaddr.parse(str(victim.addr)) in before.addrs
