"""Keeps places at relays: finds relays, chooses by round trip and network, renews ahead of the end, replaces the dead.

What it holds is announced (Host.advertise) as long as it is held, not longer: a relay's death is seen by its
connection's, at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final

from ...protocol.errors import SwarmError
from ...protocol.ids import PeerId
from ...protocol.multiaddr import Multiaddr
from ...protocol.relay import HOP
from ...routing.bans import BackOff
from ...routing.relays import RelayCandidate, choose
from ...routing.table import Contact, subnet_of
from ..host import Host
from .circuits import Place

logger = logging.getLogger(__name__)

MAX_PLACES: Final = 4
"""Places held at once; one is enough to be found, a second one for when it dies."""
RENEW_AT: Final = 0.5
"""Part of a place's life after which it is renewed, and up to RENEW_SPREAD more, so that nodes do not come together."""
RENEW_SPREAD: Final = 0.2
RETRY_S: Final = 5.0
"""Pause between looks for a relay when there are too few, and between tries to renew."""
FIND_S: Final = 30.0
"""Pause between searches in the DHT."""
MEET_S: Final = 3.0
"""How long a relay heard of may take to be met."""
MAX_MET: Final = 8
"""Relays heard of that are met in one look."""
PING_S: Final = 1.0
ADVERTISED: Final = "relay"

Find = Callable[[], Awaitable[Iterable[Contact]]]


class Turn(StrEnum):
    """What happened to a place."""

    GAINED = "gained"
    RENEWED = "renewed"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class PlaceEvent:
    """Something happened to a place at a relay."""

    turn: Turn
    place: Place


