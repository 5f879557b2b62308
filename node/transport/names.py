"""Looks names up: addresses by the system's resolver, TXT records, for /dnsaddr, at the system's name servers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ...protocol import dns
from ...protocol.errors import ConfigError, RemoteProtocolError
from ...protocol.multiaddr import Multiaddr

SERVERS: Final = Path("/etc/resolv.conf")
MAX_SERVERS: Final = 3
TRY_S: Final = 2.0
"""How long one name server has to answer."""
MAX_DEPTH: Final = 3
"""A /dnsaddr may stand for others, so many deep."""
MAX_LOOKUPS: Final = 8
"""Questions for one address."""
MAX_FOUND: Final = 16
"""Addresses taken from one /dnsaddr."""

Server = tuple[str, int]


def name_servers(settings: Path = SERVERS) -> list[Server]:
    """The system's name servers; empty where they are not in /etc/resolv.conf."""
    try:
        lines = settings.read_text().splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines]
    return [(line[1], dns.PORT) for line in words if len(line) > 1 and line[0] == "nameserver"][:MAX_SERVERS]


async def resolve_dnsaddr(address: Multiaddr, servers: Sequence[Server] | None = None) -> list[Multiaddr]:
    """What a /dnsaddr address stands for, without further /dnsaddr. Raises OSError when it cannot be found out."""
    known = name_servers() if servers is None else servers
    found: dict[Multiaddr, None] = {}
    level, asked = [address], 0
    for _ in range(MAX_DEPTH):
        deeper = []
        for one in level:
            name = dns.dnsaddr_name(one)
            if name is None:
                found[one] = None
            elif asked < MAX_LOOKUPS:
                asked += 1
                deeper += dns.dnsaddr_targets(one, await lookup_txt(name, known))
        level = deeper
    found |= dict.fromkeys(one for one in level if dns.dnsaddr_name(one) is None)
    return list(found)[:MAX_FOUND]


async def lookup_txt(name: str, servers: Sequence[Server]) -> list[str]:
    """The TXT records of a name. Raises OSError."""
    if not servers:
        raise OSError(errno.ENOENT, "no name server is known: /etc/resolv.conf names none")
    reason = ""
    for server in servers:
        try:
            async with asyncio.timeout(TRY_S):
                return await _ask(server, name)
        except dns.NoSuchName:
            return []
        except ConfigError as exc:
            raise OSError(errno.EINVAL, str(exc)) from exc
        except TimeoutError:
            reason = "no answer"
        except (RemoteProtocolError, OSError) as exc:
            reason = str(exc)
    raise OSError(errno.EHOSTUNREACH, f"cannot look {name} up: {reason}")


async def _ask(server: Server, name: str) -> list[str]:
    number = secrets.randbits(16)
    query = dns.txt_query(number, name)
    try:
        return dns.txt_answer(number, query, await _by_udp(server, query))
    except dns.Truncated:
        return dns.txt_answer(number, query, await _by_tcp(server, query))


async def _by_udp(server: Server, query: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(server)
        await loop.sock_sendall(sock, query)
        while True:
            answer = await loop.sock_recv(sock, 65536)
            if answer[:2] == query[:2]:  # others are somebody's guesses
                return answer


async def _by_tcp(server: Server, query: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(len(query).to_bytes(2, "big") + query)
        return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
    except asyncio.IncompleteReadError as exc:
        raise OSError(errno.ECONNRESET, "the name server hung up") from exc
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
