"""Nodes on the same local network, by DNS service discovery over multicast (RFC 6762, RFC 6763).

A node that listens beyond loopback registers `_swarmnode._tcp.local.` with its swarm and peer id in the TXT record;
any mDNS browser shows it. Who looks gets addresses to try, no more: the handshake proves the id, and a wrong answer
costs a dial. The zeroconf package does the multicast; it is loaded when used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..protocol.errors import ConfigError
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

logger = logging.getLogger(__name__)

SERVICE: Final = "_swarmnode._tcp.local."
BROWSE_S: Final = 1.5
"""How long to listen for answers: the question is put twice, for a record may be told once a second only."""
MAX_FOUND: Final = 16
"""Nodes taken from one look."""
_RESOLVE_MS: Final = 800
_SWARM, _PEER = b"swarm", b"p2p"


async def announce(swarm: str, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
    """Be found on the local network until cancelled. Returns at once where there is none, or the port is taken."""
    info = _service(swarm, peer, addrs)
    if info is None:
        return
    try:
        network = _open()
    except OSError as exc:
        logger.info("not announced on the local network: %s", exc.strerror or exc)
        return
    try:
        await _register(network, info)
        await asyncio.get_running_loop().create_future()
    finally:
        await network.async_close()  # says good-bye for what is registered


async def find(swarm: str, *, own: PeerId | None = None, wait_s: float = BROWSE_S) -> list[Multiaddr]:
    """Addresses of nodes of a swarm on the local network, each with its /p2p; empty when nobody answers."""
    from zeroconf import DNSQuestionType
    from zeroconf.asyncio import AsyncServiceBrowser

    try:
        network = _open()
    except OSError as exc:
        logger.info("cannot look round the local network: %s", exc.strerror or exc)
        return []
    names: asyncio.Queue[str] = asyncio.Queue(MAX_FOUND)

    def heard(zeroconf: Zeroconf, service_type: str, name: str, state_change: object) -> None:
        if not names.full():
            names.put_nowait(name)

    try:
        # asked to answer by multicast: of several processes on a machine only one would hear a unicast
        question = DNSQuestionType.QM
        async with AsyncServiceBrowser(network.zeroconf, SERVICE, handlers=[heard], question_type=question):
            return await _collect(network, names, swarm, own, wait_s)
    finally:
        await network.async_close()


async def _collect(
    network: AsyncZeroconf, names: asyncio.Queue[str], swarm: str, own: PeerId | None, wait_s: float
) -> list[Multiaddr]:
    """What the services heard of within the time have to say; back at once when a node of the swarm has answered."""
    from zeroconf.asyncio import AsyncServiceInfo

    found: list[Multiaddr] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            while not found:
                info = AsyncServiceInfo(SERVICE, await names.get())
                if await info.async_request(network.zeroconf, _RESOLVE_MS):
                    found = _addresses(info, swarm, own)
    while not names.empty():
        info = AsyncServiceInfo(SERVICE, names.get_nowait())
        if info.load_from_cache(network.zeroconf):
            found += _addresses(info, swarm, own)
    return list(dict.fromkeys(found))


def _open() -> AsyncZeroconf:
    from zeroconf import InterfaceChoice
    from zeroconf.asyncio import AsyncZeroconf

    return AsyncZeroconf(interfaces=InterfaceChoice.All)


async def _register(network: AsyncZeroconf, info: ServiceInfo) -> None:
    from zeroconf import Error

    try:
        await network.async_register_service(info)
    except (Error, OSError) as exc:
        logger.info("not announced on the local network: %s", exc)


def _service(swarm: str, peer: PeerId, addrs: Sequence[Multiaddr]) -> AsyncServiceInfo | None:
    """What is announced: None unless something listens beyond loopback. All addresses share one port here."""
    from zeroconf.asyncio import AsyncServiceInfo

    outside = [addr for addr in addrs if addr.ip is not None and addr.port and not addr.is_loopback]
    if not outside:
        return None
    port = outside[0].port
    return AsyncServiceInfo(
        SERVICE,
        f"{peer}.{SERVICE}",
        port=port,
        properties={_SWARM: swarm.encode(), _PEER: str(peer).encode()},
        parsed_addresses=[str(addr.ip) for addr in outside if addr.port == port],
        server=f"{str(peer).lower()}.local.",
    )


def _addresses(info: ServiceInfo, swarm: str, own: PeerId | None) -> list[Multiaddr]:
    """The multiaddrs in one answer; none if it is of another swarm, ourselves, or nonsense."""
    try:
        peer = PeerId.parse((info.properties.get(_PEER) or b"").decode("ascii"))
    except (ConfigError, UnicodeDecodeError) as exc:
        logger.debug("ignored a service on the local network: %s", exc)
        return []
    if info.properties.get(_SWARM) != swarm.encode() or peer == own or not info.port:
        return []
    return [_multiaddr(packed, info.port).with_peer(peer) for packed in info.addresses[:MAX_FOUND]]


def _multiaddr(packed: bytes, port: int) -> Multiaddr:
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    kind = "ip4" if family == socket.AF_INET else "ip6"
    return Multiaddr.parse(f"/{kind}/{socket.inet_ntop(family, packed)}/tcp/{port}")