class Keeper:
    """Holds as many places as wanted. Run it in a task."""

    def __init__(self, host: Host, *, rng: Random, named: Sequence[Multiaddr] = (), find: Find | None = None) -> None:
        self._host = host
        self._rng = rng
        self._now = host.clock.now
        self._named = {addr.peer_id: addr.without_peer() for addr in named if addr.peer_id is not None}
        self._find = find
        self._wanted = 0
        self._renew_at: dict[PeerId, float] = {}
        self._networks: dict[PeerId, object] = {}
        self._failures = BackOff(rng, base_s=RETRY_S)
        self._found_at = -FIND_S
        self._heard: dict[PeerId, tuple[Multiaddr, ...]] = {}
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self.on_change: list[Callable[[PlaceEvent], None]] = []
        """Told of every place gained, renewed and lost."""

    @property
    def places(self) -> tuple[Place, ...]:
        """The places held now."""
        return self._host.circuits.places

    def want(self, count: int) -> None:
        """Hold so many places from now on, at most MAX_PLACES; with 0 those held are given up."""
        self._wanted = min(count, MAX_PLACES)
        self._settled.clear()
        self._wake.set()

    async def settled(self) -> None:
        """Wait until as many places are held as wanted, or all known relays were asked for one."""
        await self._settled.wait()

    async def run(self) -> None:
        """Until cancelled; then every place is given up."""
        circuits = self._host.circuits
        circuits.on_lost.append(self._lost)
        unlisten = self._host.on_identify(self._identified)
        try:
            while True:
                self._wake.clear()
                await self._look()
                await self._sleep()
        finally:
            unlisten()
            circuits.on_lost.remove(self._lost)
            self._keep_at_most(0)

    def _identified(self, peer: PeerId) -> None:
        if len(self.places) < self._wanted and HOP in self._host.book.get(peer).protocols:
            self._wake.set()

    async def _sleep(self) -> None:
        due = min(self._renew_at.values(), default=float("inf"))
        if len(self.places) < self._wanted:
            due = min(due, self._now() + RETRY_S)
        try:
            async with asyncio.timeout(None if due == float("inf") else max(0.0, due - self._now())):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _look(self) -> None:
        self._keep_at_most(self._wanted)
        for relay, at in tuple(self._renew_at.items()):
            if self._now() >= at:
                await self._renew(relay)
        if len(self.places) < self._wanted:
            await self._fill()
        self._settled.set()

    # -- places --

    def _keep_at_most(self, count: int) -> None:
        for place in self.places[count:]:
            self._host.circuits.give_up(place.relay)
            self._lost(place)

    async def _reserve(self, relay: PeerId, addrs: Sequence[Multiaddr]) -> bool:
        before = any(place.relay == relay for place in self.places)
        try:
            place = await self._host.circuits.reserve(relay, addrs)
        except (OSError, SwarmError) as exc:
            logger.info("no place at relay %s: %s", relay.short, exc)
            self._failures.failed(relay, self._now())
            return False
        self._failures.succeeded(relay)
        life_s = place.expires - self._now()
        self._renew_at[relay] = self._now() + life_s * (RENEW_AT + RENEW_SPREAD * self._rng.random())
        wire = self._host.direct_wire(relay)
        self._networks[relay] = self._network(relay, wire.address if wire else None)
        if not before:
            logger.info("relay %s: others reach this node at %s", relay.short, ", ".join(map(str, place.addrs)))
        self._tell(PlaceEvent(Turn.RENEWED if before else Turn.GAINED, place))
        return True

    async def _renew(self, relay: PeerId) -> None:
        place = next((place for place in self.places if place.relay == relay), None)
        if place is None:
            self._renew_at.pop(relay, None)
        elif not await self._reserve(relay, ()) and relay in self._renew_at:
            self._renew_at[relay] = self._now() + RETRY_S
            if self._now() >= place.expires:
                self._host.circuits.give_up(relay)
                self._lost(place)

    def _lost(self, place: Place) -> None:
        self._renew_at.pop(place.relay, None)
        self._networks.pop(place.relay, None)
        if self._wanted:
            logger.info("the place at relay %s is gone", place.relay.short)
            self._failures.failed(place.relay, self._now())
        self._tell(PlaceEvent(Turn.LOST, place))
        self._wake.set()

    def _tell(self, event: PlaceEvent) -> None:
        self._host.advertise(ADVERTISED, [addr for place in self.places for addr in place.addrs])
        for callback in tuple(self.on_change):
            callback(event)

    # -- relays --

    async def _fill(self) -> None:
        for candidate in choose(await self._candidates(), list(self._networks.values())):
            if len(self.places) >= self._wanted:
                return
            addrs = self._heard.get(candidate.peer, ())
            if candidate.named:
                addrs = (self._named[candidate.peer], *addrs)
            await self._reserve(candidate.peer, addrs)

    async def _candidates(self) -> list[RelayCandidate]:
        held = {place.relay for place in self.places}
        named = [peer for peer in self._named if self._may_ask(peer, held)]
        known = [peer for peer in self._host.peers() if self._may_ask(peer, held) and self._relays(peer)]
        if len({*named, *known}) < self._wanted - len(held):
            await self._meet_others(held)
            known = [peer for peer in self._host.peers() if self._may_ask(peer, held) and self._relays(peer)]
        rtts = await asyncio.gather(*(self._rtt(peer) for peer in known))
        found = {peer: self._candidate(peer, rtt, named=False) for peer, rtt in zip(known, rtts, strict=True)}
        for peer in named:
            found[peer] = self._candidate(peer, self._host.rtt(peer), named=True)
        return list(found.values())

    def _may_ask(self, peer: PeerId, held: set[PeerId]) -> bool:
        return peer not in held and peer != self._host.peer_id and not self._failures.avoided(peer, self._now())

    def _relays(self, peer: PeerId) -> bool:
        return HOP in self._host.book.get(peer).protocols and self._host.direct_wire(peer) is not None

    def _candidate(self, peer: PeerId, rtt_s: float | None, *, named: bool) -> RelayCandidate:
        wire = self._host.direct_wire(peer)
        address = wire.address if wire is not None else self._named.get(peer)
        return RelayCandidate(peer=peer, rtt_s=rtt_s, network=self._network(peer, address), named=named)

    @staticmethod
    def _network(peer: PeerId, address: Multiaddr | None) -> object:
        return subnet_of(address) or peer

    async def _rtt(self, peer: PeerId) -> float | None:
        known = self._host.rtt(peer)
        if known is not None:
            return known
        try:
            return await self._host.ping(peer, timeout_s=PING_S)
        except (OSError, SwarmError):
            return None

    async def _meet_others(self, held: set[PeerId]) -> None:
        """Search the DHT for relays, and get to know some of them."""
        if self._find is None or self._now() - self._found_at < FIND_S:
            return
        self._found_at = self._now()
        try:
            contacts = [contact for contact in await self._find() if self._may_ask(contact.peer, held)]
        except SwarmError as exc:
            logger.debug("no relays found: %s", exc)
            return
        self._heard = {contact.peer: contact.addrs for contact in contacts}
        strangers = [contact for contact in contacts if self._host.direct_wire(contact.peer) is None][:MAX_MET]
        await asyncio.gather(*(self._meet(contact) for contact in strangers))

    async def _meet(self, contact: Contact) -> None:
        """Connect, and hear what it speaks."""
        heard = asyncio.Event()
        unlisten = self._host.on_identify(lambda peer: heard.set() if peer == contact.peer else None)
        try:
            async with asyncio.timeout(MEET_S):
                await self._host.connect(contact.peer, contact.addrs, timeout_s=MEET_S, direct=True)
                if not self._host.book.get(contact.peer).protocols:
                    await heard.wait()
        except (TimeoutError, OSError, SwarmError) as exc:
            logger.debug("relay %s cannot be met: %s", contact.peer.short, exc)
            self._failures.failed(contact.peer, self._now())
        finally:
            unlisten()
