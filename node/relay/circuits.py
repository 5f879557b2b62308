"""Circuits from their ends: dialing and being dialed through a relay, and a place at one to be dialed through.

A transport like TCP, for addresses `<relay's address>/p2p/<relay>/p2p-circuit/p2p/<peer>`. Its links are streams to
the relay, on which the ends make an ordinary connection, Noise and all: the relay can neither read nor change
anything. Only relays that are connected directly are used, never one relay over another.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from ...protocol import protobuf
from ...protocol.errors import ConfigError, DeadlineExceeded, PeerUnreachable, Refused, RemoteProtocolError
from ...protocol.ids import PeerId
from ...protocol.multiaddr import Multiaddr
from ...protocol.relay import (
    HOP,
    MAX_MESSAGE,
    STOP,
    CircuitAddress,
    HopMessage,
    HopType,
    Limit,
    Status,
    StopMessage,
    StopType,
    Voucher,
    through,
)
from ...protocol.yamux import MAX_DATA
from ..tasks import Supervisor
from ..transport.base import Priority, Stream
from ..transport.stream import MuxedStream
from ..transport.wire import Wire
from ..wires import Wires
from .link import StreamLink

if TYPE_CHECKING:
    from ..host import Host

logger = logging.getLogger(__name__)

REQUEST_S: Final = 10.0
"""Deadline of a request to a relay, without connecting to it; it asks the other peer meanwhile."""
MAX_STOPS: Final = 256
"""Circuits that come through one relay at once."""
MAX_RELAY_ADDRS: Final = 4
"""Addresses of one relay that are passed on as ours."""
MIN_LIFE_S: Final = 60.0
"""Shorter reservations are none: either side's clock is wrong, or the relay's mind."""
MAX_LIFE_S: Final = 86_400.0
LARGEST_FRAME: Final = MAX_DATA - 30
"""Payload of an inner frame that fits into one outer frame: yamux and Noise add that much."""
_CHUNK: Final = 4096
_RESERVE: Final = HopMessage(type=HopType.RESERVE)

M = TypeVar("M", HopMessage, StopMessage)


class CircuitRefused(Refused):
    """A relay said no."""

    def __init__(self, relay: PeerId, status: Status | None) -> None:
        self.status = status
        why = "without saying why" if status is None else status.name.lower().replace("_", " ")
        super().__init__(f"relay {relay.short} declined: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A reservation that we hold."""

    relay: PeerId
    expires: float
    """On the host's monotonic clock."""
    addrs: tuple[Multiaddr, ...]
    """Ours through the relay, ending in /p2p-circuit, the one that we use ourselves first."""
    limit: Limit | None
    """What circuits may carry; None: anything."""


