"""What every byte stream and every transport of the node promises, whatever carries it.

One conformance suite (tests/node/test_streams.py) runs against all implementations: streams over TCP, over
the in-memory network, and the in-process pair a node gets when it opens a stream to itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from ...protocol.errors import Refused
from ...protocol.ids import PeerId
from ...protocol.multiaddr import Multiaddr
from ...protocol.yamux_frames import Priority

__all__ = [
    "ConnectionClosed",
    "Listener",
    "Priority",
    "ProtocolUnsupported",
    "Stream",
    "StreamReset",
    "Transport",
]


class StreamReset(ConnectionResetError):
    """One stream was torn down by the other side (or by us, by reset()); the connection may live on."""


class ConnectionClosed(ConnectionAbortedError):
    """The connection under the stream is gone: the peer died, left, or broke the protocol."""


class ProtocolUnsupported(Refused):
    """The peer is there but does not speak the protocol asked for."""


class Stream(Protocol):
    """A bidirectional, reliable, flow-controlled byte stream to a protocol handler of an authenticated peer.

    At most one task may read and one may write at a time. When the other side dies, every pending and later
    read and write raises at once: StreamReset for this stream, ConnectionClosed for the whole connection.
    """

    @property
    def protocol(self) -> str:
        """The protocol id spoken on it."""

    @property
    def remote(self) -> PeerId:
        """Who is at the other end, proven by the handshake."""

    async def read(self, max_bytes: int) -> bytes:
        """At least one and at most `max_bytes` bytes; b"" at EOF. Cancel-safe: no byte is lost."""

    async def read_exactly(self, n: int) -> bytes:
        """Exactly `n` bytes, however large the flow-control window is; asyncio.IncompleteReadError at EOF.

        The caller vouches for `n`: that much memory may be filled by the peer. Cancel-safe: no byte is lost.
        """

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Send the parts in order, as one piece; returns when all are framed, that is: buffers may be reused.

        Backpressure: waits while the peer's window is spent or the link is full. A cancelled write of which
        some, but not all, was sent resets the stream, for the peer could never make sense of the rest; a
        write of which nothing was sent is withdrawn.
        """

    async def close_write(self) -> None:
        """End our direction: the peer reads EOF after what was written. Reading goes on."""

    async def close(self) -> None:
        """End both directions gently: what was written arrives, what still comes in is thrown away."""

    def reset(self) -> None:
        """Tear the stream down at once, losing what is in flight; the peer's reads raise StreamReset."""

    def set_priority(self, priority: Priority) -> None:
        """Which of our streams on the connection goes first when the link is full. Default: BULK."""


class Listener(Protocol):
    """An open listening endpoint."""

    @property
    def address(self) -> Multiaddr:
        """The address really bound: port 0 replaced, a wildcard host still a wildcard."""

    async def aclose(self) -> None:
        """Stop accepting. Connections already accepted live on."""


class Transport(Protocol):
    """Makes byte links. Each new link is given a fresh asyncio.BufferedProtocol from the factory."""

    def can_dial(self, address: Multiaddr) -> bool:
        """Whether this transport understands the address."""

    def can_listen(self, address: Multiaddr) -> bool:
        """Whether this transport can listen on the address."""

    async def dial(
        self,
        address: Multiaddr,
        factory: Callable[[Multiaddr], asyncio.BufferedProtocol],
        *,
        bulk: bool = False,
        from_listener: bool = False,
    ) -> None:
        """Connect; `factory` is called once with the address really dialed. Raises OSError with the cause.

        `bulk`: made for throughput, not for latency. `from_listener`: from the port that others dial, so that a
        NAT in front of us shows the same address for both.
        """

    async def listen(self, address: Multiaddr, factory: Callable[[Multiaddr], asyncio.BufferedProtocol]) -> Listener:
        """Accept links; `factory` is called per link with the remote's address.

        Raises ConfigError or OSError.
        """

    async def resolve(self, address: Multiaddr) -> Sequence[Multiaddr]:
        """The addresses a DNS name stands for, without /p2p; the address itself when there is nothing to resolve."""
