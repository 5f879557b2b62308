"""Finding peers and what they say: carries out the DHT machine's actions over a host's streams.

All decisions are in routing/dht.py, the asking side's streams in exchanges.py; this file sets the alarm, answers, wakes
who waits and finds the way in. Everything works before run() and without any peer, at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from math import ceil
from random import Random
from typing import Any, Final

from ..protocol.errors import PeerUnreachable, RemoteProtocolError, SessionClosed, SwarmError
from ..protocol.ids import PeerId
from ..protocol.kad import MAIN_SWARM, UNANSWERED, protocol_of
from ..protocol.multiaddr import Multiaddr
from ..protocol.records import SignedEntry
from ..routing.actions import Ask, Finished
from ..routing.contents import Contents
from ..routing.coordinates import Coordinate
from ..routing.dht import Dht
from ..routing.keys import blocks_key, models_key
from ..routing.parameters import DhtConfig
from ..routing.table import Contact
from .clock import Clock
from .exchanges import Exchanges, Line
from .host import Host
from .tasks import Supervisor
from .transport.base import ProtocolUnsupported, Stream

logger = logging.getLogger(__name__)

DEFAULT_TTL_S: Final = 100.0
"""Two republications and a half: one may be lost."""
SERVE_IDLE_S: Final = 60.0
"""A peer's silent stream is closed after this."""
MAX_SERVED_STREAMS: Final = 1024
MAX_SERVED_PER_PEER: Final = 32
CROWDED: Final = 6.0
"""So many times denser than around ourselves is no chance."""
REJOIN_FIRST_S: Final = 5.0
REJOIN_CAP_S: Final = 60.0
ISLAND_CAP_S: Final = 600.0
"""The same for who knows peers, but none of those it was to enter through: they may be a swarm without the others."""
MAX_MET: Final = 64
"""Nodes kept as ways back into the swarm."""
MAX_NEWCOMERS: Final = 64
"""Peers that just said they speak our protocol, and will be asked whether they answer."""
GREET_AFTER_S: Final = 0.3
"""Our own servers name themselves in their first question, which has come by then: no need to ask them."""
LEAVE_S: Final = 1.0
"""Longest wait for tombstones to be taken when leaving."""


