"""Many DHT machines on one simulated clock. What runs is the product's routing code; only the network is made up.

A `Network` carries the machines' questions with the delays of a latency model (latency.py), loses some, honours
partitions, and keeps count. Every node listens on an IPv4 address of its own, in a /24 of its own unless told
otherwise, so subnet limits are in force. With `encode` (the default) messages really pass as bytes; without it the same
objects are handed over and their encoded size is computed, which big runs need: sizes are equal, test_simulator.py
checks that. Signatures are always real.

    silent      a dead or lost peer never answers: the asker waits for its own hard limit, the worst case;
                False: it refuses at once, as a killed process on a live machine does
    loss        share of requests, and of replies, that are lost: the asker waits in vain
    handshake   round trips a first exchange with a peer takes in addition (TCP and Noise: 2); connections stay open

The same seed gives the same history, event by event.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from hashlib import sha256
from random import Random

from sim.latency import Uniform
from sim.sizes import message_bytes
from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.kad import Message
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing.actions import Ask
from swarmnode.routing.dht import Dht
from swarmnode.routing.table import Contact

EPOCH = 1_700_000_000.0
REJOIN_S = 5.0
PACKET_BYTES = 90
"""TCP, IP, Noise and yamux around one small message."""

SILENCE = object()
"""What an `answer` returns that does not want to answer."""


def key_of(name):
    """A private key by name."""
    return PrivateKey.from_seed(sha256(str(name).encode()).digest())


class SimNode:
    """One node: its machine, its address, and the results of its queries."""

    def __init__(self, network, number, name, *, server_mode=True, subnet=None, **options):
        self.network = network
        self.number = number
        self.key = key_of(name)
        self.peer = self.key.peer_id
        self.addr = address(number, subnet)
        self.dht = Dht(self.key, rng=Random(name), now=network.now, server_mode=server_mode, **options)
        self.dht.addrs = (self.addr,)
        self.server = server_mode
        self.contact = Contact(self.peer, (self.addr,))
        self.alive = True
        self.born = network.now
        self.died = None
        self.clock_error_s = 0.0
        self.finished = {}
        self.asked = 0
        self.sent_bytes = 0
        self.armed = float("inf")
        self.answer = self.dht.handle
        """Replace it to make the node lie."""
        self.connected = set()

    @property
    def wall(self):
        return EPOCH + self.network.now + self.clock_error_s


def address(number, subnet=None):
    """A public IPv4 address: by default in a /24 of the node's own; `subnet` names one as (a, b, c)."""
    a, b, c = subnet or (11 + (number >> 16), (number >> 8) & 255, number & 255)
    return Multiaddr((("ip4", f"{a}.{b}.{c}.{number % 250 + 1}"), ("tcp", str(1024 + number % 60_000))))


