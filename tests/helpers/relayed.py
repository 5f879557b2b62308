"""Hosts that reach each other through a relay only."""

import contextlib
import random

from helpers.hosts import MEMORY, key, memory_host, tcp_host
from helpers.virtual import LoopClock
from swarmnode.node.host import Host
from swarmnode.node.relay.server import Relay
from swarmnode.node.transport.memory import MemoryNetwork
from swarmnode.protocol.relay_ledger import RelayLimits

UNMETERED = RelayLimits(bytes_per_s=0)


@contextlib.asynccontextmanager
async def relay_host(kind, number, network, limits=UNMETERED, **options):
    """A running host that is a relay: (host, its Relay)."""
    make = tcp_host if kind == "tcp" else lambda number, **more: memory_host(network, number, **more)
    async with make(number, **options) as host, Relay(host, limits) as relay:
        yield host, relay


def hidden_host(kind, number, network, **options):
    """A host that nobody can dial: behind a NAT in memory, without a listener on TCP."""
    if kind == "tcp":
        return tcp_host(number, listen=[], **options)
    options.setdefault("clock", LoopClock())
    options.setdefault("rng", random.Random(number))
    return Host(key(number), transports=[network.transport(private=True)], listen=[MEMORY], **options)


async def meet(host, relay, *others):
    """The host takes a place at the relay; the others learn where."""
    place = await host.circuits.reserve(relay.peer_id, [addr.without_peer() for addr in relay.listen_addrs[:1]])
    for other in others:
        other.add_addrs(host.peer_id, place.addrs)
    return place


@contextlib.asynccontextmanager
async def relayed_hosts(kind, network=None, limits=UNMETERED):
    """Two hidden hosts, each with a place at a relay that both know."""
    network = network or MemoryNetwork(random.Random(0))
    async with (
        relay_host(kind, 90, network, limits) as (host, _),
        hidden_host(kind, 1, network) as one,
        hidden_host(kind, 2, network) as two,
    ):
        await meet(one, host, two)
        await meet(two, host, one)
        yield one, two
