"""Keeps a port open at the router for as long as the node listens: NAT-PMP or PCP, else UPnP.

What the router says is a claim: the address becomes a candidate that AutoNAT verifies. The port is closed again when
the node ends; one that died without that is closed by the router after its lifetime.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from ...protocol.errors import Refused, RemoteProtocolError
from ...protocol.multiaddr import Multiaddr
from ...protocol.portmap import PORT, Mapping
from ...protocol.reachability import is_public_ip
from ..clock import Clock
from ..host import Host
from .gateway import Gateway, find_gateway
from .upnp import Upnp, available

logger = logging.getLogger(__name__)

LOOK_S: Final = 60.0
"""How often to look for a router, or for something to map, while there is none."""
UPNP_AGAIN_S: Final = 600.0
"""After UPnP failed."""
LEAVE_S: Final = 1.0
"""How long leaving waits for the router."""
FAREWELLS: Final = 2
"""A deletion is sent so often, for packets get lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortState:
    """What came of it so far."""

    gateway: str = ""
    """The router's address inside; empty: none was found."""
    via: str = ""
    """PCP, NAT-PMP or UPnP; empty: no port is open."""
    outside: Multiaddr | None = None
    """The address the router gave us."""
    failure: str = ""
    """Why there is none."""


class PortMapper:
    """Run it in a task, then aclose()."""

    def __init__(
        self,
        host: Host,
        *,
        clock: Clock,
        rng: Random,
        changed: Callable[[PortState], None],
        gateway: Callable[[], Gateway | None] = find_gateway,
        upnp: bool = True,
    ) -> None:
        self._host = host
        self._clock = clock
        self._rng = rng
        self._changed = changed
        self._find = gateway
        self._upnp = Upnp() if upnp and available() else None
        self._wake = asyncio.Event()
        self._gateway: Gateway | None = None
        self._mapping: Mapping | None = None
        self._transport: asyncio.DatagramTransport | None = None
        self._upnp_port: int | None = None
        self._upnp_address: Multiaddr | None = None
        self._upnp_due = 0.0
        self._upnp_failure = ""
        self.state = PortState()

    @property
    def pending(self) -> bool:
        """A router was found, and has not answered yet."""
        return bool(self.state.gateway) and self.state.outside is None and not self.state.failure

    def renew(self) -> None:
        """The network may be another one: look again, and ask again."""
        self._gateway = None
        self._upnp_due = 0.0
        if self._mapping is not None:
            self._mapping.renew(self._clock.now())
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._wake.clear()
            wait_s = await self._step()
            self._tell()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()

    async def _step(self) -> float:
        """Do what is due; returns how long nothing will be."""
        if self._gateway is None and not await self._look():
            return LOOK_S
        now, mapping, transport = self._clock.now(), self._mapping, self._transport
        if mapping is None or transport is None:
            return LOOK_S
        for packet in mapping.packets(now):
            transport.sendto(packet)
        if mapping.mapped is None and (mapping.failure is not None or mapping.patient):
            await self._try_upnp(mapping.inner)
        return max(0.0, mapping.next_timer() - self._clock.now())

    async def _look(self) -> bool:
        """Find the router and what to map. False: there is nothing to do here."""
        found, port = self._find(), self._port()
        if found is None or port is None or is_public_ip(found.own):
            self._forget()
            return False
        if self._mapping is None or self._mapping.inner != port:
            self._mapping = Mapping(port, found.own, rng=self._rng, now=self._clock.now())
        else:
            self._mapping.moved(found.own, self._clock.now())
        if self._transport is not None:
            self._transport.close()
        try:
            self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Answers(self._arrived), remote_addr=(str(found.ip), PORT)
            )
        except OSError as exc:
            logger.debug("no way to the router %s: %s", found.ip, exc)
            return False
        self._gateway = found
        return True

    def _port(self) -> int | None:
        """The port to open: of the first IPv4 address we listen on that is more than loopback."""
        own = (a for a in self._host.bound_addrs if a.ip is not None and a.ip.version == 4 and not a.is_loopback)
        return next((address.port for address in own), None)

    def _arrived(self, data: bytes) -> None:
        if self._mapping is None:
            return
        try:
            self._mapping.feed(data, self._clock.now())
        except RemoteProtocolError as exc:
            logger.debug("the router sent nonsense: %s", exc)
        self._wake.set()

    async def _try_upnp(self, port: int) -> None:
        now = self._clock.now()
        if self._upnp is None or now < self._upnp_due or self._gateway is None:
            return
        try:
            lease = await self._upnp.open(str(self._gateway.own), port)
        except Refused as exc:
            self._upnp_failure, self._upnp_due = str(exc), now + UPNP_AGAIN_S
            self._upnp_port = self._upnp_address = None
            return
        self._upnp_port, self._upnp_failure = lease.port, ""
        self._upnp_address = _address(lease.ip, lease.port)
        self._upnp_due = now + lease.lifetime_s / 2

    def _forget(self) -> None:
        self._mapping = None
        self._upnp_port = self._upnp_address = None

    def _tell(self) -> None:
        state = self._current()
        if state != self.state:
            self.state = state
            logger.info("port mapping: %s", state.outside or state.failure or "none")
            self._changed(state)

    def _current(self) -> PortState:
        gateway = str(self._gateway.ip) if self._gateway is not None else ""
        mapping = self._mapping
        if mapping is not None and mapping.mapped is not None and mapping.mapped.ip is not None:
            outside = _address(mapping.mapped.ip, mapping.mapped.port)
            return PortState(gateway=gateway, via=str(mapping.protocol), outside=outside)
        if self._upnp_address is not None:
            return PortState(gateway=gateway, via="UPnP", outside=self._upnp_address)
        if mapping is None:
            return PortState(gateway=gateway)
        reasons = [f"PCP and NAT-PMP: {mapping.failure}"] if mapping.failure else []
        if mapping.failure:
            reasons.append(f"UPnP: {self._upnp_failure}" if self._upnp else "UPnP: miniupnpc is not installed")
        return PortState(gateway=gateway, failure="; ".join(reasons))

    async def aclose(self) -> None:
        """Close the port at the router."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._leave()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    async def _leave(self) -> None:
        deletion = self._mapping.deletion() if self._mapping is not None else None
        if deletion is not None and self._transport is not None:
            for _ in range(FAREWELLS):
                self._transport.sendto(deletion)
        if self._upnp is not None and self._upnp_port is not None:
            try:
                await self._upnp.close(self._upnp_port)
            except Refused as exc:
                logger.debug("UPnP: port %d was not closed: %s", self._upnp_port, exc)


class _Answers(asyncio.DatagramProtocol):
    def __init__(self, arrived: Callable[[bytes], None]) -> None:
        self._arrived = arrived

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        self._arrived(data)


def _address(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> Multiaddr:
    return Multiaddr((("ip6" if ip.version == 6 else "ip4", str(ip)), ("tcp", str(port))))
