"""Filling a simulated network with nodes, and emptying it again."""

from __future__ import annotations

from bisect import bisect_left

from swarmnode.routing.keys import KEY_BITS, distance, position
from swarmnode.routing.table import K

WARM_SILENCE_S = 60.0
WARM_AGE_S = 3600.0


def grow(network, count, *, every_s=0.5, settle_s=5.0, client_share=0.0, **options):
    """`count` nodes that join one after another through random members, and settle. Returns them.

    With `client_share` some are in client mode, as nodes behind NAT are.
    """
    nodes = [network.add(**options)]
    while len(nodes) < count:
        client = network.rng.random() < client_share
        nodes.append(network.add(entrance(network), server_mode=not client, **options))
        network.run(every_s)
    network.run(settle_s)
    return nodes


def entrance(network):
    """A random live server, to join through."""
    while True:
        node = network.rng.choice(network.everybody)
        if node.alive and node.server:
            return node


def warm(network, count, **options):
    """`count` servers with full tables at once, as after hours together: joining 10,000 one by one takes too long.

    Each bucket gets 20 random members of all that belong there, or all when they are fewer.
    """
    nodes = [network.add(**options) for _ in range(count)]
    acquaint(network, nodes)
    return nodes


def acquaint(network, nodes):
    """Fill the tables of `nodes` with each other."""
    ring = sorted((int.from_bytes(node.peer.kad_key, "big"), node.number) for node in nodes)
    places = [place for place, _ in ring]
    for node in nodes:
        own = int.from_bytes(node.peer.kad_key, "big")
        for shared in range(KEY_BITS):
            shift = KEY_BITS - 1 - shared
            low = (own >> shift ^ 1) << shift
            first, last = bisect_left(places, low), bisect_left(places, low + (1 << shift))
            chosen = range(first, last)
            for index in chosen if len(chosen) <= K else network.rng.sample(chosen, K):
                other = network.everybody[ring[index][1]]
                node.dht.table.heard(other.contact, network.now - WARM_AGE_S * network.rng.random(), other.addr)
                node.dht.table.heard(other.contact, network.now - WARM_SILENCE_S * network.rng.random(), other.addr)
            near = own >> shift << shift
            if bisect_left(places, near + (1 << shift)) - bisect_left(places, near) <= 1:
                break


def nearest(nodes, key, count=K):
    """Brute force: the live servers nearest to a DHT key."""
    target = position(key)
    servers = (node for node in nodes if node.alive and node.server)
    return sorted(servers, key=lambda node: distance(node.peer.kad_key, target))[:count]


def recall(nodes, asker, key, contacts, count=K):
    """Which share of the true `count` nearest, the asker aside, is among the first `count` contacts."""
    truth = {node.peer for node in nearest([node for node in nodes if node is not asker], key, count)}
    return len(truth & {contact.peer for contact in contacts[:count]}) / len(truth)


def teach(network, nodes, samples=40):
    """Let every node have timed some others, as any node has after a minute."""
    for node in nodes:
        for other in network.rng.sample(nodes, min(samples, len(nodes))):
            if other is not node:
                there_s = network.latency.delay_s(node.number, other.number, network.rng)
                back_s = network.latency.delay_s(other.number, node.number, network.rng)
                greeting_s = network.handshake * network.latency.rtt_s(node.number, other.number)
                node.dht.questions.timeouts.observe(other.peer, there_s + back_s + greeting_s)


def mean_rtt_s(network, nodes, pairs=4000):
    """The mean undisturbed round trip between random members."""
    numbers = [node.number for node in nodes]
    chosen = (network.rng.sample(numbers, 2) for _ in range(pairs))
    return sum(network.latency.rtt_s(one, two) for one, two in chosen) / pairs


def fail_silently(network, nodes, share):
    """Kill a share of nodes at one moment; nobody has noticed yet. Returns the survivors."""
    victims = set(network.rng.sample(range(len(nodes)), int(share * len(nodes))))
    for index in victims:
        network.kill(nodes[index])
    return [node for index, node in enumerate(nodes) if index not in victims]
