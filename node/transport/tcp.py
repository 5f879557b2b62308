"""TCP links, with the socket options that decide a token's latency. Measured reasons: docs/spec/transport.md.

cubic, set before connect: BBR paces small bursts, which costs 70 ms per token on a 100 ms path, and the
pacing flag sticks to a socket that ever had it. Connections for bulk have BBR, which keeps the queue of the
bottleneck short for everybody else. TCP_NOTSENT_LOWAT keeps bulk out of the kernel's queue, where no priority
of ours could overtake it. Options a system lacks are skipped: they make a node slower, never wrong.

A port is bound exclusively, and opened for SO_REUSEPORT only after that: so a second node never shares it by
accident, and we can still dial from it.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ...protocol.errors import ConfigError
from ...protocol.multiaddr import Multiaddr

BACKLOG: Final = 128
"""Connections the kernel queues for us; more are refused by it."""
NOTSENT_LOWAT: Final = 128 * 1024
"""Unsent bytes the kernel may hold: two full frames, so that the link never runs dry between two wake-ups."""
USER_TIMEOUT_MS: Final = 20_000
"""Unacknowledged data for this long kills the connection."""
KEEPALIVE_IDLE_S: Final = 30
KEEPALIVE_INTERVAL_S: Final = 10
KEEPALIVE_PROBES: Final = 3
LATENCY: Final = (b"cubic", b"reno")
"""Congestion control of connections for small messages, the first that may be had: an unprivileged process
often has the choice of reno and the system's default only."""
BULK: Final = (b"bbr", b"cubic")
"""The same of connections for bulk."""
MAX_RESOLVED: Final = 8
"""Addresses taken from one DNS answer."""

Factory = Callable[[Multiaddr], asyncio.BufferedProtocol]
NewSocket = Callable[[int, int], socket.socket]
"""From family and type; socket.socket, unless the network to be on is another than the process's."""


class TcpTransport:
    """Dials and listens on /ip4, /ip6 and /dns TCP addresses."""

    def __init__(self, new_socket: NewSocket = socket.socket) -> None:
        self._new_socket = new_socket
        self._bound: dict[socket.AddressFamily, list[Multiaddr]] = {}  # what we listen on

    def can_dial(self, address: Multiaddr) -> bool:
        """Plain TCP, by IP or by name, or a name for such addresses."""
        return (address.is_tcp and bool(address.port)) or address.without_peer().value("dnsaddr") is not None

    def can_listen(self, address: Multiaddr) -> bool:
        """Plain TCP on an IP address."""
        return address.is_tcp and address.ip is not None

    async def resolve(self, address: Multiaddr) -> Sequence[Multiaddr]:
        """The IP addresses of a DNS address, without /p2p. Raises OSError when the name does not resolve."""
        if address.value("dnsaddr") is not None:
            return await self._resolve_dnsaddr(address)
        address = address.without_peer()
        if address.ip is not None:
            return (address,)
        kind = address.parts[0][0]
        families = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host, address.port, family=families.get(kind, 0), type=socket.SOCK_STREAM
        )
        return tuple(dict.fromkeys(_multiaddr(entry[4]) for entry in found))[:MAX_RESOLVED]

    async def _resolve_dnsaddr(self, address: Multiaddr) -> Sequence[Multiaddr]:
        from .names import resolve_dnsaddr  # most nodes never meet one

        targets = [one for one in await resolve_dnsaddr(address) if one.is_tcp and one.port]
        found = await asyncio.gather(*map(self.resolve, targets), return_exceptions=True)
        return tuple(dict.fromkeys(one for some in found if not isinstance(some, BaseException) for one in some))

    async def dial(
        self, address: Multiaddr, factory: Factory, *, bulk: bool = False, from_listener: bool = False
    ) -> None:
        """Connect to an IP address. Raises OSError."""
        loop = asyncio.get_running_loop()
        family = _family(address)
        sock = self._new_socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            tune(sock, bulk=bulk)
            if from_listener:
                self._share_port(sock, family)
            await loop.sock_connect(sock, _sockaddr(address))
            await loop.create_connection(lambda: factory(address), sock=sock)
        except BaseException:
            sock.close()
            raise

    async def listen(self, address: Multiaddr, factory: Factory) -> TcpListener:
        """Listen on an IP address. Raises ConfigError naming what is wrong with it."""
        sock = _bind(address, self._new_socket)
        try:
            server = await asyncio.get_running_loop().create_server(
                lambda: _Accepted(factory), sock=sock, backlog=BACKLOG
            )
        except BaseException:
            sock.close()
            raise
        bound = _multiaddr(sock.getsockname())
        self._bound.setdefault(_family(address), []).append(bound)
        return TcpListener(server, bound, self._closed)

    def _share_port(self, sock: socket.socket, family: socket.AddressFamily) -> None:
        """Bind a socket to the address we listen on. Raises OSError."""
        bound = self._bound.get(family)
        if not bound or not hasattr(socket, "SO_REUSEPORT"):
            raise OSError(errno.EADDRNOTAVAIL, "no listening port of this address family to dial from")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(_sockaddr(bound[0]))

    def _closed(self, address: Multiaddr) -> None:
        self._bound[_family(address)].remove(address)


