"""What a host grants strangers, and whom it trusts: the numbers behind the scopes of protocol/limits.py."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from ..protocol.errors import ConfigError
from ..protocol.ids import PeerId
from ..protocol.limits import Amounts, Kind, Resource, Scope
from ..protocol.multiaddr import Multiaddr
from ..protocol.noise import MAX_PLAINTEXT, FrameReader
from ..protocol.relay import CircuitAddress
from .transport.wire import HANDSHAKE_TIMEOUT_S

logger = logging.getLogger(__name__)

DESCRIPTOR_RESERVE: Final = 96
"""Descriptors left to listeners, files, pipes, the event loop, and sockets that are closing."""
MIN_CONNECTIONS: Final = 8
"""Fewer than this is no node."""
MAX_ALLOWED: Final = 1024
"""Entries of the allow-list."""
CONNECTION_MEMORY: Final = FrameReader.MAX_CAPACITY + MAX_PLAINTEXT
"""What a busy connection's own buffers take, to receive into and to build a Noise message; an idle one's 4 KiB."""
_MAY_BE_ZERO: Final = frozenset(
    ("allowed_connections", "allowed_handshakes", "handshake_grace_s", "grace_s", "limit_loopback")
)
_ADDRESS_BITS: Final = {4: 32, 6: 56}
_SUBNET_BITS: Final = {4: 24, 6: 48}

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """What strangers may cost us. Connections over a limit are cut before any cryptography is done."""

    connections: int = 1024
    """Connections, dialed and accepted; fewer when the process may not open that many descriptors."""
    connections_in: int = 896
    """Accepted ones; what is left to `connections` is only for dialing."""
    connections_per_ip: int = 32
    """Accepted connections from one IPv4 address or IPv6 /56; loopback is exempt."""
    connections_per_subnet: int = 128
    """Accepted connections from one IPv4 /24 or IPv6 /48; loopback is exempt."""
    accepts_per_ip: float = 2.0
    """Connections accepted from one address a second, after as many at once as may be open; loopback is exempt."""
    accepts_per_subnet: float = 16.0
    """The same from one subnet."""
    connections_per_relay: int = 256
    """Accepted connections that one relay carries: where they come from only it knows."""
    accepts_per_relay: float = 16.0
    """The same a second."""
    connections_per_peer: int = 16
    """Connections with one proven identity, both ways."""
    handshakes: int = 128
    """Accepted connections that have not proven an identity yet."""
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    """How long a stranger may take to prove it, however many bytes it sends; also for a stream's protocol."""
    handshake_grace_s: float = 1.0
    """A handshake older than this gives way to a newcomer when there are too many."""
    dials: int = 128
    """Outbound handshakes at once; more wait for their turn."""
    streams_in: int = 8192
    """Streams that peers opened, over all connections, until their handlers end."""
    streams_in_per_peer: int = 1024
    """The same with one peer."""
    streams_per_protocol: int = 4096
    """The same of one protocol. One peer's share is given when the handler is registered."""
    negotiating: int = 4096
    """Streams that peers opened and that have no protocol yet."""
    negotiating_per_peer: int = 256
    """The same with one peer."""
    streams_out_per_peer: int = 4096
    """Streams that we opened to one peer."""
    memory: int = 768 * 1024 * 1024
    """Bytes of connections' buffers and of the receive windows of streams that peers opened, or that grew."""
    memory_per_peer: int = 256 * 1024 * 1024
    """The same with one peer."""
    allowed_connections: int = 64
    """Room beside all of the above for connections with trusted peers."""
    allowed_handshakes: int = 16
    """Their handshakes, when the room for strangers' is taken."""
    high_water: int = 768
    """With more connections than this, idle ones are closed..."""
    low_water: int = 640
    """...down to this many."""
    grace_s: float = 20.0
    """A new connection is not closed as idle before it is this old."""
    limit_loopback: bool = False
    """Count loopback addresses per IP and subnet like others. Off: whole swarms run on one machine."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 0 or (not value and name not in _MAY_BE_ZERO):
                raise ConfigError(f"HostLimits.{name} is {value}: it must be positive")
        if self.low_water > self.high_water:
            raise ConfigError(f"HostLimits.low_water is {self.low_water}: it must not be over {self.high_water}")

    def fitted(self, descriptors: int | None) -> HostLimits:
        """These limits, lowered to what the process may open; None: it may open any number.

        Raises ConfigError when that is too little for a node.
        """
        if descriptors is None:
            return self
        room = descriptors - DESCRIPTOR_RESERVE
        wanted = self.connections + self.allowed_connections + self.dials
        if wanted <= room:
            return self
        if room < MIN_CONNECTIONS:
            raise ConfigError(
                f"this process may open {descriptors} files, a node needs {DESCRIPTOR_RESERVE + MIN_CONNECTIONS}: "
                "raise the limit, for instance with ulimit -n 4096"
            )
        lowered = self._lowered(room / wanted)
        logger.warning(
            "at most %d connections instead of %d, because this process may open only %d files; ulimit -n raises that",
            lowered.connections,
            self.connections,
            descriptors,
        )
        return lowered

    def _lowered(self, factor: float) -> HostLimits:
        def less(value: int) -> int:
            return max(1, int(value * factor))

        return replace(
            self,
            connections=less(self.connections),
            connections_in=less(self.connections_in),
            allowed_connections=int(self.allowed_connections * factor),
            dials=less(self.dials),
            high_water=less(self.high_water),
            low_water=less(self.low_water),
        )


class Rules:
    """The limits of every scope, as a function for protocol/limits.Limiter."""

    def __init__(self, limits: HostLimits) -> None:
        self.per_protocol_peer: dict[str, int] = {}
        """Streams of a protocol that one peer may have open; its scopes' keys are (protocol, peer)."""
        r = Resource
        self._table: dict[Kind, Amounts] = {
            Kind.SYSTEM: {
                r.CONNECTIONS: limits.connections,
                r.CONNECTIONS_IN: limits.connections_in,
                r.STREAMS_IN: limits.streams_in,
                r.MEMORY: limits.memory,
            },
            Kind.TRANSIENT: {r.CONNECTIONS_IN: limits.handshakes, r.STREAMS_IN: limits.negotiating},
            Kind.ADDRESS: {r.CONNECTIONS_IN: limits.connections_per_ip},
            Kind.SUBNET: {r.CONNECTIONS_IN: limits.connections_per_subnet},
            Kind.RELAY: {r.CONNECTIONS_IN: limits.connections_per_relay},
            Kind.PEER: {
                r.CONNECTIONS: limits.connections_per_peer,
                r.STREAMS_IN: limits.streams_in_per_peer,
                r.MEMORY: limits.memory_per_peer,
            },
            Kind.PEER_TRANSIENT: {r.STREAMS_IN: limits.negotiating_per_peer},
            Kind.PROTOCOL: {r.STREAMS_IN: limits.streams_per_protocol},
            Kind.ALLOWED: {r.CONNECTIONS: limits.allowed_connections},
            Kind.ALLOWED_TRANSIENT: {r.CONNECTIONS_IN: limits.allowed_handshakes},
        }

    def __call__(self, scope: Scope) -> Amounts:
        """The limits of one scope."""
        if scope.kind is Kind.PROTOCOL_PEER and isinstance(scope.key, tuple):
            return {Resource.STREAMS_IN: self.per_protocol_peer.get(str(scope.key[0]), 0)}
        return self._table[scope.kind]