class Circuits:
    """Implements transport.base.Transport over relays; one for each host."""

    def __init__(self, host: Host, wires: Wires, tasks: Supervisor) -> None:
        self._host = host
        self._wires = wires
        self._tasks = tasks
        self._places: dict[PeerId, Place] = {}
        self._asking: Counter[PeerId] = Counter()
        self._answering = False
        self.on_lost: list[Callable[[Place], None]] = []
        """Told when a place is gone because its relay is."""
        wires.on_close.append(self._closed)

    @property
    def places(self) -> tuple[Place, ...]:
        """The reservations held, whose relays are still connected."""
        return tuple(self._places.values())

    # -- transport --

    def can_dial(self, address: Multiaddr) -> bool:
        """Addresses through one relay that name both it and the peer."""
        parts = CircuitAddress.of(address)
        return parts is not None and parts.target is not None

    def can_listen(self, address: Multiaddr) -> bool:
        """Addresses of one relay that end in /p2p-circuit."""
        parts = CircuitAddress.of(address)
        return parts is not None and parts.target is None

    async def resolve(self, address: Multiaddr) -> Sequence[Multiaddr]:
        """Names are resolved when the relay is dialed."""
        return (address,)

    async def dial(
        self,
        address: Multiaddr,
        factory: Callable[[Multiaddr], asyncio.BufferedProtocol],
        *,
        bulk: bool = False,
        from_listener: bool = False,
    ) -> None:
        """Have the relay connect us with the peer. Raises OSError or SwarmError with the cause."""
        parts = CircuitAddress.of(address)
        if parts is None or parts.target is None:
            raise OSError(errno.EADDRNOTAVAIL, "not an address through a relay")
        if parts.relay in (self._host.peer_id, parts.target):
            raise OSError(errno.EADDRNOTAVAIL, "the relay would be one of the ends")
        stream, limit = await self._connect(parts, parts.target)
        where = address.without_peer()
        self._carry(stream, factory(where), limit)

    async def _connect(self, parts: CircuitAddress, target: PeerId) -> tuple[MuxedStream, Limit | None]:
        stream, answer = await self._ask(parts, HopMessage(type=HopType.CONNECT, peer=target))
        return stream, answer.limit

    async def listen(
        self, address: Multiaddr, factory: Callable[[Multiaddr], asyncio.BufferedProtocol]
    ) -> CircuitPlace:
        """Take a place at the relay. It is not refreshed here: see keeper.py. Raises ConfigError."""
        parts = CircuitAddress.of(address)
        if parts is None:
            raise ConfigError(f"{address} is no place at a relay: use <its address>/p2p/<its id>/p2p-circuit")
        try:
            place = await self.reserve(parts.relay, [parts.relay_addr] if parts.relay_addr.parts else [])
        except (OSError, Refused, PeerUnreachable, DeadlineExceeded, RemoteProtocolError) as exc:
            raise ConfigError(f"cannot listen on {address}: {exc}") from exc
        return CircuitPlace(self, place)

    def _carry(self, stream: MuxedStream, protocol: asyncio.BufferedProtocol, limit: Limit | None) -> None:
        self._tasks.start(self._run(stream, protocol, limit), "circuit")

    async def _run(self, stream: MuxedStream, protocol: asyncio.BufferedProtocol, limit: Limit | None) -> None:
        stream.set_priority(Priority.DECODE)
        link = StreamLink(stream, self._tasks)
        if not isinstance(protocol, Wire):  # it is there to refuse
            await link.run(protocol, link.abort)
            return
        protocol.limit = limit
        protocol.largest_frame = protocol.session.frame_limit = LARGEST_FRAME
        await link.run(protocol, partial(protocol.close, "closed on this side"))

    # -- asking relays --

    async def _ask(self, relay: CircuitAddress, request: HopMessage) -> tuple[MuxedStream, HopMessage]:
        """A hop stream on which the relay has said OK, and what else it said. Raises OSError or SwarmError."""
        peer = relay.relay
        wire = self._wires.direct(peer)
        if wire is None:
            addrs = [relay.relay_addr] if relay.relay_addr.parts else []
            await self._host.connect(peer, addrs, direct=True)
            wire = self._wires.direct(peer)
        if wire is None:
            raise PeerUnreachable(f"relay {peer} cannot be reached directly, and no relay is used over another")
        try:
            async with asyncio.timeout(REQUEST_S):
                stream = await self._host.open_on(wire, HOP)
                return stream, await _answer_of(stream, request)
        except TimeoutError:
            raise DeadlineExceeded(f"relay {peer} did not answer within {REQUEST_S:g} s") from None

    async def reserve(self, relay: PeerId, addrs: Sequence[Multiaddr] = ()) -> Place:
        """Take or renew a place at a relay. Raises OSError or SwarmError: CircuitRefused when it has none for us."""
        self._host.add_addrs(relay, addrs)
        self._answer_stops()
        self._asking[relay] += 1  # somebody may come before we have read the answer
        try:
            stream, answer = await self._ask(CircuitAddress(relay, Multiaddr(()), None), _RESERVE)
            await stream.close()
            place = self._place(stream.wire, answer)
            if stream.wire.closed:
                raise PeerUnreachable(f"relay {relay} has left")
        finally:
            self._asking -= Counter((relay,))
        self._places[relay] = place
        self._host.protect(relay, "relay")
        return place

    def _place(self, wire: Wire, answer: HopMessage) -> Place:
        """What an answer gives us. Raises RemoteProtocolError."""
        relay, found = wire.remote, answer.reservation
        if found is None:
            raise RemoteProtocolError(f"relay {relay} said OK to a reservation and sent none")
        if found.voucher:
            Voucher.open(found.voucher, relay=relay, peer=self._host.peer_id)
        left_s = found.expires - self._host.clock.wall()
        if left_s < MIN_LIFE_S:
            raise RemoteProtocolError(f"the reservation of relay {relay} ends in {left_s:.0f} s; is a clock wrong?")
        used = [wire.address] if wire.outbound else []
        told = [address.without_peer() for address in found.addrs if address.peer_id in (None, relay)]
        addrs = [address for address in dict.fromkeys((*used, *told)) if not address.is_relayed and address.parts]
        return Place(
            relay=relay,
            expires=self._host.clock.now() + min(left_s, MAX_LIFE_S),
            addrs=tuple(through(address, relay) for address in addrs[:MAX_RELAY_ADDRS]),
            limit=answer.limit,
        )

    def give_up(self, relay: PeerId) -> None:
        """Hold no place there any more. The relay learns it when the place is not renewed."""
        if self._places.pop(relay, None) is not None:
            self._host.unprotect(relay, "relay")

    def _closed(self, wire: Wire) -> None:
        """A connection ended, maybe the last one with a relay: then the place there is gone, too."""
        for relay, place in tuple(self._places.items()):
            if self._wires.direct(relay) is None:
                self.give_up(relay)
                for callback in tuple(self.on_lost):
                    callback(place)

    # -- being dialed --

    def _answer_stops(self) -> None:
        if not self._answering:
            self._answering = True
            self._host.handle(STOP, self._stopped, max_streams_per_peer=MAX_STOPS)

    async def _stopped(self, stream: Stream) -> None:
        """A relay has somebody for us. The stream becomes the link, and this runs as long as it does."""
        if not isinstance(stream, MuxedStream):
            return
        async with asyncio.timeout(REQUEST_S):
            request = await read_message(stream, StopMessage.decode)
            status = self._judge(stream, request)
            await write_message(stream, StopMessage(type=StopType.STATUS, status=status))
        if status is Status.OK:
            where = through(stream.wire.address if stream.wire.outbound else Multiaddr(()), stream.remote)
            await self._run(stream, self._wires.accept(where), request.limit)

    def _judge(self, stream: MuxedStream, request: StopMessage) -> Status:
        if request.type is not StopType.CONNECT:
            return Status.UNEXPECTED_MESSAGE
        if request.peer is None:
            return Status.MALFORMED_MESSAGE
        ours = stream.remote in self._places or stream.remote in self._asking
        return Status.OK if ours and not stream.wire.relayed else Status.PERMISSION_DENIED