class Discovery:
    """A node's view of the swarm. In client mode it asks but is never asked: for nodes others cannot dial."""

    def __init__(
        self,
        host: Host,
        *,
        clock: Clock,
        rng: Random,
        swarm_name: str = MAIN_SWARM,
        server_mode: bool = True,
        config: DhtConfig | None = None,
    ) -> None:
        self._host = host
        self._clock = clock
        self._swarm_name = swarm_name
        self._protocol = protocol_of(swarm_name)
        self.dht = Dht(host.key, rng=rng, now=clock.now(), config=config, server_mode=server_mode)
        """The machine; for tests and status pages."""
        self.contents = Contents(self.dht, rng)
        """Its part for libp2p's values and providers."""
        self._tasks: Supervisor | None = None
        self._unsent: list[Ask] = []
        self._waiting: dict[int, list[asyncio.Future[Finished]]] = {}
        self._exchanges = Exchanges(host, clock, self._protocol)
        self._serving = 0
        self._alarm = asyncio.Event()
        self._closed = False
        self._entrances: tuple[Multiaddr, ...] = ()
        self._met: OrderedDict[PeerId, tuple[Multiaddr, ...]] = OrderedDict()
        self._newcomers: set[PeerId] = set()
        self._greet_at = float("inf")
        self._rejoin_wait_s = REJOIN_FIRST_S
        self._rejoin_at = float("inf")
        self.serve(server_mode)

    # What the node calls

    def serve(self, yes: bool) -> None:
        """Answer others' look-ups, and be in their tables; or only ask, for others cannot dial us."""
        self.dht.server_mode = yes
        if yes:
            self._host.handle(self._protocol, self._serve, max_streams_per_peer=MAX_SERVED_PER_PEER)
        else:
            self._host.unhandle(self._protocol)

    async def run(self) -> None:
        """Keep the table, our announcements and hot keys fresh, until cancelled. Run once, in a supervisor."""
        unsubscribe = self._host.on_disconnect(self._disconnected)
        unprotect = self._host.protect_if(self.dht.table.__contains__)
        unlisten = self._host.on_identify(self._identified)
        try:
            async with Supervisor("discovery") as tasks:
                self._tasks = tasks
                while True:
                    self._tick()
                    await self._until(min(self.dht.next_timer(), self._rejoin_at, self._greet_at))
        finally:
            self._tasks = None
            self._close()
            unsubscribe()
            unprotect()
            unlisten()

    async def bootstrap(self, addrs: Sequence[Multiaddr]) -> int:
        """Join the swarm through any of its live nodes; returns how many peers are known then.

        The addresses are kept: a node that finds itself alone later tries them again. Raises PeerUnreachable, naming
        each address and cause, when none of them answers.
        """
        self._entrances = tuple(dict.fromkeys((*self._entrances, *addrs)))
        self._rejoin_at = self._clock.now() + self._rejoin_wait_s
        if not addrs:
            return len(self.dht.table)
        try:
            return await self._join(addrs)
        finally:
            self._alarm.set()

    async def publish(
        self, key: bytes, payload: bytes, ttl_s: float = DEFAULT_TTL_S, *, paths: int | None = None
    ) -> int:
        """Announce a payload under a key, now and every 40 s until withdraw(). Returns how many peers hold it.

        It is held here too, so 0 is no error in a swarm of one. Raises LocalProtocolError for a payload over 1000
        bytes or a ttl over 600 s. `paths` > 1 looks for holders over disjoint paths, against many liars. Cancelling
        only stops the waiting.
        """
        now, wall = self._times()
        result = await self._result(self.dht.publish(key, payload, ceil(ttl_s), now, wall, paths=paths))
        if result.crowding > CROWDED:
            logger.warning("%d times more peers than elsewhere sit around a key: made to sit there?", result.crowding)
        return result.holders

    async def withdraw(self, key: bytes) -> None:
        """Take back what we announced under a key: put a tombstone there. Nothing happens if there is nothing."""
        query = self.dht.withdraw(key, *self._times())
        if query is not None:
            await self._result(query)

    async def leave(self) -> None:
        """Withdraw everything, within a second at most. For a graceful end, before run() is cancelled."""
        try:
            async with asyncio.timeout(LEAVE_S), asyncio.TaskGroup() as group:
                for key in self.dht.published:
                    group.create_task(self.withdraw(key))
        except TimeoutError:
            logger.debug("left before every tombstone was taken")

    async def lookup(self, key: bytes, *, fresh: bool = False, paths: int | None = None) -> list[SignedEntry]:
        """The verified, live, newest entry of each signer under a key, in order of signer.

        A key used often is answered from memory, at most 20 s old; `fresh` always asks the holders. Lookups of one
        key at the same time share one search; `paths` is that of publish().
        """
        now = self._clock.now()
        if not fresh and (recent := self.dht.recent(key, now)) is not None:
            return recent
        result = await self._result(self.dht.read(key, now, paths=paths))
        if result.untimely > len(result.entries):
            logger.warning("%d records found are not valid by this machine's clock; is it right?", result.untimely)
        return list(result.entries)

    async def put_value(self, key: bytes, value: bytes) -> int:
        """Keep a value at the peers nearest to its key, for 36 hours. Returns how many peers have it.

        Only values that their key proves are kept by anybody: `/pk/` and a peer id, its public key. Raises
        LocalProtocolError for others.
        """
        return (await self._result(self.contents.put_value(key, value, self._clock.now()))).holders

    async def get_value(self, key: bytes) -> bytes | None:
        """The proven value of a key; None when none of the peers near it has one."""
        record = (await self._result(self.contents.get_value(key, self._clock.now()))).record
        return None if record is None else record.value

    async def provide(self, key: bytes) -> int:
        """Tell the swarm that this node has what a key names, now and every ten minutes until stop_providing().

        A key is a multihash: see content_key(). Returns how many peers were told; they do not confirm it, and
        remember it for 2 h. Raises LocalProtocolError for over 1024 keys.
        """
        return (await self._result(self.contents.provide(key, self._clock.now()))).holders

    def stop_providing(self, key: bytes) -> None:
        """Provide a key no longer. Others may name this node for up to 2 h more."""
        self.contents.withdraw(key)

    async def providers(self, key: bytes) -> list[Contact]:
        """Who is said to have what a key names; those named by more peers first. Some may be gone, or invented."""
        return list((await self._result(self.contents.find_providers(key, self._clock.now()))).providers)

    @property
    def coordinate(self) -> Coordinate | None:
        """Where this node is in the network, to predict round trips; None while it has hardly measured any."""
        return self.dht.whereabouts.coordinate

    async def find_peer(self, peer: PeerId) -> Contact | None:
        """Where a server listens, asked from the peers near its id; None when nobody knows."""
        known = self.dht.table.get(peer)
        if known is not None:
            return known
        found = await self._result(self.dht.locate(peer.raw, self._clock.now()))
        return next((contact for contact in found.contacts if contact.peer == peer), None)

    def peers(self) -> tuple[Contact, ...]:
        """The servers in the routing table."""
        return tuple(self.dht.table)

    def met(self) -> tuple[Multiaddr, ...]:
        """Where servers of this swarm were met, each with /p2p/<id>, the last met first: ways back into it."""
        for contact in self.dht.table:
            self._met[contact.peer] = contact.addrs
            self._met.move_to_end(contact.peer)
        while len(self._met) > MAX_MET:
            self._met.popitem(last=False)
        return tuple(addr.with_peer(peer) for peer, addrs in reversed(self._met.items()) for addr in addrs)

    def models_key(self) -> bytes:
        """Key of this swarm's list of models."""
        return models_key(self._swarm_name)

    def blocks_key(self, digest: bytes, group: int) -> bytes:
        """Key of a group of 16 blocks of a model in this swarm."""
        return blocks_key(self._swarm_name, digest, group)

    # The machine's actions

    def _times(self) -> tuple[float, float]:
        return self._clock.now(), self._clock.wall()

    def _tick(self) -> None:
        now, wall = self._times()
        self.dht.addrs = self._host.listen_addrs
        if now >= self._greet_at:
            self._greet_newcomers(now)
        self.dht.whereabouts.measure(self._host.rtt, now)
        self.dht.tick(now, wall)
        self.contents.tick(now)
        for stream in self._exchanges.take_overdue(now):
            self._start(stream.close(), "close an idle stream")
        if now >= self._rejoin_at:
            self.met()
            self._rejoin(now)
        self._pump()

    def _pump(self) -> None:
        """Carry out what the machine wants. Without run() questions wait; results never do."""
        for action in self.dht.actions():
            if isinstance(action, Finished):
                for future in self._waiting.pop(action.query, ()):
                    if not future.done():
                        future.set_result(action)
            else:
                self._unsent.append(action)
        if self._tasks is not None:
            asks, self._unsent = self._unsent, []
            for ask in asks:
                self._start(self._ask(ask), f"ask {ask.contact.peer.short}")
        self._alarm.set()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        if self._tasks is None:
            work.close()
        else:
            self._tasks.start(work, name)

    async def _until(self, when: float) -> None:
        """Sleep until a time just computed, or until the machine may have an earlier timer."""
        self._alarm.clear()
        try:
            async with asyncio.timeout(max(0.0, when - self._clock.now())):
                await self._alarm.wait()
        except TimeoutError:
            pass

    async def _result(self, query: int) -> Finished:
        """What a query just started comes to; nothing may be awaited in between, or the result would be missed."""
        return (await self._results([query]))[0]

    async def _results(self, queries: Sequence[int]) -> list[Finished]:
        if self._closed:
            raise SessionClosed("the node has left the swarm; start a new one to look things up")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Finished]] = [loop.create_future() for _ in queries]
        for query, future in zip(queries, futures, strict=True):
            self._waiting.setdefault(query, []).append(future)
        self._pump()
        return await asyncio.gather(*futures)

    def _close(self) -> None:
        self._closed = True
        for futures in self._waiting.values():
            for future in futures:
                if not future.done():
                    future.set_exception(SessionClosed("the node is leaving the swarm"))
        self._waiting.clear()
        self._exchanges.close()

    # Asking

    async def _ask(self, ask: Ask) -> None:
        peer = ask.contact.peer
        try:
            async with asyncio.timeout(ask.limit_s):
                reply, seen, took_s = await self._exchanges.ask(ask.contact, ask.request)
        except (OSError, SwarmError) as exc:  # TimeoutError is an OSError
            now = self._clock.now()
            if isinstance(exc, RemoteProtocolError):
                self.dht.misbehaved(peer, now)
            logger.debug("no DHT answer from %s: %s", peer.short, exc or type(exc).__name__)
            self.dht.on_failure(ask.id, now)
        else:
            if reply is None:
                self.dht.on_sent(ask.id, self._clock.now())
            else:
                self.dht.on_reply(ask.id, seen, reply, *self._times(), self._host.rtt(peer) or took_s)
        self._pump()

    def _identified(self, peer: PeerId) -> None:
        """Servers of other implementations do not name themselves in requests: their identify does."""
        if self._protocol in self._host.book.get(peer).protocols and len(self._newcomers) < MAX_NEWCOMERS:
            self._newcomers.add(peer)
            self._greet_at = min(self._greet_at, self._clock.now() + GREET_AFTER_S)
            self._alarm.set()

    def _greet_newcomers(self, now: float) -> None:
        newcomers, self._newcomers, self._greet_at = self._newcomers, set(), float("inf")
        for peer in sorted(newcomers):
            if addrs := self._host.addrs(peer):
                self.dht.greet(Contact(peer, addrs), now)

    def _disconnected(self, peer: PeerId) -> None:
        self._exchanges.forget(peer)
        self.dht.disconnected(peer)

    # Answering

    async def _serve(self, stream: Stream) -> None:
        """Answer one peer's requests, one after another, until it ends the stream. The host handles what is raised."""
        if self._serving >= MAX_SERVED_STREAMS:
            raise RemoteProtocolError(f"over {MAX_SERVED_STREAMS} streams ask the DHT")
        self._serving += 1
        try:
            await self._answer_all(Line(stream), self._host.address_of(stream))
        finally:
            self._serving -= 1

    async def _answer_all(self, line: Line, seen: Multiaddr | None) -> None:
        while True:
            async with asyncio.timeout(SERVE_IDLE_S):
                request = await line.receive()
            if request is None:
                return
            reply = self.dht.handle(line.stream.remote, seen, request, *self._times())
            if request.type not in UNANSWERED:
                async with asyncio.timeout(SERVE_IDLE_S):
                    await line.send(reply)
            self._pump()

    # Joining

    async def _join(self, addrs: Sequence[Multiaddr]) -> int:
        causes: list[str] = []
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._enter(addr, causes)) for addr in addrs]
        seeds = [contact for task in tasks if (contact := task.result()) is not None]
        if not seeds:
            raise PeerUnreachable("; ".join(causes))
        self.dht.addrs = self._host.listen_addrs
        now = self._clock.now()
        await self._result(self.dht.locate(self._host.peer_id.raw, now, seeds=seeds))
        await self._results(self.dht.refresh(self._clock.now()))
        return len(self.dht.table)

    async def _enter(self, addr: Multiaddr, causes: list[str]) -> Contact | None:
        """Get in touch with a node's DHT; the stream is kept for the first question. None: `causes` says why not."""
        try:
            peer = await self._host.connect(addr.peer_id, [addr])
            if peer == self._host.peer_id:
                causes.append(f"{addr} is this node itself")
                return None
            await self._exchanges.open(peer)
        except ProtocolUnsupported:
            causes.append(f"{addr} is in another swarm than {self._swarm_name!r}: check --swarm")
            return None
        except (OSError, SwarmError) as exc:
            causes.append(str(exc))
            return None
        return Contact(peer, (addr.without_peer(),))

    def _rejoin(self, now: float) -> None:
        """Alone, or with nobody of those we were to enter through: try the ways in again, less and less often."""
        known = {contact.peer for contact in self.dht.table}
        if known and (not self._entrances or any(addr.peer_id in known for addr in self._entrances)):
            self._rejoin_wait_s = REJOIN_FIRST_S
        else:
            self._rejoin_wait_s = min(ISLAND_CAP_S if known else REJOIN_CAP_S, 2 * self._rejoin_wait_s)
            ways = self._entrances if known else tuple(dict.fromkeys((*self._entrances, *self.met())))
            self._start(self._rejoin_quietly(ways), "rejoin")
        self._rejoin_at = now + self._rejoin_wait_s

    async def _rejoin_quietly(self, ways: Sequence[Multiaddr]) -> None:
        try:
            count = await self._join(ways)
        except PeerUnreachable as exc:
            logger.debug("no way in: %s", exc)
        else:
            logger.info("back in the swarm: %d peers", count)
