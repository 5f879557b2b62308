"""An in-memory network: the same hosts, Noise and yamux, with links made of call_later instead of sockets.

A product module, not a test hack: whole swarms run on it inside one event loop, under a virtual clock, with
seeded latency, bandwidth and failures. Links keep TCP's promises (order, no loss, backpressure, EOF,
reset) unless `weather` breaks them.

    crash    kill -9: the system is alive and resets the links
    vanish   power loss: nobody is told anything
    cut      links reset, dials refused, until heal()
    hold     silence: what is sent waits, dials get no answer, until heal()
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any, Final

from ...protocol.errors import ConfigError
from ...protocol.multiaddr import Multiaddr

HIGH_WATER: Final = 128 * 1024
"""Bytes a link of limited rate may be behind before the writer is paused: the part of TCP_NOTSENT_LOWAT.
What is on its way does not count, so a link without a rate never pauses; the windows of the streams bound
it."""

Factory = Callable[[Multiaddr], asyncio.BufferedProtocol]
Trace = Callable[[float, str, int, int, int], None]
"""(time, what, number of the transport it comes from, of the one it goes to, bytes)."""


class Nat(StrEnum):
    """What stands between a host and the network; tests/lab/nat.py has the same in real namespaces."""

    OPEN = "open"
    """Nothing."""
    FULL = "full"
    """One outside address for what is dialed from the listening port, and anybody may dial that."""
    CONE = "cone"
    """The same, but only for hosts that were dialed from there before."""
    SYMMETRIC = "symmetric"
    """Another outside address for each dial; nobody gets in."""


class MemoryNetwork:
    """A world of links. Give every host its own transport(); all delays come from `latency_s` and `rng`.

    `latency_s` is one way. `rate` is bytes a second per link and direction, None for unlimited. `jitter_s`
    adds up to that much to each delivery, without reordering. `refuse` is the probability that a dial
    fails.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        latency_s: float = 0.0,
        jitter_s: float = 0.0,
        rate: float | None = None,
        refuse: float = 0.0,
    ) -> None:
        self.rng = rng
        self.latency_s = latency_s
        self.jitter_s = jitter_s
        self.rate = rate
        self.refuse = refuse
        self.distance: Callable[[MemoryTransport, MemoryTransport], float] | None = None
        """One-way seconds between two hosts, instead of the constant `latency_s`."""
        self.weather: Callable[[MemoryTransport, MemoryTransport, bytes], Iterable[tuple[float, bytes]]] | None = None
        """What becomes of a write from one host to another: pieces, each with seconds it takes longer. Pieces keep
        their order, so one that is late holds up those behind it, and what is due at once arrives as one."""
        self.trace: Trace | None = None
        """Told of every dial, link, write and end, for logs and for comparing runs."""
        self.dials = 0
        """Dials attempted so far."""
        self._listeners: dict[int, tuple[MemoryTransport, Factory]] = {}
        # dicts where a set would do: their order does not depend on where objects lie in memory
        self._links: dict[_Link, None] = {}
        self._cut: set[frozenset[MemoryTransport]] = set()
        self._held: set[frozenset[MemoryTransport]] = set()
        self._gone: set[MemoryTransport] = set()
        self._unanswered: dict[asyncio.Future[None], None] = {}
        self._outside: dict[int, tuple[MemoryTransport, int]] = {}
        """Outside address -> host behind a NAT, and where it listens."""
        self._next = 1
        self._transports = 0

    def transport(self, *, private: bool = False, nat: Nat | None = None) -> MemoryTransport:
        """A new host's access to the network; `private`: behind the common NAT, dials to it get no answer."""
        self._transports += 1
        return MemoryTransport(self, self._transports, nat or (Nat.CONE if private else Nat.OPEN))

    def crash(self, transport: MemoryTransport) -> None:
        """The process dies, as by kill -9: its listeners close, the other ends of its links see a reset."""
        for number in [n for n, (owner, _) in self._listeners.items() if owner is transport]:
            del self._listeners[number]
        for link in [link for link in self._links if link.owner is transport]:
            link.abort()

    def vanish(self, transport: MemoryTransport) -> None:
        """The machine is gone, as by power loss: nothing leaves it, nothing reaches it, nobody is told. For good."""
        self._gone.add(transport)

    def cut(self, one: MemoryTransport, other: MemoryTransport) -> None:
        """Break the path between two hosts: links reset, new dials fail, until heal()."""
        self._cut.add(frozenset((one, other)))
        for link in self._between(one, other):
            if link.owner is one:
                link.abort()

    def hold(self, one: MemoryTransport, other: MemoryTransport) -> None:
        """Silence the path between two hosts until heal(): TCP keeps what is sent, and dials get no answer."""
        self._held.add(frozenset((one, other)))

    def heal(self, one: MemoryTransport, other: MemoryTransport) -> None:
        """Undo cut() and hold(): what waited goes on its way."""
        self._cut.discard(frozenset((one, other)))
        self._held.discard(frozenset((one, other)))
        for link in self._between(one, other):
            link.healed()
        for waiter in self._unanswered:
            if not waiter.done():
                waiter.set_result(None)

    def silent(self, one: MemoryTransport, other: MemoryTransport) -> bool:
        """Whether nothing passes between two hosts, and nobody is told."""
        return frozenset((one, other)) in self._held or one in self._gone or other in self._gone

    def _between(self, one: MemoryTransport, other: MemoryTransport) -> list[_Link]:
        return [link for link in self._links if {link.owner, link.peer.owner} == {one, other}]

    def note(self, what: str, source: MemoryTransport, target: MemoryTransport, size: int = 0) -> None:
        """Tell the trace."""
        if self.trace is not None:
            self.trace(asyncio.get_running_loop().time(), what, source.number, target.number, size)

    def delay(self, source: MemoryTransport, target: MemoryTransport) -> float:
        """One-way seconds between two hosts."""
        return self.latency_s if self.distance is None else self.distance(source, target)

    def number(self) -> int:
        """An address nobody uses."""
        while self._next in self._listeners or self._next in self._outside:
            self._next += 1
        self._next += 1
        return self._next - 1

    def bind(self, number: int, owner: MemoryTransport, factory: Factory) -> None:
        """Listen on /memory/<number>. Raises ConfigError when it is taken."""
        if number in self._listeners:
            raise ConfigError(f"cannot listen on /memory/{number}: it is in use; choose another, or memory/0")
        self._listeners[number] = (owner, factory)

    def unbind(self, number: int) -> None:
        """Stop listening."""
        self._listeners.pop(number, None)
        self._outside = {outer: inner for outer, inner in self._outside.items() if inner[1] != number}

    def _listening(self, owner: MemoryTransport) -> int | None:
        return next((number for number, (other, _) in self._listeners.items() if other is owner), None)

    def _shown(self, source: MemoryTransport, from_listener: bool) -> int:
        """The address that a dialed host sees. Raises OSError."""
        if not from_listener or source.nat is Nat.SYMMETRIC:
            return self.number()
        inner = self._listening(source)
        if inner is None:
            raise OSError(errno.EADDRNOTAVAIL, "no listening address to dial from")
        if source.nat is Nat.OPEN:
            return inner
        outer = next((outer for outer, known in self._outside.items() if known == (source, inner)), None)
        if outer is None:
            outer = self.number()
            self._outside[outer] = source, inner
        return outer

    async def connect(
        self, source: MemoryTransport, address: Multiaddr, factory: Factory, *, from_listener: bool = False
    ) -> None:
        """Make a link, one round trip later. Raises OSError."""
        self.dials += 1
        number = outer = int(address.value("memory") or 0)
        if outer in self._outside:
            number = self._outside[outer][1]
        owner = self._listeners[number][0] if number in self._listeners else source
        shown = self._shown(source, from_listener)
        if from_listener:
            source.dialed.add(owner)
        self.note("dial", source, owner)
        await asyncio.sleep(2 * self.delay(source, owner))
        await self._answered(source, owner, through=outer in self._outside)
        found = self._listeners.get(number)
        if found is None or frozenset((source, found[0])) in self._cut:
            raise ConnectionRefusedError("connection refused")
        if self.refuse and self.rng.random() < self.refuse:
            raise ConnectionRefusedError("connection lost on the way")
        target, accept = found
        self.note("link", source, target)
        here, there = _Link(self, source), _Link(self, target)
        here.peer, there.peer = there, here
        self._links[here] = self._links[there] = None
        there.start(accept(Multiaddr((("memory", str(shown)),))))
        here.start(factory(address))

    async def _answered(self, source: MemoryTransport, target: MemoryTransport, *, through: bool) -> None:
        """Wait for the first answer to a dial; for ever, if the target cannot be reached. `through`: its NAT."""
        while not (source is target or target.lets_in(source, through)) or self.silent(source, target):
            waiter = asyncio.get_running_loop().create_future()
            self._unanswered[waiter] = None
            try:
                await waiter
            finally:
                del self._unanswered[waiter]

    def forget(self, link: _Link) -> None:
        """A link is over."""
        self._links.pop(link, None)

    def remember(self, link: _Link) -> None:
        """A link that is over has its reset still to tell, when the path heals."""
        self._links[link] = None


