"""An internet in memory for whole Nodes: places, distances, NATs, silence, partitions, deaths of every kind.

Nodes live on a disc; half a round trip between two of them is their distance. Identities, places and everything
random come from one seed, so a history can be repeated; `digest` sums up every dial, link, write and end of it.
Under the virtual marker only.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Self

from helpers.hosts import key
from helpers.virtual import LoopClock
from swarmnode.node.config import NodeConfig
from swarmnode.node.node import Node
from swarmnode.node.transport.memory import MemoryNetwork, MemoryTransport, Nat

RADIUS_S = 0.06
"""Of the disc, in seconds one way: the longest round trip is four times that."""
LAST_MILE_S = 0.002
"""Added to every path."""


class Internet:
    """See the module's docstring. `async with`; nodes still running at the end leave one after another."""

    def __init__(self, seed: int, home: Path) -> None:
        self.rng = random.Random(seed)
        self.network = MemoryNetwork(random.Random(seed))
        self.network.distance = self._distance
        self.network.trace = self._note
        self.events = 0
        """Of the trace, so far."""
        self._hash = hashlib.sha256()
        self._home = home
        self._seed = seed
        self._made = 0
        self._places: dict[MemoryTransport, complex] = {}
        self._nodes: dict[Node, tuple[MemoryTransport, contextlib.AsyncExitStack]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for node in tuple(self._nodes):
            await self.stop(node)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Those that run, in order of their start."""
        return tuple(self._nodes)

    @property
    def digest(self) -> str:
        """Equal for two histories with the same events at the same times."""
        return self._hash.hexdigest()

    def _note(self, now: float, what: str, source: int, target: int, size: int) -> None:
        self.events += 1
        self._hash.update(f"{now!r} {what} {source} {target} {size}\n".encode())

    def _distance(self, source: MemoryTransport, target: MemoryTransport) -> float:
        return LAST_MILE_S + abs(self._places[source] - self._places[target]) * (source is not target)

    # nodes

    async def node(self, *doors: Node, private: bool = False, nat: Nat | None = None, **settings: object) -> Node:
        """A new node that joins through `doors`. `private`: behind a NAT, and a DHT client for that reason. `nat`: what
        it is behind, and finds out by itself."""
        self._made += 1
        home = self._home / f"node{self._made}"
        home.mkdir(parents=True)
        (home / "key").write_bytes(key(1000 * self._seed + self._made).marshal())
        transport = self.network.transport(private=private, nat=nat)
        self._places[transport] = self._place()
        settings = {"dht_server": not private, "reachability": "auto" if nat is None else "check", **settings}
        config = NodeConfig(
            listen=["/memory/0"],
            peers=[str(door.addrs[0]) for door in doors],
            identity=home / "key",
            **{f"{name}_dir": home / name for name in ("data", "state", "cache")},
            **settings,
        )
        node = Node(config, transports=[transport], clock=LoopClock(), rng=random.Random(self.rng.random()))
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(node)
            self._nodes[node] = transport, stack.pop_all()
        return node

    def _place(self) -> complex:
        while True:
            place = complex(self.rng.uniform(-1, 1), self.rng.uniform(-1, 1))
            if abs(place) <= 1:
                return place * RADIUS_S

    async def stop(self, node: Node) -> None:
        """Leave in order."""
        _, stack = self._nodes.pop(node)
        await stack.aclose()

    async def kill(self, node: Node) -> None:
        """As by kill -9: its system resets its links."""
        self.network.crash(self._nodes[node][0])
        await self.stop(node)

    async def power_off(self, node: Node) -> None:
        """As by power loss: nobody hears anything."""
        self.network.vanish(self._nodes[node][0])
        await self.stop(node)

    # paths

    def part(self, some: Iterable[Node], others: Iterable[Node]) -> None:
        """Silence between two groups, until heal()."""
        for one, other in product(tuple(some), tuple(others)):
            self.network.hold(self._nodes[one][0], self._nodes[other][0])

    def heal(self, some: Iterable[Node], others: Iterable[Node]) -> None:
        """The groups hear each other again."""
        for one, other in product(tuple(some), tuple(others)):
            self.network.heal(self._nodes[one][0], self._nodes[other][0])

    def rtt_s(self, one: Node, other: Node) -> float:
        """The path's round trip."""
        return 2 * self._distance(self._nodes[one][0], self._nodes[other][0])
