"""Many DHT machines on one simulated clock: seeded latencies, deaths, and messages that really pass as bytes."""

from __future__ import annotations

import heapq
import itertools
from hashlib import sha256
from random import Random

from swarmnode.protocol.errors import RemoteProtocolError
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.kad import Message
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.routing.dht import Ask, Dht
from swarmnode.routing.table import Contact

EPOCH = 1_700_000_000.0


def key_of(name):
    """A private key by name."""
    return PrivateKey.from_seed(sha256(str(name).encode()).digest())


class SimNode:
    """One node: its machine, its address, and the results of its queries."""

    def __init__(self, swarm, name, server_mode=True, **options):
        self.swarm = swarm
        self.key = key_of(name)
        self.addr = Multiaddr.parse(f"/memory/{next(swarm.addresses)}")
        self.dht = Dht(self.key, rng=Random(name), now=swarm.now, server_mode=server_mode, **options)
        self.dht.addrs = (self.addr,)
        self.alive = True
        self.clock_error_s = 0.0
        self.finished = {}
        self.asked = 0

    @property
    def wall(self):
        return EPOCH + self.swarm.now + self.clock_error_s

    @property
    def contact(self):
        return Contact(self.key.peer_id, (self.addr,))


class Swarm:
    """The network between them. A dead node refuses at once or, with `silent`, never answers."""

    def __init__(self, seed=0, rtt=(0.02, 0.2), silent=True):
        self.rng = Random(seed)
        self.now = 100.0
        self.nodes = {}
        self.silent = silent
        self.messages = 0
        self.bytes = 0
        self.addresses = itertools.count(1)
        self._rtt = rtt
        self._events = []
        self._serial = itertools.count()
        self._armed = {}
        self._names = itertools.count()

    def add(self, bootstrap=None, **options):
        """A new node, joining through another one."""
        node = SimNode(self, f"{self.rng.random()}-{next(self._names)}", **options)
        self.nodes[node.addr] = node
        if bootstrap is not None:
            node.dht.locate(node.key.peer_id.raw, self.now, seeds=[bootstrap.contact])
        self.pump(node)
        return node

    def kill(self, node):
        node.alive = False
        del self.nodes[node.addr]

    def at(self, when, action):
        heapq.heappush(self._events, (when, next(self._serial), action))

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
        if due < self._armed.get(node.addr, float("inf")) or self._armed[node.addr] < self.now:
            self._armed[node.addr] = due
            self.at(due, lambda: self._tick(node))

    def run(self, seconds=None, until=None):
        """Let time pass; `until` is checked after each event."""
        end = float("inf") if seconds is None else self.now + seconds
        while self._events and self._events[0][0] <= end:
            if until is not None and until():
                return
            self.now, _, action = heapq.heappop(self._events)
            action()
        if seconds is not None:
            self.now = end

    def ask(self, node, query):
        """Run until a node's query is finished; returns the result and the seconds it took."""
        start = self.now
        self.pump(node)
        self.run(60, until=lambda: query in node.finished)
        when, result = node.finished[query]
        return result, when - start

    def read(self, node, key):
        return self.ask(node, node.dht.read(key, self.now))

    def publish(self, node, key, payload=b"here", ttl_s=100):
        return self.ask(node, node.dht.publish(key, payload, ttl_s, self.now, node.wall))

    def _tick(self, node):
        self._armed[node.addr] = float("inf")
        if node.alive:
            node.dht.tick(self.now, node.wall)
            self.pump(node)

    def _send(self, node, ask):
        low, high = self._rtt
        delay = self.rng.uniform(low, high) / 2
        raw = ask.request.encode()
        self.messages += 1
        node.asked += 1
        self.bytes += len(raw)
        target = next((self.nodes[addr] for addr in ask.contact.addrs if addr in self.nodes), None)
        if target is None or target.key.peer_id != ask.contact.peer:
            wait = ask.limit_s if self.silent else 2 * delay
            self.at(self.now + wait, lambda: self._fail(node, ask))
            return
        self.at(self.now + delay, lambda: self._arrive(node, target, ask, raw, delay))

    def _arrive(self, node, target, ask, raw, delay):
        if not target.alive:
            self.at(self.now + (ask.limit_s if self.silent else delay), lambda: self._fail(node, ask))
            return
        try:
            request = Message.decode(raw)
            reply = target.dht.handle(node.key.peer_id, None, request, self.now, target.wall).encode()
        except RemoteProtocolError:
            self.at(self.now + delay, lambda: self._fail(node, ask))
        else:
            self.bytes += len(reply)
            self.at(self.now + delay, lambda: self._back(node, ask, reply))
        self.pump(target)

    def _back(self, node, ask, reply):
        if node.alive:
            node.dht.on_reply(ask.id, None, Message.decode(reply), self.now, node.wall)
            self.pump(node)

    def _fail(self, node, ask):
        if node.alive:
            node.dht.on_failure(ask.id, self.now)
            self.pump(node)


def grow(swarm, count, **options):
    """`count` nodes that joined one after another through random members, and settled."""
    nodes = [swarm.add(**options)]
    for _ in range(count - 1):
        nodes.append(swarm.add(swarm.rng.choice(nodes), **options))
        swarm.run(0.5)
    swarm.run(5)
    return nodes
