"""The session machines as a whole chain: fake blocks, random delivery, deaths at any moment.

A fake block's output row depends on all rows of its lane so far, as attention does, so a wrong, missing, doubled or
misplaced row anywhere changes every later token. The oracle is the same blocks applied without any chain.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise

from swarmnode.protocol.chain import ChainMachine, ChainSpec, Hop
from swarmnode.protocol.messages import Attach, Attached, Data, Fork, Open, Rewire, Truncate, Want
from swarmnode.protocol.session import Forked, Job, SessionMachine
from swarmnode.protocol.tensors import Codec, payload_size

HIDDEN = 2
ROW = payload_size(Codec.FP32, 1, HIDDEN)
BLOCKS = 6
SESSION = b"s" * 16


def mix(block: int, rows: list[bytes]) -> bytes:
    return blake2b(b"".join(rows), digest_size=ROW, key=bytes([block + 1])).digest()


class Blocks:
    """Blocks [start, end) with a cache per block and lane."""

    def __init__(self, start: int, end: int) -> None:
        self.caches: dict[tuple[int, int], list[bytes]] = {}
        self.start, self.end = start, end

    def run(self, lane: int, position: int, payload: bytes) -> bytes:
        out = []
        for index in range(0, len(payload), ROW):
            row = payload[index : index + ROW]
            for block in range(self.start, self.end):
                cache = self.caches.setdefault((block, lane), [])
                assert len(cache) >= position
                del cache[position:]
                cache.append(row)
                row = mix(block, cache)
            out.append(row)
            position += 1
        return b"".join(out)

    def fork(self, source: int, target: int) -> None:
        for block in range(self.start, self.end):
            self.caches[block, target] = list(self.caches.get((block, source), ()))


def embed(token: int) -> bytes:
    return blake2b(token.to_bytes(8, "big"), digest_size=ROW).digest()


def next_token(row: bytes) -> int:
    return int.from_bytes(row[:4], "big")


def reference(prompt: list[int], steps: int) -> list[int]:
    blocks, tokens = Blocks(0, BLOCKS), []
    row = blocks.run(0, 0, b"".join(map(embed, prompt)))[-ROW:]
    for step in range(steps):
        tokens.append(next_token(row))
        row = blocks.run(0, len(prompt) + step, embed(tokens[-1]))
    return tokens


@dataclass
class Server:
    name: bytes
    machine: SessionMachine
    blocks: Blocks
    jobs: deque[Job | Fork] = field(default_factory=deque)
    pending: list[tuple[bytes, object, bytes]] = field(default_factory=list)
    """Data from a peer that is not the previous hop yet: parked until the rewire comes."""


class World:
    """Client and servers joined by ordered links; `step` makes one random thing happen."""

    def __init__(self, seed: int, spans: list[tuple[int, int]], lose_logs: bool = False, lanes: int = 1) -> None:
        self.rng = random.Random(seed)
        self.names = 0
        self.servers: dict[bytes, Server] = {}
        self.links: dict[tuple[bytes, bytes], deque] = {}
        self.lose_logs = lose_logs
        self.broken: set[tuple[bytes, bytes]] = set()
        """Links that no longer carry anything."""
        self.quiet: set[bytes] = set()
        """Senders known to have nothing to send."""
        spec = ChainSpec(
            session=SESSION,
            digest=b"d" * 32,
            start=0,
            end=BLOCKS,
            codec=Codec.FP32,
            cuts=(),
            lanes=lanes,
            max_length=200,
        )
        self.chain = ChainMachine(spec, [self.hop(a, b) for a, b in spans])
        self.results: defaultdict[int, deque[bytes]] = defaultdict(deque)
        self.rows = 0
        """Rows computed by all servers."""
        for hop, open_ in self.chain.opens():
            self.open(hop, open_)

    def hop(self, start: int, end: int) -> Hop:
        self.names += 1
        return Hop(peer=b"server%d" % self.names, start=start, end=end)

    def open(self, hop: Hop, open_: Open) -> None:
        server = Server(hop.peer, SessionMachine(open_, b"client", HIDDEN), Blocks(hop.start, hop.end))
        self.servers[hop.peer] = server
        self.attach(server)

    def attach(self, server: Server) -> None:
        if server.machine.next:
            self.send(server.name, server.machine.next, Attach(session=SESSION, start=server.machine.end))

    def send(self, source: bytes, target: bytes, message: object, payload: bytes = b"") -> None:
        if (target in self.servers or target == b"client") and (source, target) not in self.broken:
            self.links.setdefault((source, target), deque()).append((message, payload))

    def kill(self, hops: list[Hop]) -> None:
        """Kill servers; the client repairs at once, with one or two replacements for each dead span."""
        for hop in hops:
            del self.servers[hop.peer]
        self.links = {k: v for k, v in self.links.items() if not {k[0], k[1]} & {hop.peer for hop in hops}}
        after: list[Hop] = []
        for hop in self.chain.hops:
            if hop not in hops:
                after.append(hop)
            elif hop.end - hop.start > 1 and self.rng.random() < 0.5:
                middle = self.rng.randrange(hop.start + 1, hop.end)
                after += [self.hop(hop.start, middle), self.hop(middle, hop.end)]
            else:
                after.append(self.hop(hop.start, hop.end))
        repair = self.chain.repair(after)
        for hop, open_ in repair.opens:
            self.open(hop, open_)
        for hop, rewire in repair.rewires:
            self.send(b"client", hop.peer, rewire)

    def step(self) -> bool:
        """One event; False when nothing can happen any more."""
        choices = [("deliver", key) for key, queue in self.links.items() if queue]
        choices += [("compute", name) for name, server in self.servers.items() if server.jobs]
        choices += [("send", name) for name in (b"client", *self.servers) if name not in self.quiet]
        if not choices:
            return False
        what, key = self.rng.choice(choices)
        if what == "deliver":
            message, payload = self.links[key].popleft()
            self.deliver(key[0], key[1], message, payload)
        elif what == "compute":
            self.compute(self.servers[key])
        elif not self.send_one(key):
            self.quiet.add(key)
            return self.step()
        return True

    def send_one(self, name: bytes) -> bool:
        """One frame of a sender to the hop after it; False if it has nothing to send."""
        machine = self.chain if name == b"client" else self.servers[name].machine
        outgoing = machine.next_outgoing()
        if outgoing is None:
            return False
        first = self.chain.hops[0].peer
        target = first if name == b"client" else machine.next or b"client"
        self.send(name, target, outgoing.message, outgoing.payload)
        return True

    def relay(self) -> None:
        """Two neighbours lose sight of each other."""
        pairs = [pair for pair in pairwise(self.chain.hops) if pair not in self.chain.relayed]
        if pairs:
            sender, receiver = self.rng.choice(pairs)
            for key in ((sender.peer, receiver.peer), (receiver.peer, sender.peer)):
                self.links.pop(key, None)
                self.broken.add(key)
            for hop, rewire in self.chain.relay(sender, receiver).rewires:
                self.send(b"client", hop.peer, rewire)

    def wake(self, name: bytes) -> None:
        """Something happened that may have given this sender something to send."""
        self.quiet.discard(name)

    def deliver(self, source: bytes, target: bytes, message: object, payload: bytes) -> None:
        if target == b"client" and isinstance(message, Data | Truncate | Fork):
            sender = next((hop for hop in self.chain.hops if hop.peer == source), None)
            receiver = self.chain.relay_target(sender) if sender else None
            if receiver is not None:
                self.send(b"client", receiver.peer, message, payload)
            return
        if target == b"client":
            if self.chain.on_result(message) and message.want == Want.LAST:
                self.results[message.lane].append(payload)
            return
        server = self.servers[target]
        if isinstance(message, Rewire):
            if self.lose_logs:
                server.machine.drop_log()
            if not server.machine.on_rewire(message):
                self.chain.replay(server.machine.reached)
                self.wake(b"client")
            if message.set_next:
                self.attach(server)
            parked, server.pending = server.pending, []
            for origin, late, data in parked:
                self.deliver(origin, target, late, data)
        elif isinstance(message, Attached):
            if source == server.machine.next and not server.machine.on_attached(message.received):
                self.chain.replay(server.machine.reached)
                self.wake(b"client")
        elif source != server.machine.prev:
            server.pending.append((source, message, payload))
        elif isinstance(message, Attach):
            self.send(target, source, Attached(received=server.machine.received))
        elif isinstance(message, Truncate):
            server.machine.on_truncate(source, message)
        elif isinstance(message, Fork):
            self.fork(server, source, message)
        elif job := server.machine.on_data(source, message, payload):
            server.jobs.append(job)
        self.wake(server.name)

    def fork(self, server: Server, source: bytes, fork: Fork) -> None:
        forked = server.machine.on_fork(source, fork)
        if forked is Forked.DONE:
            server.jobs.append(fork)
        elif forked is Forked.LOST:
            self.chain.replay(server.machine.reached)
            self.wake(b"client")

    def compute(self, server: Server) -> None:
        job = server.jobs.popleft()
        if isinstance(job, Fork):
            server.blocks.fork(job.source, job.lane)
            return
        output = b""
        if server.machine.is_wanted(job):
            output = server.blocks.run(job.lane, job.position, job.payload)
            self.rows += job.count
        result = server.machine.on_computed(job, output)
        if result is not None:
            self.send(server.name, b"client", result, output[-ROW:])
        self.wake(server.name)

    def generate(self, prompt: list[int], steps: int, killer) -> list[int]:
        chunk = 3
        for at in range(0, len(prompt), chunk):
            piece = prompt[at : at + chunk]
            want = Want.LAST if at + chunk >= len(prompt) else Want.NOTHING
            self.chain.feed(b"".join(map(embed, piece)), len(piece), want)
        tokens: list[int] = []
        for _ in range(steps):
            tokens.append(next_token(self.await_result(killer)))
            self.chain.feed(embed(tokens[-1]), 1, Want.LAST)
        return tokens

    def await_result(self, killer, lane: int = 0) -> bytes:
        self.wake(b"client")
        while not self.results[lane]:
            killer(self)
            self.wake(b"client")
            assert self.step() or self.results[lane], "the chain is stuck"
        return self.results[lane].popleft()
