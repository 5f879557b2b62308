"""The relay: gives places to peers that nobody can dial, and passes bytes between them and whoever asks for them.

Who may have what is decided in protocol/relay_ledger.py, whose turn it is in protocol/fair_share.py. What passes is
encrypted between the two ends; a relay sees who talks to whom, when and how much.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final

from ...protocol.errors import DeadlineExceeded, RemoteProtocolError, SwarmError
from ...protocol.fair_share import FairShare
from ...protocol.ids import PeerId
from ...protocol.limits import OverLimit, Scope
from ...protocol.multiaddr import Multiaddr
from ...protocol.relay import (
    HOP,
    STOP,
    HopMessage,
    HopType,
    Limit,
    Reservation,
    Status,
    StopMessage,
    StopType,
    Voucher,
)
from ...protocol.relay_ledger import Circuit, Ledger, NoReservation, RelayLimits, Rushed
from ..limits import origin
from ..tasks import Supervisor
from ..transport.base import Priority, Stream
from ..transport.stream import MuxedStream
from .circuits import read_message, write_message

if TYPE_CHECKING:
    from ..host import Host

logger = logging.getLogger(__name__)

REQUEST_S: Final = 10.0
"""How long a peer may take to say what it wants, and the other to answer whether it takes a circuit."""
CHUNK: Final = 64 * 1024
"""Bytes passed on at once."""
QUANTUM: Final = 16 * 1024
"""Bytes of one turn: who wants little waits for one turn of another at most."""
EXPIRE_S: Final = 60.0
"""How often the connections of those whose place has ended lose their protection; the place itself ends in time."""
MIN_TIMER_S: Final = 0.001
MAX_ADDRS: Final = 8
"""Our addresses told to whoever has a place here."""
SOURCE, TARGET = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStatus:
    """What a relay is doing."""

    reservations: int
    """Peers that have a place."""
    circuits: int
    """Open now."""
    circuits_total: int
    bytes_total: int
    """Passed on, both directions."""
    waiting: int
    """Pieces that wait for their turn."""
    refused: Mapping[str, int]
    """Requests turned away and circuits cut, by the reasons of docs/spec/relay.md."""


class Relay:
    """One host's relay service. `async with`; ends every circuit when it ends."""

    def __init__(self, host: Host, limits: RelayLimits | None = None) -> None:
        self.limits = limits or RelayLimits()
        self.ledger = Ledger(self.limits)
        """Who has what."""
        self._host = host
        self._now = host.clock.now
        self._turns = _Turns(FairShare(self.limits.bytes_per_s, host.clock.now()), host.clock.now)
        self._open: dict[Circuit, tuple[MuxedStream, MuxedStream]] = {}
        self._tasks = Supervisor("relay")

    async def __aenter__(self) -> Relay:
        await self._tasks.__aenter__()
        self._forget = self._host.on_disconnect(self._left)
        # its own limits are finer; this one only bounds the streams that wait to say what they want
        self._host.handle(HOP, self._serve, max_streams_per_peer=2 * self.limits.circuits_per_peer)
        self._tasks.start(self._expire_forever(), "expire reservations")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Take no more, end every circuit. Safe to call twice."""
        if HOP in self._host.protocols:
            self._host.unhandle(HOP)
            self._forget()
        for streams in tuple(self._open.values()):
            for stream in streams:
                stream.reset()
        await self._tasks.aclose()
        self._turns.close()

    def status(self) -> RelayStatus:
        """One snapshot."""
        return RelayStatus(
            reservations=self.ledger.reservations,
            circuits=len(self.ledger.circuits),
            circuits_total=self.ledger.opened,
            bytes_total=self.ledger.bytes,
            waiting=len(self._turns),
            refused=dict(self.ledger.refused),
        )

    # -- requests --

    async def _serve(self, stream: Stream) -> None:
        """Answer one request. After a CONNECT this lasts as long as the circuit."""
        if not isinstance(stream, MuxedStream):
            return
        stream.set_priority(Priority.CONTROL)
        try:
            async with asyncio.timeout(REQUEST_S):
                request = await read_message(stream, HopMessage.decode)
        except RemoteProtocolError as exc:
            logger.info("%s asked a relay in vain: %s", stream.remote.short, exc)
            await self._say(stream, Status.MALFORMED_MESSAGE)
            return
        if stream.wire.relayed:
            self.ledger.refused["over-relay"] += 1
            await self._say(stream, Status.PERMISSION_DENIED)
        elif request.type is HopType.RESERVE:
            await self._reserve(stream)
        elif request.type is not HopType.CONNECT:
            await self._say(stream, Status.UNEXPECTED_MESSAGE)
        elif request.peer is None:
            await self._say(stream, Status.MALFORMED_MESSAGE)
        else:
            await self._connect(stream, request.peer)

    async def _say(self, stream: MuxedStream, status: Status) -> None:
        await write_message(stream, HopMessage(type=HopType.STATUS, status=status))

    async def _reserve(self, stream: MuxedStream) -> None:
        peer = stream.remote
        now = self._now()
        try:
            ends = self.ledger.reserve(peer, self._where(stream), now)
        except (OverLimit, Rushed) as exc:
            logger.info("no place for %s: %s", peer.short, exc)
            await self._say(stream, Status.RESERVATION_REFUSED)
            return
        self._host.protect(peer, "relayed")
        expires = int(self._host.clock.wall() + ends - now)
        place = Reservation(
            expires=expires,
            addrs=tuple(address.with_peer(self._host.peer_id) for address in self._addrs(stream)),
            voucher=Voucher(relay=self._host.peer_id, peer=peer, expires=expires).seal(self._host.key),
        )
        await write_message(
            stream, HopMessage(type=HopType.STATUS, status=Status.OK, reservation=place, limit=self._limit())
        )

    def _limit(self) -> Limit | None:
        """What circuits may carry; nothing is said when that is anything."""
        limits = self.limits
        if not (limits.circuit_s or limits.circuit_bytes):
            return None
        return Limit(duration_s=limits.circuit_s, data_bytes=limits.circuit_bytes)

    def _addrs(self, stream: MuxedStream) -> Sequence[Multiaddr]:
        """Where we can be dialed directly by whoever is not on this machine, unless the asker is."""
        direct = [address.without_peer() for address in self._host.listen_addrs if not address.is_relayed]
        if not stream.wire.address.is_loopback:
            direct = [address for address in direct if not address.is_loopback]
        return direct[:MAX_ADDRS]

    def _where(self, stream: MuxedStream) -> tuple[Scope, ...]:
        return origin(stream.wire.address, limit_loopback=self._host.limits.limit_loopback)

    # -- circuits --

    async def _connect(self, stream: MuxedStream, target: PeerId) -> None:
        source = stream.remote
        try:
            if target == source:
                raise NoReservation("a peer cannot be connected with itself")
            circuit = self.ledger.connect(source, target, self._where(stream), self._now())
        except NoReservation:
            await self._say(stream, Status.NO_RESERVATION)
            return
        except (OverLimit, Rushed) as exc:
            logger.info("no circuit from %s to %s: %s", source.short, target.short, exc)
            await self._say(stream, Status.RESOURCE_LIMIT_EXCEEDED)
            return
        reason = ""
        try:
            other = await self._stop(circuit)
            if other is None:
                await self._say(stream, Status.CONNECTION_FAILED)
                return
            reason = await self._join(circuit, stream, other)
        finally:
            self.ledger.disconnect(circuit, reason)

    async def _stop(self, circuit: Circuit) -> MuxedStream | None:
        """A stream to the target, which has agreed to the circuit; None if it cannot be had."""
        wire = self._host.direct_wire(circuit.target)
        if wire is None:
            self.ledger.refused["target-gone"] += 1
            return None
        request = StopMessage(type=StopType.CONNECT, peer=circuit.source, limit=self._limit())
        try:
            async with asyncio.timeout(REQUEST_S):
                stream = await self._host.open_on(wire, STOP)
                try:
                    stream.set_priority(Priority.CONTROL)
                    await write_message(stream, request)
                    answer = await read_message(stream, StopMessage.decode)
                    if answer.type is not StopType.STATUS or answer.status is not Status.OK:
                        raise DeadlineExceeded(f"it said {answer.status}")
                except BaseException:
                    stream.reset()
                    raise
        except (TimeoutError, OSError, SwarmError) as exc:
            logger.info("%s takes no circuit from %s: %s", circuit.target.short, circuit.source.short, exc)
            self.ledger.refused["target-declined"] += 1
            return None
        return stream

    async def _join(self, circuit: Circuit, source: MuxedStream, target: MuxedStream) -> str:
        """Pass bytes both ways until both directions ended; the name of the limit that ended it earlier, or ""."""
        reasons: list[str] = []
        whole = False
        self._open[circuit] = (source, target)
        try:
            await write_message(source, HopMessage(type=HopType.STATUS, status=Status.OK, limit=self._limit()))
            self.ledger.opened += 1
            async with asyncio.timeout(self.limits.circuit_s or None), asyncio.TaskGroup() as group:
                group.create_task(self._pass(circuit, SOURCE, source, target))
                group.create_task(self._pass(circuit, TARGET, target, source))
            whole = True
        except* _SpentError as spent:
            reasons += (str(exc) for exc in spent.exceptions)
        except* TimeoutError:
            reasons.append("circuit-time")
        except* OSError as gone:
            logger.debug("a circuit from %s to %s broke: %s", circuit.source.short, circuit.target.short, gone)
        finally:
            del self._open[circuit]
            if whole:
                await target.close()
            else:
                source.reset()
                target.reset()
        return reasons[0] if reasons else ""

    async def _pass(self, circuit: Circuit, direction: int, source: MuxedStream, target: MuxedStream) -> None:
        """One direction, to its end. Raises _SpentError when no more may pass."""
        target.set_priority(Priority.DECODE)
        while data := await source.read(CHUNK):
            allowed = circuit.allow(direction, len(data), self._now())
            if allowed:
                await self._turns.wait(circuit.key, allowed)
                await target.write(memoryview(data)[:allowed])
            if allowed < len(data):
                spent = self.limits.circuit_bytes and circuit.carried[direction] >= self.limits.circuit_bytes
                raise _SpentError("circuit-bytes" if spent else "day-bytes")
        await target.close_write()

    # -- ends --

    def _left(self, peer: PeerId) -> None:
        """A peer has no connection any more: its place is free."""
        if self.ledger.release(peer):
            self._host.unprotect(peer, "relayed")

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_S)
            for peer in self.ledger.expire(self._now()):
                self._host.unprotect(peer, "relayed")


class _SpentError(Exception):
    """A circuit has carried all it may; the text names the limit."""


class _Turns:
    """Lets each piece wait for its turn."""

    def __init__(self, share: FairShare, now: Callable[[], float]) -> None:
        self._share = share
        self._now = now
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, key: Hashable, size: int) -> None:
        """Return when so many bytes may go. Cancelled, the turn is others'."""
        while size > 0:
            await self._wait(key, min(size, QUANTUM))
            size -= QUANTUM

    async def _wait(self, key: Hashable, size: int) -> None:
        turn = self._share.ask(key, size, self._now())
        if turn is None:
            return
        future = self._waiting[turn.number] = asyncio.get_running_loop().create_future()
        self._arm()
        try:
            await future
        finally:
            if self._waiting.pop(turn.number, None) is not None:
                turn.cancelled = True

    def close(self) -> None:
        """Nobody waits any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        wait_s = self._share.wait_s()
        if wait_s is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(max(wait_s, MIN_TIMER_S), self._due)

    def _due(self) -> None:
        self._timer = None
        for turn in self._share.due(self._now()):
            future = self._waiting.pop(turn.number, None)
            if future is not None and not future.done():
                future.set_result(None)
        self._arm()
