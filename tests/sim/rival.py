"""The `kademlia` package's search on our simulated network: its own NodeSpiderCrawl, unchanged.

It reaches the network through an object with the one method it calls, call_find_node. Each call takes what the latency
model says; a dead peer costs its fixed time-out. Who is asked answers from our tables (the search alone differs) or,
with `Tables`, from the package's own RoutingTable, filled with every other node in random order.
"""

from __future__ import annotations

import asyncio
import warnings

from helpers.virtual import VirtualLoop
from swarmnode.routing.keys import position
from swarmnode.routing.table import K

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from kademlia.crawling import NodeSpiderCrawl
    from kademlia.node import Node
    from kademlia.routing import KBucket, RoutingTable

TIMEOUT_S = 5.0
"""What the package waits for an answer."""
ALPHA = 3


class OurTables:
    """Answers from the tables of our nodes."""

    def closest(self, node, key):
        return [self.known(contact) for contact in node.dht.table.closest(key, K)]

    @staticmethod
    def known(contact):
        return Node(contact.key, ip=str(contact.addrs[0]), port=0)


class Tables:
    """The package's own tables, by node number."""

    def __init__(self, network, nodes):
        self._tables = {}
        for node in nodes:
            table = RoutingTable(self, K, Node(node.peer.kad_key, ip=str(node.addr), port=0))
            table.buckets = [KBucket(0, 2**256, K)]
            for other in network.rng.sample(nodes, len(nodes)):
                if other is not node:
                    table.add_contact(Node(other.peer.kad_key, ip=str(other.addr), port=0))
            self._tables[node.number] = table

    def closest(self, node, key):
        return self._tables[node.number].find_neighbors(Node(key), k=K)

    async def call_ping(self, node):
        """The table pings the oldest of a full bucket; here everybody lives while tables are filled."""


class _Protocol:
    def __init__(self, network, asker, tables, timeout_s):
        self._network = network
        self._asker = asker
        self._tables = tables
        self._timeout_s = timeout_s
        self._by_addr = {str(addr): node for addr, node in network.nodes.items()}
        self.asked = 0

    async def call_find_node(self, peer, target):
        self.asked += 1
        network, node = self._network, self._by_addr.get(peer.ip)
        if node is None:
            await asyncio.sleep(self._timeout_s)
            return False, None
        there_s = network.latency.delay_s(self._asker.number, node.number, network.rng)
        back_s = network.latency.delay_s(node.number, self._asker.number, network.rng)
        await asyncio.sleep(there_s + back_s)
        return True, [
            tuple(found) for found in self._tables.closest(node, target.id) if found.id != self._asker.peer.kad_key
        ]


def crawl(network, asker, key, *, tables=None, timeout_s=TIMEOUT_S, width=K):
    """One lookup. Returns the keys of the nodes it names, the seconds it took and the questions it asked."""
    loop = VirtualLoop()
    tables = tables or OurTables()
    target = Node(position(key))
    protocol = _Protocol(network, asker, tables, timeout_s)

    async def find():
        seeds = tables.closest(asker, target.id)
        spider = NodeSpiderCrawl(protocol, target, seeds, width, ALPHA)
        return await spider.find()

    try:
        start = loop.time()
        found = loop.run_until_complete(find())
        return [node.id for node in found], loop.time() - start, protocol.asked
    finally:
        loop.close()


def fill(network, nodes):
    """The package's own tables for all nodes; it wants a running loop to be filled in."""
    loop = VirtualLoop()

    async def build():
        tables = Tables(network, nodes)
        await asyncio.sleep(0)
        return tables

    try:
        return loop.run_until_complete(build())
    finally:
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
