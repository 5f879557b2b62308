"""Open ports by UPnP's internet gateway devices, through miniupnpc: an optional extra, loaded when used.

It blocks for seconds, so everything here runs in a thread. Its XML comes from whatever answers on the local network and
is parsed by a C library: one more reason why this is asked last, after NAT-PMP and PCP.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ...protocol.errors import Refused

logger = logging.getLogger(__name__)

DISCOVER_MS: Final = 1000
"""For each of five kinds of device, until one answers."""
LEASE_S: Final = 3600
"""Asked for; routers that know only permanent leases are asked for one of those, which we delete on leaving."""
DESCRIPTION: Final = "swarmnode"
OTHER_PORTS: Final = 8
"""Outside ports tried when ours is taken."""
_PERMANENT_ONLY, _CONFLICT = "OnlyPermanentLeasesSupported", "ConflictInMappingEntry"


def available() -> bool:
    """Whether miniupnpc is installed."""
    return importlib.util.find_spec("miniupnpc") is not None


@dataclass(frozen=True, slots=True)
class Lease:
    """An open port."""

    ip: ipaddress.IPv4Address
    port: int
    lifetime_s: int


class Upnp:
    """One gateway device."""

    def __init__(self) -> None:
        self._device: Any = None

    async def open(self, own: str, port: int) -> Lease:
        """Open a TCP port to ours. Raises Refused with the router's reason."""
        return await asyncio.to_thread(self._open, own, port)

    async def close(self, port: int) -> None:
        """Close an outside port that open() gave. Raises Refused."""
        if self._device is not None:
            await asyncio.to_thread(_call, self._device.deleteportmapping, port, "TCP")

    def _open(self, own: str, port: int) -> Lease:
        try:
            if self._device is None:
                self._device = _discover(own)
            text = _call(self._device.externalipaddress)
            try:
                outside = ipaddress.IPv4Address(text)
            except ValueError:
                raise Refused(f"the router has no outside address: {text!r}") from None
            return self._add(outside, port)
        except Refused:
            self._device = None  # next time another one may answer
            raise

    def _add(self, outside: ipaddress.IPv4Address, port: int) -> Lease:
        for wanted in range(port, min(port + OTHER_PORTS, 65536)):
            try:
                return Lease(outside, wanted, self._map(wanted, port))
            except Refused as exc:
                if _CONFLICT not in str(exc):
                    raise
        raise Refused(f"ports {port} to {port + OTHER_PORTS - 1} are taken")

    def _map(self, outer: int, inner: int) -> int:
        """The lifetime to count with."""
        add, own = self._device.addportmapping, self._device.lanaddr
        try:
            _call(add, outer, "TCP", own, inner, DESCRIPTION, "", LEASE_S)
        except Refused as exc:
            if _PERMANENT_ONLY not in str(exc):
                raise
            _call(add, outer, "TCP", own, inner, DESCRIPTION, "", 0)
        return LEASE_S


def _discover(own: str) -> Any:
    device = importlib.import_module("miniupnpc").UPnP(multicastif=own, discoverdelay=DISCOVER_MS)
    _call(device.discover)
    _call(device.selectigd)
    return device


def _call(function: Callable[..., Any], *args: object) -> Any:
    """Everything that miniupnpc dislikes is a bare Exception; what is more particular is our own mistake."""
    try:
        return function(*args)
    except Exception as exc:
        if type(exc) is not Exception:
            raise
        raise Refused(str(exc)) from exc
