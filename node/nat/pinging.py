"""`swarmnode ping ADDR --until-direct`: pings that say which way they went, until one goes directly."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Final

from ...protocol.errors import DeadlineExceeded
from ...protocol.ids import PeerId
from ...protocol.multiaddr import Multiaddr
from ..config import NodeConfig
from ..console import Console, milliseconds
from ..host import Host
from ..node import Node

PAUSE_S: Final = 1.0
ANSWER_S: Final = 5.0
NOT_DIRECT: Final = 1
"""Exit code when every ping went through a relay."""


@dataclass(frozen=True, slots=True)
class Pong:
    """One answer."""

    rtt_s: float
    address: Multiaddr
    """Where the peer is, or its address through the relay."""
    relayed: bool

    @property
    def path(self) -> str:
        """In words."""
        if not self.relayed:
            return f"directly from {self.address}"
        relay = next((value for name, value in self.address.parts if name == "p2p"), "?")
        return f"through relay {relay[-8:]}"


async def ping_until_direct(config: NodeConfig, address: str, count: int, console: Console) -> int:
    """Ping up to `count` times; 0 as soon as one goes directly."""
    where = Multiaddr.parse(address)
    settings = replace(config, peers=(), dht_server=False, persistent=False, publish_runtime=False, lan=False)
    pongs: list[Pong] = []
    async with Node(settings) as node:
        peer = await node.host.connect(where.peer_id, [where])
        for number in range(count):
            if number:
                await asyncio.sleep(PAUSE_S)
            pong = await one_ping(node.host, peer)
            if pong is None:
                console.note(f"no answer from {peer.short} within {ANSWER_S:g} s")
                continue
            pongs.append(pong)
            if not console.as_json:
                console.data(f"pong from {peer.short} {pong.path} in {milliseconds(pong.rtt_s)}")
            if not pong.relayed:
                break
    direct = bool(pongs) and not pongs[-1].relayed
    if console.as_json:
        rows = [{"rtt_s": one.rtt_s, "address": str(one.address), "relayed": one.relayed} for one in pongs]
        console.json({"address": address, "direct": direct, "pongs": rows})
    elif pongs and not direct:
        console.note("no direct path: swarmnode doctor says what is in the way, at either end")
    return 0 if direct else NOT_DIRECT


async def one_ping(host: Host, peer: PeerId) -> Pong | None:
    """A ping over the way that new streams take now; None: no answer. Raises PeerUnreachable, ProtocolUnsupported."""
    try:
        rtt_s = await host.ping(peer, timeout_s=ANSWER_S)
    except DeadlineExceeded:
        return None
    infos = [info for info in host.connections() if info.peer == peer]
    best = min(infos, key=lambda info: (info.relayed, info.bulk, info.opened_at), default=None)
    return None if best is None else Pong(rtt_s, best.address, best.relayed)