class MemoryTransport:
    """One host's access to a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, number: int, nat: Nat) -> None:
        self.network = network
        self.number = number
        """Which of the network's transports it is, from 1."""
        self.nat = nat
        """What stands in front of it."""
        self.dialed: set[MemoryTransport] = set()
        """Whom it has dialed from where it listens."""

    @property
    def private(self) -> bool:
        """Dials to where it listens get no answer; it can dial."""
        return self.nat is not Nat.OPEN

    def lets_in(self, source: MemoryTransport, through: bool) -> bool:
        """Whether a dial gets to it: to its outside address, or to where it listens."""
        if not through:
            return self.nat is Nat.OPEN
        return self.nat is Nat.FULL or (self.nat is Nat.CONE and source in self.dialed)

    def can_dial(self, address: Multiaddr) -> bool:
        """Memory addresses only, without a relay."""
        return address.value("memory") is not None and not address.is_relayed

    def can_listen(self, address: Multiaddr) -> bool:
        """Memory addresses only, without a relay."""
        return address.value("memory") is not None and not address.is_relayed

    async def resolve(self, address: Multiaddr) -> Sequence[Multiaddr]:
        """There are no names here."""
        return (address,)

    async def dial(
        self, address: Multiaddr, factory: Factory, *, bulk: bool = False, from_listener: bool = False
    ) -> None:
        """Make a link. Raises OSError."""
        await self.network.connect(self, address.without_peer(), factory, from_listener=from_listener)

    async def listen(self, address: Multiaddr, factory: Factory) -> MemoryListener:
        """Listen; /memory/0 takes a free number. Raises ConfigError."""
        number = int(address.value("memory") or 0) or self.network.number()
        self.network.bind(number, self, factory)
        return MemoryListener(self.network, number)


