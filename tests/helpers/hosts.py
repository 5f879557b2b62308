"""Hosts for tests: numbered identities, on an in-memory network or on loopback TCP."""

import asyncio
import contextlib
import random
from functools import partial

from helpers.virtual import LoopClock
from swarmnode.node.host import Host
from swarmnode.node.limits import CONNECTION_MEMORY
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol.ids import PrivateKey
from swarmnode.protocol.limits import SYSTEM, Resource
from swarmnode.protocol.multiaddr import Multiaddr

LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
MEMORY = Multiaddr.parse("/memory/0")


def key(number: int) -> PrivateKey:
    """The identity of test host `number`: the same in every run."""
    return PrivateKey.from_seed(number.to_bytes(32, "big"))


def memory_host(network: MemoryNetwork, number: int, **options) -> Host:
    """A host with an access of its own to the network, listening on /memory/0 unless told otherwise."""
    options.setdefault("listen", [MEMORY])
    options.setdefault("clock", LoopClock())
    options.setdefault("rng", random.Random(number))
    return Host(key(number), transports=[network.transport()], **options)


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
    """What a host holds for its peers, by name and without zeros: nothing, when every stream has ended."""
    wires = host._wires
    found = {
        "handshakes": len(wires._handshaking),
        "window bytes": host.limiter.used(SYSTEM, Resource.MEMORY) - len(wires._tickets) * CONNECTION_MEMORY,
        "streams": sum(wire.stream_count for wire in wires),
        "waiting tasks": sum(len(wire.readers) + len(wire.writers) + len(wire._openers) for wire in wires),
        "served streams": host.limiter.used(SYSTEM, Resource.STREAMS_IN),
        "tasks": len(host._tasks) - _watching(host),
        "crashes": host._tasks.crashes,
    }
    return {name: count for name, count in found.items() if count}


def _watching(host: Host) -> int:
    """The task that closes bulk connections once they are idle lives as long as they do."""
    return sum(task.get_name() == "host:watch bulk connections" for task in host._tasks._tasks)


async def at_rest(*parties: Host, within_s: float = 12.0) -> None:
    """Wait until the hosts hold nothing; the default outlasts LINGER_S. Raises AssertionError saying what is left."""
    try:
        async with asyncio.timeout(within_s):
            while any(held(host) for host in parties):  # noqa: ASYNC110 - no event says that tables are empty
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"left over: {[held(host) for host in parties]}") from None
