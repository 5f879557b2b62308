"""Hosts for tests: numbered identities, on an in-memory network or on loopback TCP."""

import asyncio
import contextlib
import random
from functools import partial

from helpers.virtual import LoopClock
from swarmnode.node.host import Host
from swarmnode.node.limits import CONNECTION_MEMORY
from swarmnode.node.transport.memory import MemoryNetwork, Nat
from swarmnode.protocol import relay
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.limits import SYSTEM, Resource
from swarmnode.protocol.multiaddr import Multiaddr
from swarmnode.protocol.yamux_frames import INITIAL_WINDOW

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
MEMORY = Multiaddr.parse("/memory/0")


def key(number: int) -> PrivateKey:
    """The identity of test host `number`: the same in every run."""
    return PrivateKey.from_seed(number.to_bytes(32, "big"))


def memory_host(network: MemoryNetwork, number: int, *, nat: Nat = Nat.OPEN, **options) -> Host:
    """A host with an access of its own to the network, listening on /memory/0 unless told otherwise."""
    options.setdefault("listen", [MEMORY])
    options.setdefault("clock", LoopClock())
    options.setdefault("rng", random.Random(number))
    return Host(key(number), transports=[network.transport(nat=nat)], **options)


def tcp_host(number: int, **options) -> Host:
    """A host on loopback TCP, on a free port."""
    options.setdefault("listen", [LOOPBACK])
    options.setdefault("rng", random.Random(number))
    return Host(key(number), **options)


@contextlib.asynccontextmanager
async def hosts(kind: str, count: int, *, network: MemoryNetwork | None = None, **options):
    """`count` running hosts that know each other's addresses: kind is "tcp" or "memory"."""
    network = network or MemoryNetwork(random.Random(0))
    new = partial(memory_host, network) if kind == "memory" else tcp_host
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for number in range(1, count + 1):
            host = new(number, **options)
            made.append(await stack.enter_async_context(host))
        for host in made:
            for other in made:
                if other is not host:
                    host.add_addrs(other.peer_id, other.listen_addrs)
        yield made


def held(host: Host) -> dict[str, int]:
    """What a host holds for its peers, by name and without zeros: nothing, when every stream has ended.

    What carries relayed connections does not count: it lives as long as they do.
    """
    wires = host._wires
    links = [(mux, wire) for wire in wires for mux in wire.session.streams() if mux.protocol in (relay.HOP, relay.STOP)]
    served = sum(mux.id % 2 != wire._connection.initiator for mux, wire in links)
    carrying = served + _named(host, "host:circuit")
    window = sum(mux.window for mux, _ in links) - (len(links) - served) * INITIAL_WINDOW
    found = {
        "handshakes": len(wires._handshaking),
        "window bytes": host.limiter.used(SYSTEM, Resource.MEMORY) - len(wires._tickets) * CONNECTION_MEMORY - window,
        "streams": sum(wire.stream_count for wire in wires) - len(links),
        "waiting tasks": sum(len(wire.readers) + len(wire.writers) + len(wire._openers) for wire in wires) - len(links),
        "served streams": host.limiter.used(SYSTEM, Resource.STREAMS_IN) - served,
        "tasks": len(host._tasks) - _named(host, "host:watch bulk connections") - carrying,
        "crashes": host._tasks.crashes,
    }
    return {name: count for name, count in found.items() if count}


def _named(host: Host, name: str) -> int:
    """Tasks of a name that live as long as a connection, such as those that carry relayed ones."""
    return sum(task.get_name() == name for task in host._tasks._tasks)


async def at_rest(*parties: Host, within_s: float = 12.0) -> None:
    """Wait until the hosts hold nothing; the default outlasts LINGER_S. Raises AssertionError saying what is left."""
    try:
        async with asyncio.timeout(within_s):
            while any(held(host) for host in parties):  # noqa: ASYNC110 - no event says that tables are empty
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"left over: {[held(host) for host in parties]}") from None
