"""How a short-lived command gets into a swarm: --peer, the settings file, a node running on this machine, or one on the
local network. And how others are let in: invites."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace

from ..protocol.errors import ConfigError
from ..protocol.invite import Invite
from ..protocol.multiaddr import Multiaddr
from . import lan
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
    """There is no swarm: no --peer, nothing in the settings, no node on this machine or its network."""


async def entrance(config: NodeConfig, console: Console) -> Entrance:
    """Settings of a client that joins by --peer or the settings file, else through a node near by."""
    client = replace(config, listen=(), dht_server=False, persistent=False, publish_runtime=False, lan=False)
    if client.peers:
        return Entrance(client, False)
    local = running_nodes(client.state_dir, client.swarm)
    addrs = tuple(str(addr) for node in local for addr in _loopback_first(node.addrs))
    if addrs:
        console.note(f"joining the swarm {client.swarm!r} through the node {local[0].peer.short} on this machine")
    elif config.lan and (found := await lan.find(client.swarm)):
        console.note(f"joining the swarm {client.swarm!r} through a node on this network, {found[0]}")
        addrs = tuple(map(str, found))
    return Entrance(replace(client, peers=addrs), not addrs)


def _loopback_first(addrs: Iterable[Multiaddr]) -> list[Multiaddr]:
    return sorted(addrs, key=lambda addr: not addr.is_loopback)


@contextlib.asynccontextmanager
async def client(config: NodeConfig, console: Console) -> AsyncIterator[Node]:
    """A client in a swarm that exists. Raises ConfigError when none is found."""
    found = await entrance(config, console)
    if found.alone:
        raise ConfigError(
            f"no node of the swarm {config.swarm!r} is known: start one with swarmnode join, or name one with --peer"
        )
    async with Node(found.config) as node:
        yield node


def invite(config: NodeConfig, console: Console) -> int:
    """Print an invite into the swarm of the nodes on this machine, or of the --peer addresses."""
    addrs = config.peer_addrs or tuple(a for node in running_nodes(config.state_dir, config.swarm) for a in node.addrs)
    if not addrs:
        raise ConfigError(
            f"no node of the swarm {config.swarm!r} runs on this machine: start swarmnode join, or name one with --peer"
        )
    outside = [addr for addr in addrs if not addr.is_loopback]
    made = Invite.of(config.swarm, outside or addrs)
    if not outside:
        console.note("note: these addresses work on this machine only; listen on others to invite other machines")
    if console.as_json:
        console.json({"invite": str(made), "swarm": made.swarm, "addrs": [str(addr) for addr in made.addrs]})
    else:
        console.data(str(made))
    return 0
