"""How a short-lived command gets into a swarm: --peer, the settings file, or a node running on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace

from ..protocol.errors import ConfigError
from ..protocol.multiaddr import Multiaddr
from .config import NodeConfig
from .console import Console
from .node import Node
from .runtime import running_nodes


@dataclass(frozen=True, slots=True)
class Entrance:
    """How a command gets into the swarm."""

    config: NodeConfig
    """A short-lived client's settings."""
    alone: bool
    """There is no swarm: no --peer, nothing in the settings, no node on this machine."""


def entrance(config: NodeConfig, console: Console) -> Entrance:
    """Settings of a client that joins by --peer or the settings file, else through a node of this machine."""
    client = replace(config, listen=(), dht_server=False, persistent=False, publish_runtime=False)
    if client.peers:
        return Entrance(client, False)
    local = running_nodes(client.state_dir, client.swarm)
    addrs = tuple(str(addr) for node in local for addr in _loopback_first(node.addrs))
    if addrs:
        console.note(f"joining the swarm {client.swarm!r} through the node {local[0].peer.short} on this machine")
    return Entrance(replace(client, peers=addrs), not addrs)


def _loopback_first(addrs: Iterable[Multiaddr]) -> list[Multiaddr]:
    return sorted(addrs, key=lambda addr: not addr.is_loopback)


@contextlib.asynccontextmanager
async def client(config: NodeConfig, console: Console) -> AsyncIterator[Node]:
    """A client in a swarm that exists. Raises ConfigError when none is found."""
    found = entrance(config, console)
    if found.alone:
        raise ConfigError(
            f"no node of the swarm {config.swarm!r} is known: start one with swarmnode join, or name one with --peer"
        )
    async with Node(found.config) as node:
        yield node
