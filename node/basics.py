"""The protocols every libp2p host speaks: identify, identify-push and ping."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..protocol import identify, ping
from ..protocol.envelope import MAX_ADDRS, PeerRecord
from ..protocol.errors import DeadlineExceeded, RemoteProtocolError, SwarmError
from ..protocol.identify import Identify
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from .tasks import Supervisor
from .transport.base import Priority, Stream
from .transport.wire import Wire

if TYPE_CHECKING:
    from .host import Host

logger = logging.getLogger(__name__)

IDENTIFY_TIMEOUT_S: Final = 10.0
"""Deadline of one identify exchange."""
PUSH_DELAY_S: Final = 0.05
"""Changes within this time travel in one push."""
MAX_PUSHES: Final = 32
"""Pushes in flight at once."""
RECORD_SPACING_S: Final = 1.0
"""Records of one peer are verified at most this often when its key is of a kind that takes milliseconds."""
_CHUNK: Final = 4096


class Basics:
    """Answers and asks the base protocols for one host."""

    def __init__(self, host: Host, tasks: Supervisor) -> None:
        self._host = host
        self._tasks = tasks
        self.listeners: list[Callable[[PeerId], None]] = []
        """Who hears when a peer has identified itself."""
        self._wires: dict[Wire, None] = {}
        self._observed: dict[Wire, Multiaddr] = {}
        self._push_due = False
        self._pushing = False
        self._record = PeerRecord(peer=host.peer_id, seq=0)
        self._sealed = b""
        self._verified_at: dict[PeerId, float] = {}

    def register(self) -> None:
        """Put the handlers into the host's table."""
        self._host.handle(identify.PROTOCOL, self._answer_identify, max_streams_per_peer=8)
        self._host.handle(identify.PUSH_PROTOCOL, self._take_push, max_streams_per_peer=8)
        self._host.handle(ping.PROTOCOL, self._answer_ping, max_streams_per_peer=ping.MAX_INBOUND)

    def connected(self, wire: Wire) -> None:
        """A connection opened: ask who it is."""
        self._wires[wire] = None
        if self._tasks.has_room:
            self._tasks.start(self._ask(wire), f"identify {wire.remote.short}")

    def disconnected(self, wire: Wire) -> None:
        """A connection is gone."""
        self._wires.pop(wire, None)
        self._observed.pop(wire, None)
        if self._verified_at:
            self._verified_at = {peer: at for peer, at in self._verified_at.items() if self._host.is_connected(peer)}

    def observed_addrs(self) -> tuple[Multiaddr, ...]:
        """Our addresses as peers see them, most often reported first; those of this machine alone left out."""
        return tuple(address for address, _ in Counter(self._observed.values()).most_common())

    def observations(self) -> tuple[tuple[Wire, Multiaddr], ...]:
        """What the peer of each connection says it sees us at."""
        return tuple(self._observed.items())

    # -- identify --

    def _messages(self, observed: Multiaddr | None) -> list[bytes]:
        host = self._host
        addrs = tuple(address.without_peer() for address in host.listen_addrs)
        return Identify(
            public_key=host.key.public.marshal(),
            listen_addrs=addrs,
            protocols=host.protocols,
            observed_addr=observed,
            protocol_version=identify.PROTOCOL_VERSION,
            agent_version=host.agent,
            signed_record=self._signed(addrs[:MAX_ADDRS]),
        ).messages()

    def _signed(self, addrs: tuple[Multiaddr, ...]) -> bytes:
        """Our peer record, signed anew when the addresses are others; nothing when we listen nowhere."""
        if not addrs:
            return b""
        if addrs != self._record.addrs:
            host = self._host
            # the date, so that a restarted node goes on counting; but a clock set back must not count down
            seq = max(self._record.seq + 1, int(host.clock.wall() * 1000))
            self._record = PeerRecord(peer=host.peer_id, seq=seq, addrs=addrs)
            self._sealed = self._record.seal(host.key)
        return self._sealed

    async def _answer_identify(self, stream: Stream) -> None:
        seen = self._host.address_of(stream)
        if seen is not None and seen.is_relayed:  # that would be the relay's
            seen = None
        await stream.write(*self._messages(seen))

    async def _ask(self, wire: Wire) -> None:
        try:
            async with asyncio.timeout(IDENTIFY_TIMEOUT_S):
                stream = await self._host.open_on(wire, identify.PROTOCOL)
            stream.set_priority(Priority.CONTROL)
            try:
                message = await _read_messages(stream)
                await stream.close()
            except BaseException:
                stream.reset()
                raise
        except (TimeoutError, OSError, SwarmError) as exc:
            logger.debug("identify of %r failed: %s", wire, exc)
            return
        observed = message.observed_addr
        if observed is not None and _is_ours_elsewhere(observed) and not wire.closed:
            self._observed[wire] = observed
        self._learn(wire.remote, message)

    def _learn(self, peer: PeerId, message: Identify) -> None:
        if not self._host.is_connected(peer):
            return
        self._host.book.identified(peer, message.protocols, message.agent_version)
        if not self._certified(peer, message.signed_record):
            self._host.book.add(peer, message.listen_addrs)
        for callback in tuple(self.listeners):
            callback(peer)

    def _certified(self, peer: PeerId, sealed: bytes) -> bool:
        """Whether the peer sent a sound record, and none older than one we have."""
        if not sealed or not self._may_verify(peer):
            return False
        try:
            record = PeerRecord.open(sealed, peer=peer)
        except RemoteProtocolError as exc:
            logger.info("%s sent a peer record that is none: %s", peer.short, exc)
            return False
        return self._host.book.certify(record)

    def _may_verify(self, peer: PeerId) -> bool:
        """RSA signatures can take 9 ms, and a peer pushes as often as it likes: such a key has its turns."""
        if peer.is_inline:
            return True
        now = self._host.clock.now()
        if now - self._verified_at.get(peer, -RECORD_SPACING_S) < RECORD_SPACING_S:
            return False
        self._verified_at[peer] = now
        return True

    # -- push --

    def changed(self) -> None:
        """Our protocols or addresses changed: tell everybody connected, once things have settled."""
        self._push_due = True
        if self._wires and not self._pushing and self._tasks.has_room:
            self._pushing = True
            self._tasks.start(self._push_all(), "identify push")

    async def _push_all(self) -> None:
        try:
            while self._push_due:
                await asyncio.sleep(PUSH_DELAY_S)
                self._push_due = False
                gate = asyncio.Semaphore(MAX_PUSHES)
                async with asyncio.TaskGroup() as group:
                    for wire in tuple(self._wires):
                        group.create_task(self._push(wire, gate))
        finally:
            self._pushing = False

    async def _push(self, wire: Wire, gate: asyncio.Semaphore) -> None:
        try:
            async with gate, asyncio.timeout(IDENTIFY_TIMEOUT_S):
                if not wire.is_open:
                    return
                if identify.PUSH_PROTOCOL not in self._host.book.get(wire.remote).protocols:
                    return
                stream = await self._host.open_on(wire, identify.PUSH_PROTOCOL)
                stream.set_priority(Priority.CONTROL)
                await stream.write(*self._messages(None))
                await stream.close()
        except (TimeoutError, OSError, SwarmError) as exc:
            logger.debug("identify push to %r failed: %s", wire, exc)

    async def _take_push(self, stream: Stream) -> None:
        self._learn(stream.remote, await _read_messages(stream))

    # -- ping --

    async def _answer_ping(self, stream: Stream) -> None:
        stream.set_priority(Priority.CONTROL)
        while True:
            try:
                payload = await stream.read_exactly(ping.SIZE)
            except asyncio.IncompleteReadError:
                return
            await stream.write(payload)

    async def ping(self, peer: PeerId, timeout_s: float) -> float:
        """One round trip through the peer's ping handler, in seconds."""
        host = self._host
        try:
            async with asyncio.timeout(timeout_s):
                stream = await host.open_stream(peer, ping.PROTOCOL, timeout_s=timeout_s)
                stream.set_priority(Priority.CONTROL)
                try:
                    payload = host.rng.randbytes(ping.SIZE)
                    sent = host.clock.now()
                    await stream.write(payload)
                    answer = await stream.read_exactly(ping.SIZE)
                    took = host.clock.now() - sent
                    await stream.close()
                except BaseException:
                    stream.reset()
                    raise
        except TimeoutError:
            raise DeadlineExceeded(f"{peer} did not answer a ping within {timeout_s:g} s") from None
        if answer != payload:
            raise RemoteProtocolError(f"{peer} answered a ping with other bytes")
        return took


async def _read_messages(stream: Stream) -> Identify:
    """What an identify stream says until its end; when it breaks or stalls, what was said before.

    Raises RemoteProtocolError, TimeoutError or OSError when that is nothing.
    """
    incoming = identify.Incoming()
    try:
        async with asyncio.timeout(IDENTIFY_TIMEOUT_S):
            while not incoming.done and (data := await stream.read(_CHUNK)):
                incoming.feed(data)
    except (TimeoutError, OSError):
        if incoming.message is None:
            raise
    if incoming.message is None:
        raise RemoteProtocolError("the peer ended an identify stream without a message")
    return incoming.message


def _is_ours_elsewhere(observed: Multiaddr) -> bool:
    """Whether a reported address can mean us to others too; a relay's cannot, nor one inside a machine."""
    if observed.ip is None:
        return observed.value("memory") is not None and not observed.is_relayed
    return observed.is_tcp and not (observed.is_loopback or observed.is_unspecified)
