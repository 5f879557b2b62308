"""Bulk connections: beside the connection on which tokens travel, some that are made for throughput.

On a path of some length one connection serves both badly. Cubic, which is good for tokens, fills the bottleneck's
queue as soon as bulk flows, and every token waits behind it; BBR, which does not, paces tokens. And what the kernel
keeps for retransmission (tcp_wmem, 4 MB by default) bounds one connection to about 3 MB per round trip. So streams
opened with bulk=True get connections of their own with BBR: one, and more when it shows that the line takes more
than one can carry. Not from the start, for several BBR flows on a line that one could fill do fill its queue.

The side that dials such a connection marks it by opening one stream of PROTOCOL on it, which tells the other side to
treat it likewise. Only peers that name PROTOCOL in identify are asked, so others never see any of this; a peer that
refuses, by any means, is left alone for a while, and its streams share the ordinary connection.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ..protocol import identify, ping
from ..protocol.errors import SwarmError
from ..protocol.ids import PeerId
from .dialer import Dialer
from .tasks import Supervisor
from .transport import tcp
from .transport.base import ConnectionClosed, Stream
from .transport.bbr import Startup
from .transport.stream import MuxedStream
from .transport.wire import Wire
from .wires import Wires

if TYPE_CHECKING:
    from .host import Host

logger = logging.getLogger(__name__)

PROTOCOL: Final = "/swarmnode/bulk/1.0.0"
WORTH_RTT_S: Final = 0.003
"""On shorter paths the priorities inside one connection are enough."""
LANE_BYTES: Final = 2_800_000
"""What one connection has under way at most: 28 MB/s measured at 100 ms, whatever the windows (tcp_wmem 4 MB)."""
MAX_LANES: Final = 5
"""Bulk connections with one peer, whoever dialed them: what 1 Gbit/s takes at 100 ms."""
HEADROOM: Final = 2.0
"""Lanes are for this many times what flows: a lane that its buffer holds up calls for a second one."""
SAMPLE_S: Final = 0.5
"""Time between two looks at how much flows."""
FADING: Final = 0.9
"""A rate is remembered this much from one look to the next: data comes in bursts."""
IDLE_S: Final = 30.0
"""A bulk connection without streams for this long is closed by the side that dialed it."""
RETRY_S: Final = 60.0
"""How long a peer that did not take one is not asked again."""
MAX_LEFT_ALONE: Final = 1024
"""Such peers remembered; further ones are asked again."""
DIAL_S: Final = 0.5
DIAL_RTTS: Final = 8
"""A dial may take DIAL_S and this many round trips (it needs 4): an address behind a NAT must not cost 10 s."""
MAX_MARKS: Final = 8
"""Streams of PROTOCOL that one peer may have open."""
_CHORES: Final = frozenset((PROTOCOL, identify.PROTOCOL, identify.PUSH_PROTOCOL, ping.PROTOCOL))


class Bulk:
    """Makes, finds and closes the bulk connections of one host."""

    def __init__(self, host: Host, wires: Wires, dialer: Dialer, tasks: Supervisor) -> None:
        self._host = host
        self._wires = wires
        self._dialer = dialer
        self._tasks = tasks
        self._dials: dict[PeerId, set[asyncio.Future[None]]] = {}
        self._left_alone: dict[PeerId, float] = {}  # until when
        self._watching = False
        self._lanes: dict[Wire, _Lane] = {}
        self._looked_at = 0.0
        self._rates: dict[PeerId, float] = {}  # bytes a second over all lanes with a peer, both ways

    def register(self) -> None:
        """Answer marks."""
        self._host.handle(PROTOCOL, self._marked, max_streams_per_peer=MAX_MARKS)

    def lanes(self, peer: PeerId) -> int:
        """Bulk connections worth having with a peer, as far as one knows; 0 when the ordinary one will do."""
        main = next((wire for wire in self._wires.to(peer) if wire.is_open and not wire.bulk), None)
        if main is None or main.address.is_relayed or PROTOCOL not in self._host.book.get(peer).protocols:
            return 0
        ip = main.address.ip
        rtt_s = _round_trip(main)
        if (ip is not None and ip.is_loopback) or rtt_s < WORTH_RTT_S:
            return 0
        return max(1, min(MAX_LANES, math.ceil(HEADROOM * self._rates.get(peer, 0.0) * rtt_s / LANE_BYTES)))

    async def wire(self, peer: PeerId) -> Wire | None:
        """The connection for one more bulk stream; None: the ordinary one. Never raises but when cancelled."""
        while wanted := self.lanes(peer):
            lanes = [wire for wire in self._wires.to(peer) if wire.bulk and self._is_usable(wire)]
            least = min(lanes, key=_load, default=None)
            if least is not None and (not _load(least) or len(lanes) >= wanted):
                return least
            dials = self._dials.get(peer, set())
            if len(lanes) + len(dials) < wanted and self._may_dial(peer):
                made = await self._dial(peer)
                if made is not None:
                    return made
            elif least is not None or not dials:
                return least
            else:
                await asyncio.wait(dials, return_when=asyncio.FIRST_COMPLETED)
        return None

    def _is_usable(self, wire: Wire) -> bool:
        """Whether a stream opened now will not meet the other side's closing of an idle connection."""
        used_lately = self._host.clock.now() - wire.used_at < IDLE_S / 2
        return wire.is_open and (wire.outbound or used_lately or _load(wire) > 0)

    def _may_dial(self, peer: PeerId) -> bool:
        return self._tasks.has_room and self._host.clock.now() >= self._left_alone.get(peer, 0.0)

    def _leave_alone(self, peer: PeerId) -> None:
        now = self._host.clock.now()
        self._left_alone = {peer: until for peer, until in self._left_alone.items() if until > now}
        if len(self._left_alone) < MAX_LEFT_ALONE:
            self._left_alone[peer] = now + RETRY_S

    # -- the dialing side --

    async def _dial(self, peer: PeerId) -> Wire | None:
        """One more bulk connection, marked and acknowledged; None when the peer did not take it."""
        pending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._dials.setdefault(peer, set()).add(pending)
        made: Wire | None = None
        try:
            main = self._wires.best(peer)
            async with asyncio.timeout(DIAL_S + DIAL_RTTS * _round_trip(main)):
                made = await self._dialer.dial_bulk(peer, [main.address] if main.outbound else [])
                await self._mark(made)
        except (TimeoutError, OSError, SwarmError) as exc:
            logger.debug("no bulk connection to %s: %s", peer.short, exc)
            if made is not None:
                made.close("it was not taken as a bulk connection")
            self._leave_alone(peer)
            return None
        finally:
            self._dials[peer].discard(pending)
            if not self._dials[peer]:
                del self._dials[peer]
            pending.set_result(None)
        self._start_watching()
        return made

    async def _mark(self, wire: Wire) -> None:
        """Tell the peer what the connection is for, and hear that it agrees. Raises OSError or SwarmError."""
        stream = await self._host.open_on(wire, PROTOCOL)
        try:
            if not await stream.agreed() or await stream.read(1):
                raise ConnectionClosed("the peer does not agree to a bulk connection")
            await stream.close()
        except BaseException:
            stream.reset()
            raise

    # -- while there are any --

    def _start_watching(self) -> None:
        if not self._watching and self._tasks.has_room:
            self._watching = True
            self._tasks.start(self._watch(), "watch bulk connections")

    async def _watch(self) -> None:
        """Look at all bulk connections in turns, until there are none."""
        try:
            while lanes := [wire for wire in self._wires if wire.bulk]:
                self._measure(lanes)
                self._close_idle(lanes)
                await asyncio.sleep(SAMPLE_S)
        finally:
            self._watching = False
            self._lanes.clear()
            self._rates.clear()

    def _measure(self, lanes: Iterable[Wire]) -> None:
        """How much flows to and from each peer, and whether BBR makes anything of it."""
        now = self._host.clock.now()
        elapsed_s = max(now - self._looked_at, SAMPLE_S)
        self._looked_at = now
        self._lanes = {wire: self._lanes.get(wire) or _Lane(wire) for wire in lanes}
        rates = dict.fromkeys((wire.remote for wire in self._lanes), 0.0)
        for wire, lane in self._lanes.items():
            rate_in, rate_out = lane.look(wire, elapsed_s)
            rates[wire.remote] += rate_in + rate_out
        self._rates = {peer: max(rate, FADING * self._rates.get(peer, 0.0)) for peer, rate in rates.items()}

    def _close_idle(self, lanes: Iterable[Wire]) -> None:
        now = self._host.clock.now()
        for wire in lanes:
            if wire.outbound and not _load(wire) and now - wire.used_at >= IDLE_S:
                wire.close("idle")

    # -- the accepting side --

    async def _marked(self, stream: Stream) -> None:
        """The peer says what this connection is for. One that has no other connection may not say so."""
        if not isinstance(stream, MuxedStream):
            return
        wire = stream.wire
        if all(other.bulk or other is wire for other in self._wires.to(stream.remote)):
            stream.reset()
            return
        wire.bulk = True
        self._start_watching()
        if wire.socket is not None:
            tcp.control_congestion(wire.socket, tcp.BULK)


class _Lane:
    """A bulk connection between two looks at it."""

    def __init__(self, wire: Wire) -> None:
        self._bytes_in = wire.bytes_in
        self._bytes_out = wire.bytes_out
        self._startup = Startup(wire.socket) if wire.socket is not None else None

    def look(self, wire: Wire, elapsed_s: float) -> tuple[float, float]:
        """Bytes a second that came and went since the last look."""
        rate_in = (wire.bytes_in - self._bytes_in) / elapsed_s
        rate_out = (wire.bytes_out - self._bytes_out) / elapsed_s
        self._bytes_in, self._bytes_out = wire.bytes_in, wire.bytes_out
        if self._startup is not None:
            self._startup.look(rate_out)
        return rate_in, rate_out


def _load(wire: Wire) -> int:
    """Streams that carry something."""
    return sum(stream.protocol not in _CHORES for stream in wire.session.streams())


def _round_trip(wire: Wire) -> float:
    """The path's round trip without queues. Before the first keepalive came back: the handshake, which is one."""
    return wire.life.rtt_min_s or wire.life.handshake_s or 0.0
