"""Where the router is, and which of our addresses it sees."""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..transport.tcp import NewSocket

ROUTES: Final = Path("/proc/net/route")
_GATEWAY_FLAG: Final = 2
_ANYWHERE: Final = ("192.0.2.1", 9)


@dataclass(frozen=True, slots=True)
class Gateway:
    """The IPv4 default router."""

    ip: ipaddress.IPv4Address
    own: ipaddress.IPv4Address
    """Our address on its network."""


def find_gateway(routes: Path = ROUTES, new_socket: NewSocket = socket.socket) -> Gateway | None:
    """The IPv4 default router; where the system does not tell (it is read on Linux only), the first address of a /24.

    None without an IPv4 route. Sends nothing.
    """
    try:
        told = default_router(routes.read_text())
    except OSError:
        told = None
    own = _source((str(told), 9) if told else _ANYWHERE, new_socket)
    if own is None:
        return None
    return Gateway(told or ipaddress.IPv4Address((int(own) & ~0xFF) | 1), own)


def default_router(table: str) -> ipaddress.IPv4Address | None:
    """The gateway of the default route with the least metric, in the text of /proc/net/route."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000" and int(fields[3], 16) & _GATEWAY_FLAG:
            found.append((int(fields[6]), ipaddress.IPv4Address(struct.pack("<I", int(fields[2], 16)))))
    return min(found)[1] if found else None


def _source(target: tuple[str, int], new_socket: NewSocket) -> ipaddress.IPv4Address | None:
    with new_socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)
        except OSError:
            return None
        return ipaddress.IPv4Address(probe.getsockname()[0])