class Network:
    """The network between the nodes, the clock, and the books."""

    def __init__(
        self, seed=0, *, rtt=(0.02, 0.2), latency=None, silent=True, loss=0.0, encode=True, handshake=0, watch=()
    ):
        self.rng = Random(seed)
        self.now = 100.0
        self.latency = latency or Uniform(*rtt)
        self.silent = silent
        self.loss = loss
        self.encode = encode
        self.handshake = handshake
        self.everybody = []
        self.nodes = {}
        """Live servers by address."""
        self.side = {}
        """Partition: side of each node (by number) that is cut off; nodes not named are on side 0."""
        self.messages = 0
        self.bytes = 0
        self.by_type = Counter()
        self.bytes_by_type = Counter()
        self.trace = sha256()
        self._events = []
        self._serial = itertools.count()

    # Building

    def add(self, bootstrap=None, *, name=None, **options):
        """A new node, joining through another one; should that die meanwhile, through yet another."""
        number = len(self.everybody)
        node = SimNode(self, number, name or f"{self.rng.random()}-{number}", **options)
        self.latency.place(number)
        self.everybody.append(node)
        if node.server:
            self.nodes[node.addr] = node
        if bootstrap is not None:
            self._join(node, bootstrap)
        self.pump(node)
        return node

    def _join(self, node, bootstrap):
        query = node.dht.locate(node.peer.raw, self.now, seeds=[bootstrap.contact])
        node.dht.refresh(self.now)
        self.pump(node)
        self.at(self.now + REJOIN_S, self._rejoin, node, query)

    def _rejoin(self, node, query):
        """Nobody answered: that others have come in through this node meanwhile does not make it a member."""
        entered = query in node.finished and node.finished[query][1].contacts
        if node.alive and self.nodes and not entered:
            self._join(node, self.rng.choice(list(self.nodes.values())))

    def kill(self, node):
        """The node vanishes without a word."""
        node.alive = False
        node.died = self.now
        self.nodes.pop(node.addr, None)

    @property
    def live(self):
        """Live nodes, clients included, in order of birth."""
        return [node for node in self.everybody if node.alive]

    # Time

    def at(self, when, action, *args):
        """Call a function at a time."""
        heapq.heappush(self._events, (when, next(self._serial), action, args))

    def run(self, seconds=None, until=None):
        """Let time pass; `until` is checked after each event."""
        end = float("inf") if seconds is None else self.now + seconds
        events = self._events
        while events and events[0][0] <= end:
            if until is not None and until():
                return
            self.now, _, action, args = heapq.heappop(events)
            action(*args)
        if seconds is not None:
            self.now = end

    # Queries

    def ask(self, node, query):
        """Run until a node's query is finished; returns the result and the seconds it took."""
        start = self.now
        self.pump(node)
        self.run(60, until=lambda: query in node.finished)
        when, result = node.finished[query]
        return result, when - start

    def locate(self, node, key, **options):
        return self.ask(node, node.dht.locate(key, self.now, **options))

    def read(self, node, key, **options):
        return self.ask(node, node.dht.read(key, self.now, **options))

    def publish(self, node, key, payload=b"here", ttl_s=100, **options):
        return self.ask(node, node.dht.publish(key, payload, ttl_s, self.now, node.wall, **options))

    # Carrying out what machines want

    def pump(self, node):
        """Carry out what a machine wants and re-arm its timer."""
        if not node.alive:
            return
        for action in node.dht.actions():
            if isinstance(action, Ask):
                self._send(node, action)
            else:
                node.finished[action.query] = (self.now, action)
        due = node.dht.next_timer()
        if due < node.armed or node.armed < self.now:
            node.armed = due
            self.at(due, self._tick, node, due)

    def _tick(self, node, due):
        if node.alive and node.armed == due:
            node.armed = float("inf")
            node.dht.tick(self.now, node.wall)
            self.pump(node)

    def _count(self, node, message, raw):
        size = PACKET_BYTES + (len(raw) if self.encode else message_bytes(message))
        self.messages += 1
        self.bytes += size
        node.sent_bytes += size
        self.by_type[message.type.name] += 1
        self.bytes_by_type[message.type.name] += size

    def _send(self, node, ask):
        node.asked += 1
        raw = ask.request.encode() if self.encode else ask.request
        self._count(node, ask.request, raw)
        target = next((self.nodes[addr] for addr in ask.contact.addrs if addr in self.nodes), None)
        if target is None or self._lost(node, target):
            wait_s = ask.limit_s if self.silent or target is not None else 0.05
            self.at(self.now + wait_s, self._fail, node, ask)
            return
        delay_s = self.latency.delay_s(node.number, target.number, self.rng)
        if target.peer != ask.contact.peer:  # Noise meets somebody else there
            self.at(self.now + 4 * delay_s, self._fail, node, ask)
            return
        if self.handshake and target.number not in node.connected:
            node.connected.add(target.number)
            target.connected.add(node.number)
            delay_s += self.handshake * self.latency.rtt_s(node.number, target.number)
        self.at(self.now + delay_s, self._arrive, node, target, ask, raw, self.now + ask.limit_s)

    def _lost(self, node, target):
        if self.side and self.side.get(node.number, 0) != self.side.get(target.number, 0):
            return True
        return self.loss > 0 and self.rng.random() < self.loss

    def _arrive(self, node, target, ask, raw, end):
        delay_s = self.latency.delay_s(target.number, node.number, self.rng)
        if not target.alive or self._lost(target, node):
            self.at(end if self.silent else self.now + delay_s, self._fail, node, ask)
            return
        request = Message.decode(raw) if self.encode else raw
        try:
            reply = target.answer(node.peer, node.addr, request, self.now, target.wall)
        except RemoteProtocolError:
            reply = None
        self.pump(target)
        if reply is None:
            self.at(self.now + delay_s, self._fail, node, ask)
            return
        if reply is SILENCE:
            self.at(end, self._fail, node, ask)
            return
        raw = reply.encode() if self.encode else reply
        self._count(target, reply, raw)
        if self.now + delay_s > end:
            self.at(end, self._fail, node, ask)
        else:
            self.at(self.now + delay_s, self._back, node, target, ask, raw)

    def _back(self, node, target, ask, raw):
        if node.alive:
            reply = Message.decode(raw) if self.encode else raw
            node.dht.on_reply(ask.id, target.addr, reply, self.now, node.wall)
            self.pump(node)

    def _fail(self, node, ask):
        if node.alive:
            node.dht.on_failure(ask.id, self.now)
            self.pump(node)