class AllowList:
    """Trusted peers: by peer id, from wherever they come, or by address, whoever they are."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self._networks: list[_Network] = []
        self._peers: set[PeerId] = set()
        for count, entry in enumerate(entries):
            if count >= MAX_ALLOWED:
                raise ConfigError(f"the allow-list has over {MAX_ALLOWED} entries: allow networks instead")
            self._add(entry)

    def _add(self, entry: str) -> None:
        try:
            self._networks.append(ipaddress.ip_network(entry, strict=False))
            return
        except ValueError:
            pass  # not an address: a peer id, or nothing
        try:
            self._peers.add(PeerId.parse(entry))
        except ConfigError:
            raise ConfigError(
                f"{entry!r} cannot be allowed: use a peer id, an IP address, or a network like 10.0.0.0/8"
            ) from None

    @property
    def names_peers(self) -> bool:
        """Some are trusted whatever their address."""
        return bool(self._peers)

    def has_address(self, address: Multiaddr) -> bool:
        """Whoever comes from there is trusted."""
        ip = _ip(address)
        return ip is not None and any(ip in network for network in self._networks if network.version == ip.version)

    def has_peer(self, peer: PeerId) -> bool:
        """This identity is trusted."""
        return peer in self._peers


def origin(address: Multiaddr, *, limit_loopback: bool) -> tuple[Scope, ...]:
    """The scopes of where a connection came from: none for loopback and for what has no IP address."""
    if (circuit := CircuitAddress.of(address)) is not None:
        return (Scope(Kind.RELAY, circuit.relay),)
    ip = _ip(address)
    if ip is None or (address.is_loopback and not limit_loopback):
        return ()
    return (
        Scope(Kind.ADDRESS, _network(ip, _ADDRESS_BITS[ip.version])),
        Scope(Kind.SUBNET, _network(ip, _SUBNET_BITS[ip.version])),
    )


def _ip(address: Multiaddr) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    ip = None if address.is_relayed else address.ip  # there it is the relay's
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip


def _network(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, bits: int) -> str:
    return str(ipaddress.ip_network((ip, bits), strict=False))


def descriptors() -> int | None:
    """How many files this process may have open; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