class MemoryListener:
    """An open listening address."""

    def __init__(self, network: MemoryNetwork, number: int) -> None:
        self._network = network
        self._number = number
        self.address = Multiaddr((("memory", str(number)),))
        """What is really bound."""

    async def aclose(self) -> None:
        """Stop accepting."""
        self._network.unbind(self._number)


class _Link(asyncio.Transport):
    """One end of a link. What is written is queued with its time of arrival; one timer serves the queue."""

    peer: _Link

    def __init__(self, network: MemoryNetwork, owner: MemoryTransport) -> None:
        super().__init__()
        self.owner = owner
        self._network = network
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.BufferedProtocol | None = None
        self._queue: deque[tuple[float, bytes]] = deque()
        self._in_flight = 0
        self._free_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._closing = False
        self._over = False
        self._reset_due = False  # the other side has not heard of our abort() yet

    def start(self, protocol: asyncio.BufferedProtocol) -> None:
        """Give the protocol its link, soon."""
        self._protocol = protocol
        self._loop.call_soon(self._made)

    def _made(self) -> None:
        if self._protocol is not None and not self._over:
            self._protocol.connection_made(self)

    # -- asyncio.Transport --

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Nothing is known about a link in memory."""
        return default

    def is_closing(self) -> bool:
        """close() or abort() was called."""
        return self._closing or self._over

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is buffered in front of the link; see HIGH_WATER."""

    def get_write_buffer_size(self) -> int:
        """Bytes in flight."""
        return self._in_flight

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes on their way."""
        if self._closing or self._over:
            return
        network = self._network
        network.note("data", self.owner, self.peer.owner, len(data))
        if network.weather is None:
            self._send(bytes(data), 0.0)
        else:
            for extra, piece in network.weather(self.owner, self.peer.owner, bytes(data)):
                self._send(piece, extra)
        rate = self._network.rate
        behind = self._free_at - self._loop.time()
        if rate and behind * rate > HIGH_WATER and not self._paused and self._protocol is not None:
            self._paused = True
            self._loop.call_later(behind - HIGH_WATER / 2 / rate, self._resume)
            self._protocol.pause_writing()

    def _resume(self) -> None:
        self._paused = False
        if self._protocol is not None and not self._over:
            self._protocol.resume_writing()

    def close(self) -> None:
        """Flush, then end."""
        if not self.is_closing():
            self._closing = True
            self._arm()

    def abort(self) -> None:
        """End at once; the other side sees a reset after the link's latency."""
        if not self._over:
            self._queue.clear()
            self._network.note("reset", self.owner, self.peer.owner)
            self._end(None)
            if self._silent():
                self._reset_due = True
                self._network.remember(self)
            else:
                self._loop.call_later(self._delay(), self.peer.broken)

    def healed(self) -> None:
        """The path lets bytes through again: what waited goes, and takes the path's time."""
        if self._silent():
            return
        if self._reset_due:
            self._reset_due = False
            self._network.forget(self)
            self._loop.call_later(self._delay(), self.peer.broken)
        elif self._queue or self._closing:
            soonest = self._loop.time() + self._delay()
            self._queue = deque((max(when, soonest), data) for when, data in self._queue)
            self._arm()

    # -- the link --

    def _delay(self) -> float:
        return self._network.delay(self.owner, self.peer.owner)

    def _silent(self) -> bool:
        return self._network.silent(self.owner, self.peer.owner)

    def _send(self, data: bytes, extra: float) -> None:
        network = self._network
        now = self._loop.time()
        start = max(now, self._free_at)
        self._free_at = start + (len(data) / network.rate if network.rate else 0.0)
        arrival = self._free_at + self._delay() + extra
        if network.jitter_s:
            arrival += network.rng.random() * network.jitter_s
        if self._queue:
            arrival = max(arrival, self._queue[-1][0])
        self._in_flight += len(data)
        self._queue.append((arrival, data))
        self._arm()

    def _arm(self) -> None:
        if self._timer is None and not self._over and not self._silent():
            when = self._queue[0][0] if self._queue else self._loop.time() + self._delay()
            self._timer = self._loop.call_at(when, self._deliver)

    def _deliver(self) -> None:
        self._timer = None
        if self._silent():
            return
        now = self._loop.time()
        due = []
        while self._queue and self._queue[0][0] <= now:
            due.append(self._queue.popleft()[1])
        data = due[0] if len(due) == 1 else b"".join(due)
        self._in_flight -= len(data)
        self.peer.arrived(data)
        if self._queue:
            self._arm()
        elif self._closing and not self._over:
            self._network.note("end", self.owner, self.peer.owner)
            self._end(None)
            self.peer.ended()

    def arrived(self, data: bytes) -> None:
        """Bytes from the other end."""
        view = memoryview(data)
        while view and self._protocol is not None and not self.is_closing():
            buffer = memoryview(self._protocol.get_buffer(len(view)))
            size = min(len(buffer), len(view))
            buffer[:size] = view[:size]
            self._protocol.buffer_updated(size)
            view = view[size:]

    def ended(self) -> None:
        """The other end closed."""
        if self._over:
            return
        if self._protocol is not None and not self._closing:
            self._protocol.eof_received()
        self._queue.clear()
        self._end(None)

    def broken(self) -> None:
        """The other end vanished."""
        if not self._over:
            self._queue.clear()
            self._end(ConnectionResetError("connection reset by peer"))

    def _end(self, exc: Exception | None) -> None:
        self._over = True
        self._network.forget(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, exc)
