"""Every kind of byte stream the node has, each as a world in which fresh streams can be opened.

A new kind (relayed, a second connection, another transport) is one line in KINDS and then passes the whole
conformance suite (tests/node/test_streams.py) or does not. See docs/testing.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import pytest
from helpers.hosts import at_rest, hosts
from helpers.relayed import relayed_hosts
from helpers.terrible import Gentle
from swarmnode.node.host import Host
from swarmnode.node.transport import loopback
from swarmnode.node.transport.base import Stream
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol import yamux

PROTOCOL = "/test/stream/1.0.0"
NEGOTIATION = 256
"""More than the bytes of a protocol negotiation, which count against the window."""


class World:
    """Two hosts, or one twice, and the streams between them. `window` is what a writer may be ahead of its reader."""

    def __init__(self, one: Host, two: Host, window: int, *, bulk: bool = False) -> None:
        self.one = one
        self.two = two
        self.window = window
        self._bulk = bulk
        self._arrived: asyncio.Queue[Stream] = asyncio.Queue()
        self._ended: dict[Stream, asyncio.Event] = {}
        self._opened: list[Stream] = []
        two.handle(PROTOCOL, self._serve, max_streams_per_peer=10_000)

    async def _serve(self, stream: Stream) -> None:
        self._ended[stream] = asyncio.Event()
        self._arrived.put_nowait(stream)
        await self._ended[stream].wait()

    async def open(self) -> tuple[Stream, Stream]:
        """The two ends of a fresh stream."""
        near = await self.one.open_stream(self.two.peer_id, PROTOCOL, bulk=self._bulk)
        self._opened.append(near)
        far = await self._arrived.get()
        assert (near.remote, near.protocol) == (self.two.peer_id, PROTOCOL)
        assert (far.remote, far.protocol) == (self.one.peer_id, PROTOCOL)
        return near, far

    def finish(self, far: Stream) -> None:
        """Let the handler at the far end return, which closes its stream."""
        self._ended[far].set()

    async def settle(self) -> None:
        """Let everything that can arrive and be answered do so."""
        for _ in range(2):
            await self.one.ping(self.two.peer_id)
            await self.two.ping(self.one.peer_id)

    def sever(self) -> None:
        """Break the connection under the streams, as the death of its peer does."""
        for wire in self.one._wires.to(self.two.peer_id):
            wire.abort("severed by the test")

    async def end(self) -> None:
        """End what the check left open; afterwards the hosts must hold nothing."""
        for event in self._ended.values():
            event.set()
        for stream in self._opened:
            await stream.close()
        await at_rest(self.one, self.two)


@contextlib.asynccontextmanager
async def through_relay(kind: str, *, swapped: bool = False, **path: float) -> AsyncIterator[World]:
    """Streams over a connection that a third host carries; `swapped` as above."""
    network = MemoryNetwork(random.Random(0), **path)
    async with relayed_hosts(kind, network) as (one, two):
        if swapped:
            await two.connect(one.peer_id)
        yield World(one, two, yamux.STREAM_WINDOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of stream."""

    name: str
    world: Callable[[], contextlib.AbstractAsyncContextManager[World]]
    virtual: bool = True
    """Runs on the virtual clock; else on real sockets, with every event loop."""
    connected: bool = True
    """There is a connection below, which can break."""


@contextlib.asynccontextmanager
async def to_self() -> AsyncIterator[World]:
    """A node's streams to itself."""
    async with hosts("memory", 1) as (host,):
        yield World(host, host, loopback.WINDOW)


@contextlib.asynccontextmanager
async def between(
    kind: str, *, weather: int | None = None, swapped: bool = False, bulk: bool = False, **path: float
) -> AsyncIterator[World]:
    """Streams between two hosts; `swapped`: the one that opens streams is the one that was dialed."""
    network = MemoryNetwork(random.Random(0), **path)
    if weather is not None:
        network.weather = Gentle(weather)
    async with hosts(kind, 2, network=network) as (one, two):
        if swapped:
            await two.connect(one.peer_id)
        world = World(one, two, yamux.STREAM_WINDOW, bulk=bulk)
        if bulk:  # a first ping makes the ordinary connection, and tells how long the path is
            await world.settle()
        yield world


KINDS = [
    Kind(name="loopback", world=to_self, connected=False),
    Kind(name="memory", world=partial(between, "memory", latency_s=0.001)),
    Kind(name="accepted", world=partial(between, "memory", latency_s=0.001, swapped=True)),
    Kind(name="far", world=partial(between, "memory", latency_s=0.02, jitter_s=0.01, rate=100e6)),
    Kind(name="bulk", world=partial(between, "memory", latency_s=0.02, bulk=True)),
    Kind(name="choppy", world=partial(between, "memory", latency_s=0.01, weather=9)),
    Kind(name="relayed", world=partial(through_relay, "memory", latency_s=0.001)),
    Kind(name="relayed-far", world=partial(through_relay, "memory", latency_s=0.02, jitter_s=0.01, rate=100e6)),
    Kind(name="relayed-accepted", world=partial(through_relay, "memory", latency_s=0.001, swapped=True)),
    Kind(name="tcp", world=partial(between, "tcp"), virtual=False),
    Kind(name="relayed-tcp", world=partial(through_relay, "tcp"), virtual=False),
]


def cases(checks: list[Callable[..., object]], *, virtual: bool) -> list[object]:
    """(kind, check) for parametrize: each check with each kind that it is for."""
    return [
        pytest.param(kind, check, id=f"{kind.name}-{check.__name__}")
        for kind in KINDS
        for check in checks
        if kind.virtual is virtual
        and (kind.connected or not getattr(check, "needs_connection", False))
        and (kind.virtual or not getattr(check, "needs_time", False))
    ]