class TcpListener:
    """An open listening socket."""

    def __init__(self, server: asyncio.Server, address: Multiaddr, on_close: Callable[[Multiaddr], None]) -> None:
        self._server = server
        self._on_close: Callable[[Multiaddr], None] | None = on_close
        self.address = address
        """What is really bound: port 0 replaced."""

    async def aclose(self) -> None:
        """Stop accepting."""
        self._server.close()
        if self._on_close is not None:
            self._on_close(self.address)
            self._on_close = None


class _Accepted(asyncio.Protocol):
    """Stands in until the remote's address is known, then gives its place to the real protocol."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peername = transport.get_extra_info("peername")
        if not peername:  # gone before we looked
            transport.close()
            return
        protocol = self._factory(_multiaddr(peername))
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


def tune(sock: socket.socket, *, bulk: bool = False) -> None:
    """Set what the system offers of our options. On a listening socket they pass on to accepted ones."""
    control_congestion(sock, BULK if bulk else LATENCY)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted: list[tuple[str, int | bytes]] = [
        ("TCP_NOTSENT_LOWAT", NOTSENT_LOWAT),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ]
    for name, value in wanted:
        option = getattr(socket, name, None)
        if option is None:
            continue
        try:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError:
            continue


class Tunable(Protocol):
    """A socket, or what an event loop shows of one."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None: ...


def control_congestion(sock: Tunable, wanted: Sequence[bytes]) -> None:
    """Give a socket the first congestion control of a list that this system has and permits; else leave it."""
    if not hasattr(socket, "TCP_CONGESTION"):
        return
    for name in wanted:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
        except OSError:
            continue  # a module not loaded, or not permitted here
        return


def _family(address: Multiaddr) -> socket.AddressFamily:
    return socket.AF_INET6 if address.ip and address.ip.version == 6 else socket.AF_INET


def _bind(address: Multiaddr, new_socket: NewSocket) -> socket.socket:
    family = _family(address)
    sock = new_socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if sys.platform != "win32":  # there it would let two nodes share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        tune(sock)
        sock.bind(_sockaddr(address))
        # bind() succeeds on a port another process listens on; listen() is what refuses
        sock.listen(BACKLOG)
        if hasattr(socket, "SO_REUSEPORT"):  # from now on, and only for sockets that ask for it, too
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as exc:
        sock.close()
        raise ConfigError(f"cannot listen on {address}: {_cause(exc, address)}") from exc
    return sock


def _cause(exc: OSError, address: Multiaddr) -> str:
    if exc.errno == errno.EADDRINUSE:
        return f"port {address.port} is in use; choose another, or tcp/0 for any free one"
    if exc.errno == errno.EADDRNOTAVAIL:
        return f"{address.host} is not an address of this machine; use 0.0.0.0 for all of them"
    if exc.errno == errno.EACCES:
        return f"port {address.port} needs privileges; choose one above 1023"
    return exc.strerror or str(exc)


def _sockaddr(address: Multiaddr) -> tuple[str, int] | tuple[str, int, int, int]:
    host, port = address.host or "", address.port or 0
    if "%" in host:
        name, zone = host.split("%", 1)
        return name, port, 0, socket.if_nametoindex(zone)
    return host, port


def _multiaddr(sockaddr: tuple[object, ...]) -> Multiaddr:
    host = str(sockaddr[0]).split("%", 1)[0]
    kind = "ip6" if ":" in host else "ip4"
    return Multiaddr.parse(f"/{kind}/{host}/tcp/{sockaddr[1]}")


def machine_addresses() -> tuple[str, ...]:
    """The IP addresses other machines most likely reach us at: of the default routes, and loopback.

    Connecting a UDP socket sends nothing; it only makes the kernel choose the source address.
    """
    found = []
    for family, target, loopback in (
        (socket.AF_INET, "192.0.2.1", "127.0.0.1"),
        (socket.AF_INET6, "2001:db8::1", "::1"),
    ):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
                found.append(str(probe.getsockname()[0]))
            except OSError:
                pass  # no route: this machine is on its own
        found.append(loopback)
    return tuple(dict.fromkeys(found))


def expand(address: Multiaddr) -> tuple[Multiaddr, ...]:
    """The real addresses behind a bound wildcard; the address itself otherwise."""
    if not address.is_unspecified or address.ip is None:
        return (address,)
    kind = f"ip{address.ip.version}"
    hosts = [host for host in machine_addresses() if (":" in host) == (kind == "ip6")]
    return tuple(Multiaddr.parse(f"/{kind}/{host}/tcp/{address.port}") for host in hosts)
