"""The simulator itself: latencies as documented, sizes as encoded, the same seed the same history."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from random import Random

import pytest
from sim.latency import REGIONS, World
from sim.network import Network, key_of
from sim.plots import chart
from sim.population import grow, nearest, recall, warm
from sim.sizes import message_bytes
from swarmnode.protocol.ids import PeerId
from swarmnode.protocol.kad import Connection, KadPeer, LeasedEntry, Message, MessageType, Record, Stale
from swarmnode.protocol.records import sign_entry
from swarmnode.routing.keys import models_key

KEY = models_key("test")


def history(seed, encode=True):
    network = Network(seed, latency=World(Random(seed)), encode=encode)
    nodes = grow(network, 12)
    network.publish(nodes[0], KEY)
    network.run(60)
    network.read(nodes[5], KEY)
    return network.messages, network.bytes, network.now, [len(node.dht.table) for node in nodes]


def test_latencies_are_what_the_text_says():
    earth, rng = World(Random(1)), Random(2)
    earth.place(999)
    trips = sorted(earth.rtt_s(*rng.sample(range(1000), 2)) for _ in range(5000))
    assert sum(trips) / len(trips) == pytest.approx(0.160, abs=0.012)
    assert trips[len(trips) // 2] == pytest.approx(0.160, abs=0.015)
    assert trips[int(0.95 * len(trips))] == pytest.approx(0.310, abs=0.025)
    assert {earth.region(number) for number in range(1000)} == set(range(len(REGIONS)))
    for _ in range(200):
        one, two = rng.sample(range(1000), 2)
        assert earth.rtt_s(one, two) == pytest.approx(earth.rtt_s(two, one))
        assert earth.delay_s(one, two, rng) >= earth.rtt_s(one, two) / 2


def test_same_seed_same_history_encoded_or_not():
    assert history(3) == history(3)
    assert history(3) == history(3, encode=False)
    assert history(3) != history(4)


def test_history_does_not_hang_on_the_order_of_hashes():
    here = Path(__file__).parent
    code = "from sim.test_simulator import history; print(history(5))"
    seen = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(here.parent)}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        seen.add(run.stdout)
    assert len(seen) == 1


def messages():
    peer = PeerId(b"\x12\x20" + bytes(32))
    entry = sign_entry(key_of("someone"), KEY, bytes(200), seq=2**40, issued_ms=2**41, ttl_s=600)
    named = KadPeer(peer, (bytes(8), bytes(200)), Connection.CONNECTED)
    yield Message(type=MessageType.PING)
    yield Message(type=MessageType.PUT_VALUE, key=b"k" * 128, record=Record(b"key", bytes(1000)))
    yield Message(
        type=MessageType.FIND_NODE, key=KEY, closer_peers=(named,) * 20, provider_peers=(named,), sender=named
    )
    entries = (LeasedEntry(entry, 1), LeasedEntry(entry, 600))
    yield Message(type=MessageType.GET_ENTRIES, key=KEY, entries=entries, cursor=bytes(34), have=bytes(800))
    yield Message(type=MessageType.PUT_ENTRIES, key=KEY, stale=(Stale(peer, 2**40), Stale(peer, 3)), accepted=64)


@pytest.mark.parametrize("message", list(messages()), ids=lambda message: message.type.name)
def test_computed_sizes_are_encoded_sizes(message):
    assert message_bytes(message) == len(message.encode())


def test_partitions_cut_and_losses_lose():
    network = Network(6, encode=False)
    first, second = grow(network, 2)
    network.publish(first, KEY)
    network.side = {second.number: 1}
    assert network.publish(first, models_key("other"))[0].holders == 0
    network.side = {}
    network.loss = 1.0
    assert network.publish(first, models_key("third"))[0].holders == 0


def test_handshakes_take_their_time_once():
    network = Network(7, rtt=(0.1, 0.1), handshake=2, encode=False)
    first, second = grow(network, 2)
    network.run(5)
    _, later_s = network.locate(first, b"x")
    assert later_s == pytest.approx(0.1)
    stranger = network.add()
    query = stranger.dht.locate(b"x", network.now, seeds=[second.contact], width=1)
    assert network.ask(stranger, query)[1] == pytest.approx(0.3)


def test_warm_tables_are_as_good_as_grown_ones():
    network = Network(8, encode=False)
    nodes = warm(network, 150)
    for node in nodes[:5]:
        result, _ = network.locate(node, KEY)
        assert recall(nodes, node, KEY, result.contacts) >= 0.95
        closest = [contact.peer for contact in node.dht.table.closest(node.peer.kad_key, 8)]
        assert closest == [other.peer for other in nearest(nodes, node.peer.raw, 9)][1:]


def test_charts_are_svg_with_every_point():
    drawn = chart("a & b", "x", "y", {"one": [(1, 2), (10, 3)], "two": [(1, 0), (10, 0.5)]}, log_x=True)
    tags = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawn).iter()]
    assert tags.count("circle") == 4
    assert tags.count("polyline") == 2
