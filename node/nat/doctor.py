"""`swarmnode doctor`: joins the swarm for half a minute, looks at the network from inside and outside, and tells."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Final

from ...protocol.errors import SwarmError
from ...protocol.ids import PeerId
from ...protocol.verdict import Reach
from ..config import NodeConfig
from ..console import Console
from ..entrance import entrance
from ..node import Node
from ..observe import Json
from ..transport.wire import Wire
from .findings import NO_PORT, Facts, Finding, Level, Peer, Seen, findings, kind_of
from .service import Nat

PATIENCE_S: Final = 25.0
"""How long the verdict may take."""
RELAY_S: Final = 10.0
"""How long a node that cannot be reached waits for a relay."""
PING_S: Final = 3.0
MAX_PINGED: Final = 8
FRESH_S: Final = 20.0
"""Records are renewed every 40 s: on average one is so old."""
_IP_MTU, _IPV6_MTU = 14, 24
_MARKS: Final = {Level.OK: "ok", Level.NOTE: "note", Level.BAD: "BAD"}


async def doctor(config: NodeConfig, console: Console) -> int:
    """Look, and tell. Exit code 1 when something is bad."""
    found = await entrance(config, console)
    settings = replace(
        found.config, listen=config.listen, reachability="check", port_mapping=config.port_mapping, dht_server=False
    )
    trouble = "no node of the swarm is known: name one with --peer" if found.alone else ""
    facts = await _look(settings, trouble, console)
    page = findings(facts)
    if console.as_json:
        console.json(_json(facts, page))
    else:
        _show(page, console)
    return 1 if any(finding.level is Level.BAD for finding in page) else 0


async def _look(settings: NodeConfig, trouble: str, console: Console) -> Facts:
    """The facts, with a swarm if there is one to join."""
    try:
        async with Node(settings) as node:
            return await _examine(node, trouble, console)
    except SwarmError as exc:
        async with Node(replace(settings, peers=())) as alone:
            return await _examine(alone, str(exc), console)


async def _examine(node: Node, trouble: str, console: Console) -> Facts:
    nat = node.nat
    if nat is None:
        return Facts(trouble=trouble or "the node listens for this machine only: nothing to find out")
    if not trouble:
        console.note(f"looking at the network; this takes up to {PATIENCE_S:.0f} s")
        await _settle(node, nat)
    host = node.host
    return Facts(
        trouble=trouble,
        listening=host.bound_addrs,
        seen=tuple(Seen(wire.address, seen) for wire, seen in host.observations() if wire.from_listener),
        verdict=nat.reach.verdict,
        addresses=tuple((address, source, one) for address, (source, one) in nat.reach.verdicts.items()),
        port=nat.mapper.state if nat.mapper is not None else NO_PORT,
        testers=nat.reach.testers,
        peers=await _peers(node),
        relays=node.relaying.status().places,
        skew_s=None if trouble else await _skew(node),
        mtu=min(filter(None, map(_mtu, host.wires)), default=None),
    )


async def _settle(node: Node, nat: Nat) -> None:
    """Wait until the verdict and the router are known, and for a relay where one is needed."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            await nat.settled()
    except TimeoutError:
        pass
    if nat.reach.verdict.reach is Reach.PRIVATE:
        await node.relaying.settled(RELAY_S)


async def _peers(node: Node) -> tuple[Peer, ...]:
    infos = [info for info in node.host.connections() if not info.bulk]
    rtts = await asyncio.gather(*(_ping(node, info.peer) for info in infos[:MAX_PINGED]))
    known = dict(zip((info.peer for info in infos), rtts, strict=False))
    return tuple(Peer(str(info.peer), info.address, info.relayed, known.get(info.peer)) for info in infos)


async def _ping(node: Node, peer: PeerId) -> float | None:
    try:
        return await node.host.ping(peer, timeout_s=PING_S)
    except (SwarmError, OSError):
        return None


async def _skew(node: Node) -> float | None:
    """How far our clock is ahead, to about 20 s, by the dates on others' fresh records; None where there are none."""
    try:
        entries = await node.discovery.lookup(node.discovery.models_key(), fresh=True)
    except (SwarmError, OSError):
        return None
    wall = node.host.clock.wall()
    ages = [wall - entry.issued_ms / 1e3 for entry in entries if entry.subkey != node.peer_id]
    return median(ages) - FRESH_S if ages else None


def _mtu(wire: Wire) -> int | None:
    """What the path carries in one packet, as far as the system knows (Linux); loopback says nothing."""
    sock, ip = wire.socket, wire.address.ip
    if sock is None or ip is None or ip.is_loopback or not hasattr(socket, "TCP_INFO"):
        return None
    level, option = (socket.IPPROTO_IP, _IP_MTU) if ip.version == 4 else (socket.IPPROTO_IPV6, _IPV6_MTU)
    try:
        return int.from_bytes(sock.getsockopt(level, option, 4), "little")
    except OSError:
        return None


# How it is told.


def _show(page: Sequence[Finding], console: Console) -> None:
    width = max(len(finding.subject) for finding in page)
    for finding in page:
        console.data(f"{_MARKS[finding.level]:<4}  {finding.subject:<{width}}  {finding.what}")
        if finding.cause:
            console.data(f"{'':<4}  {'':<{width}}  why: {finding.cause}")
        if finding.fix:
            console.data(f"{'':<4}  {'':<{width}}  do:  {finding.fix}")


def _json(facts: Facts, page: Sequence[Finding]) -> Json:
    return {
        "ok": all(finding.level is not Level.BAD for finding in page),
        "network": str(kind_of(facts.seen, facts.listening)),
        "reach": str(facts.verdict.reach),
        "confidence": facts.verdict.confidence,
        "listening": [str(address) for address in facts.listening],
        "seen": [{"by": str(one.by), "address": str(one.address)} for one in facts.seen],
        "addresses": [
            {
                "address": str(address),
                "source": source.name.lower(),
                "reach": str(one.reach),
                "confidence": one.confidence,
            }
            for address, source, one in facts.addresses
        ],
        "port_mapping": {
            "gateway": facts.port.gateway,
            "via": facts.port.via,
            "outside": None if facts.port.outside is None else str(facts.port.outside),
            "failure": facts.port.failure,
        },
        "peers": [
            {"peer_id": peer.peer, "address": str(peer.address), "relayed": peer.relayed, "rtt_s": peer.rtt_s}
            for peer in facts.peers
        ],
        "relays": list(facts.relays),
        "clock_skew_s": facts.skew_s,
        "mtu": facts.mtu,
        "findings": [
            {"subject": one.subject, "level": str(one.level), "what": one.what, "cause": one.cause, "fix": one.fix}
            for one in page
        ],
    }
