"""What became of a host's connections: sums of the ended ones, and why the last of them ended.

Bounded whatever peers do, and apart for peers that proved an identity and for strangers, so that a flood of
strangers does not push out what an operator wants to know.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ..protocol.errors import ProtocolError
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from ..protocol.trace import TraceEvent, clean
from .clock import Clock
from .metrics import HostMetrics, Sums, of
from .transport.base import ConnectionClosed
from .transport.wire import Wire

logger = logging.getLogger(__name__)

MAX_ENDED: Final = 64
"""Ended connections remembered, with authenticated peers."""
MAX_STRANGERS: Final = 32
"""The same of connections that ended before the peer had proven an identity."""
MAX_DIAL_FAILURES: Final = 64
"""Failed attempts to dial an address remembered."""
_UNREACHABLE: Final = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedConnection:
    """A connection that is gone, and why."""

    peer: PeerId | None
    """None: it ended before the peer had proven an identity."""
    address: Multiaddr
    outbound: bool
    began_at: float
    ended_at: float
    """On the host's monotonic clock, as began_at."""
    reason: str
    """Printable, at most MAX_TEXT characters."""
    phase: str
    """How far it had come: security, noise, muxer or open."""
    rule: str
    """The stable name of our own rule that cut it; empty when none did."""
    bytes_in: int
    bytes_out: int
    events: tuple[TraceEvent, ...]
    """The last turns of its life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DialFailure:
    """An address that was tried in vain."""

    address: Multiaddr
    at: float
    cause: str
    """One of a few words: what the counter is kept by."""
    reason: str
    """In full; printable, at most MAX_TEXT characters."""


class Journal:
    """One host's memory of its connections."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._gone = Sums()
        self._opened: Counter[bool] = Counter()
        self._handshake_s = 0.0
        self._handshakes_failed = 0
        self._dials = 0
        self._dials_failed: Counter[str] = Counter()
        self.ended: deque[EndedConnection] = deque(maxlen=MAX_ENDED)
        self.strangers: deque[EndedConnection] = deque(maxlen=MAX_STRANGERS)
        self.dial_failures: deque[DialFailure] = deque(maxlen=MAX_DIAL_FAILURES)

    def opened(self, wire: Wire) -> None:
        """A peer has proven its identity on it."""
        self._opened[wire.outbound] += 1
        self._handshake_s += wire.life.handshake_s or 0.0

    def closed(self, wire: Wire) -> None:
        """A connection is gone, opened or not."""
        life = wire.life
        if life.tap is not None:
            life.tap.close()
        logger.debug("%r ended in phase %s: %s", wire, life.phase, life.reason)
        known = life.handshake_s is not None
        self._gone.add(wire)
        self._handshakes_failed += not known
        (self.ended if known else self.strangers).append(
            EndedConnection(
                peer=wire.remote if known else None,
                address=wire.address,
                outbound=wire.outbound,
                began_at=life.began_at,
                ended_at=life.began_at if life.ended_at is None else life.ended_at,
                reason=life.reason,
                phase=life.phase,
                rule=wire.cut_for,
                bytes_in=wire.bytes_in,
                bytes_out=wire.bytes_out,
                events=tuple(life.events),
            )
        )

    def dialing(self) -> None:
        """An address is tried."""
        self._dials += 1

    def dial_failed(self, address: Multiaddr, exc: BaseException) -> None:
        """It did not answer as it should."""
        cause = cause_of(exc)
        self._dials_failed[cause] += 1
        failure = DialFailure(address=address, at=self._clock.now(), cause=cause, reason=clean(str(exc) or cause))
        self.dial_failures.append(failure)

    def metrics(self, wires: Iterable[Wire], refused: Mapping[str, int]) -> HostMetrics:
        """A snapshot, the open connections `wires` included."""
        wires = tuple(wires)
        return HostMetrics(
            connections=len(wires),
            streams=sum(wire.stream_count for wire in wires),
            connections_in=self._opened[False],
            connections_out=self._opened[True],
            handshakes_failed=self._handshakes_failed,
            handshake_s=self._handshake_s,
            total=of(wires, self._gone),
            dials=self._dials,
            dials_failed=tuple(sorted(self._dials_failed.items())),
            refused=tuple(sorted(refused.items())),
        )


def cause_of(exc: BaseException) -> str:
    """Why a dial failed, as one of a few words to count by."""
    if isinstance(exc, asyncio.CancelledError):
        return "given-up"
    if isinstance(exc, TimeoutError):
        return "timeout"
    if isinstance(exc, ConnectionRefusedError):
        return "refused"
    if isinstance(exc, socket.gaierror):
        return "name"
    if isinstance(exc, ConnectionClosed):
        return "handshake"
    if isinstance(exc, OSError):
        return "unreachable" if exc.errno in _UNREACHABLE else "system"
    return "protocol" if isinstance(exc, ProtocolError) else "other"
