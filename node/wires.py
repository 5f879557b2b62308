"""The connections of a host: who is connected by which wires, who may come in, who hears of comings and
goings."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from ..protocol.connection import Connection
from ..protocol.errors import ConfigError
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from ..protocol.noise import StaticKey
from ..protocol.yamux import Budget
from .clock import Clock
from .transport.base import ConnectionClosed
from .transport.stream import MuxedStream
from .transport.wire import HANDSHAKE_TIMEOUT_S, Wire, WireEvents

PeerCallback = Callable[[PeerId], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """What strangers may cost us. Connections over a limit are cut before any cryptography is done."""

    connections: int = 1024
    """Open connections, dialed and accepted."""
    connections_per_ip: int = 32
    """Accepted connections from one IP address; loopback is exempt."""
    handshakes: int = 128
    """Accepted connections that have not proven an identity yet."""
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    """How long a stranger may take to prove it."""
    window_bytes: int = 512 * 1024 * 1024
    """Receive windows beyond the protocol's minimum, over all connections."""

    def __post_init__(self) -> None:
        for name in ("connections", "connections_per_ip", "handshakes", "handshake_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"HostLimits.{name} is {getattr(self, name)}: it must be positive")


class Wires:
    """Every wire of one host, from its first byte to its end."""

    def __init__(
        self,
        static: StaticKey,
        *,
        clock: Clock,
        limits: HostLimits,
        refused: Counter[str],
        on_stream: Callable[[MuxedStream], None],
    ) -> None:
        self.limits = limits
        self.on_connect: list[PeerCallback] = []
        """Told when the first wire to a peer opens."""
        self.on_disconnect: list[PeerCallback] = []
        """Told when the last wire to a peer is gone."""
        self.on_open: list[Callable[[Wire], None]] = []
        """Told of every wire that opens."""
        self.on_close: list[Callable[[Wire], None]] = []
        """Told of every wire that ends, opened or not."""
        self._static = static
        self._me = static.identity.peer_id
        self._clock = clock
        self._refused = refused
        self._on_stream = on_stream
        self._budget = Budget(limits.window_bytes)
        self._open: dict[PeerId, list[Wire]] = {}
        self._handshaking: dict[Wire, asyncio.Future[None] | None] = {}
        self._per_ip: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Wire]:
        """Every open wire."""
        return iter([wire for group in self._open.values() for wire in group])

    def peers(self) -> tuple[PeerId, ...]:
        """Peers with an open wire."""
        return tuple(self._open)

    def to(self, peer: PeerId) -> tuple[Wire, ...]:
        """The wires to a peer, oldest first."""
        return tuple(self._open.get(peer, ()))

    def best(self, peer: PeerId) -> Wire:
        """The wire for a new stream: the oldest that is good, the same one every time.

        Raises ConnectionClosed.
        """
        wire = next((wire for wire in self.to(peer) if wire.is_open), None)
        if wire is None:
            raise ConnectionClosed(f"the connection to {peer.short} was lost right after it opened")
        return wire

    # -- making them --

    def dialing(self, address: Multiaddr, expected: PeerId | None) -> Wire:
        """A wire for a link we make."""
        return self._make(address, outbound=True, expected=expected)

    async def opened(self, wire: Wire) -> None:
        """Wait for the end of a handshake. Raises ConnectionClosed with the cause when it fails."""
        if not wire.closed and not wire.is_open:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._handshaking[wire] = waiter
            await waiter
        wire.raise_if_closed()

    def accept(self, address: Multiaddr) -> Wire:
        """A wire for a link that came in; over a limit, one that is dead before it starts."""
        wire = self._make(address, outbound=False)
        reason = self._reason_to_refuse(address)
        if not address.is_loopback:
            self._per_ip[address.host or ""] += 1
        if reason is not None:
            self._refused[reason] += 1
            wire.abort(reason)
        return wire

    def _make(self, address: Multiaddr, *, outbound: bool, expected: PeerId | None = None) -> Wire:
        wire = Wire(
            Connection(self._static, initiator=outbound, expected=expected, node_budget=self._budget),
            address=address,
            outbound=outbound,
            clock=self._clock,
            events=WireEvents(opened=self._opened, stream=self._on_stream, closed=self._closed),
            handshake_timeout_s=self.limits.handshake_timeout_s,
        )
        self._handshaking[wire] = None
        return wire

    def _reason_to_refuse(self, address: Multiaddr) -> str | None:
        strangers = sum(1 for wire in self._handshaking if not wire.outbound) - 1
        if strangers >= self.limits.handshakes:
            return "too many handshakes"
        if sum(map(len, self._open.values())) >= self.limits.connections:
            return "too many connections"
        if self._per_ip[address.host or ""] >= self.limits.connections_per_ip:
            return "too many connections from one address"
        return None

    # -- their life --

    def _opened(self, wire: Wire) -> None:
        waiter = self._handshaking.pop(wire, None)
        if wire.remote == self._me:
            wire.abort("this address leads back to this node itself")
            _resolve(waiter)
            return
        group = self._open.setdefault(wire.remote, [])
        group.append(wire)
        _resolve(waiter)
        if len(group) == 1:
            _tell(self.on_connect, wire.remote)
        _tell(self.on_open, wire)

    def _closed(self, wire: Wire) -> None:
        _resolve(self._handshaking.pop(wire, None))
        if not wire.outbound and not wire.address.is_loopback:
            self._per_ip[wire.address.host or ""] -= 1
            self._per_ip += Counter()  # drop zeros
        _tell(self.on_close, wire)
        peer = next((peer for peer, group in self._open.items() if wire in group), None)
        if peer is None:
            return
        self._open[peer].remove(wire)
        if not self._open[peer]:
            del self._open[peer]
            _tell(self.on_disconnect, peer)

    async def aclose(self) -> None:
        """Cut the handshakes, say good-bye on every open wire."""
        for wire in list(self._handshaking):
            wire.abort("the host is closing")
        async with asyncio.TaskGroup() as group:
            for wire in self:
                group.create_task(wire.aclose())


def _tell(callbacks: list[Callable[[T], None]], subject: T) -> None:
    for callback in tuple(callbacks):
        callback(subject)


def _resolve(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