class CircuitPlace:
    """A place at a relay as a listener."""

    def __init__(self, circuits: Circuits, place: Place) -> None:
        self._circuits = circuits
        self._place = place
        self.address = place.addrs[0] if place.addrs else Multiaddr((("p2p", str(place.relay)), ("p2p-circuit", "")))
        """Where we can be dialed."""

    async def aclose(self) -> None:
        """Give the place up."""
        self._circuits.give_up(self._place.relay)


async def read_message(stream: MuxedStream, decode: Callable[[bytes], M]) -> M:
    """One message with its length in front; what comes behind it stays unread. Raises RemoteProtocolError, OSError."""
    splitter = protobuf.Delimited(MAX_MESSAGE)
    while True:
        data = await stream.read(_CHUNK)
        if not data:
            raise RemoteProtocolError("the stream ended instead of a message")
        for raw in splitter.feed(data):
            stream.unread(splitter.pending)
            return decode(raw)


async def write_message(stream: MuxedStream, message: HopMessage | StopMessage) -> None:
    """Send one message."""
    await stream.write(protobuf.delimited(message.encode()))


async def _answer_of(stream: MuxedStream, request: HopMessage) -> HopMessage:
    """Ask, and read the answer; anything but OK resets the stream and raises CircuitRefused."""
    try:
        stream.set_priority(Priority.CONTROL)
        await write_message(stream, request)
        answer = await read_message(stream, HopMessage.decode)
        if answer.type is not HopType.STATUS or answer.status is not Status.OK:
            raise CircuitRefused(stream.remote, answer.status)
    except BaseException:
        stream.reset()
        raise
    return answer
