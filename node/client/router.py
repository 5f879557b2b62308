"""Where a client's chains go: the swarm as this node sees it, what it has measured, whom it avoids.

Planning itself is routing/planner.py; this gathers what it needs (announcements from the DHT, round trips to servers
never met) and keeps it warm, so that a repair plans from memory and waits for no look-up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from ...protocol.errors import NoRoute, ProtocolError, SwarmError
from ...protocol.ids import PeerId
from ...protocol.records import SignedEntry
from ...routing.announce import Announcement, ModelListing, State
from ...routing.bans import BackOff
from ...routing.keys import blocks_key, groups_of_span, models_key
from ...routing.metrics import Metrics
from ...routing.planner import Hop, Plan, PlanRequest, plan
from ...routing.repair import Repair, plan_repair
from ...routing.swarm import SwarmView
from ..clock import Clock
from ..discovery import Discovery
from ..host import Host

logger = logging.getLogger(__name__)

MEASURE_ALL: Final = 24
"""In a swarm of up to this many servers, all are measured before the first plan; in a larger one, those it chose."""
MEASURE_S: Final = 1.0
PINGS: Final = 4
"""The best of so many round trips counts."""
VIEW_S: Final = 10.0
"""A view older than this is looked up again before a new chain is planned."""
SLOW_LINK: Final = 50e6
"""Bytes a second (400 Mbit/s): below it, halving a frame saves more time than the codec costs."""
LAN_RTT_S: Final = 0.005
"""A link not measured otherwise is taken for slow when its round trip is longer than any LAN's."""
MAX_MODELS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmModel:
    """A model somebody serves."""

    name: str
    digest: bytes
    num_blocks: int
    family: str
    hidden_size: int
    servers: int
    """Peers that list it."""


class Router:
    """One node's view of who serves what, shared by all its chains."""

    def __init__(self, host: Host, discovery: Discovery, clock: Clock, rng: Random, swarm: str) -> None:
        self._host = host
        self._discovery = discovery
        self._clock = clock
        self._swarm = swarm
        self._views: dict[bytes, tuple[float, SwarmView]] = {}
        self.metrics = Metrics()
        self.bans = BackOff(rng)

    async def models(self) -> list[SwarmModel]:
        """Models the swarm lists, the most served first."""
        found: dict[bytes, SwarmModel] = {}
        for entry in await self._discovery.lookup(models_key(self._swarm), fresh=True):
            try:
                listing = ModelListing.decode(entry.payload)
            except ProtocolError:
                continue
            known = found.get(listing.digest)
            found[listing.digest] = SwarmModel(
                name=listing.name,
                digest=listing.digest,
                num_blocks=listing.num_blocks,
                family=listing.family,
                hidden_size=listing.hidden_size,
                servers=1 + (known.servers if known else 0),
            )
        return sorted(found.values(), key=lambda model: (-model.servers, model.name, model.digest))[:MAX_MODELS]

    async def view(self, name: str, digest: bytes, num_blocks: int, *, fresh: bool = False) -> SwarmView:
        """Who serves this model now; from memory if young enough and without gaps, from the DHT otherwise."""
        known = self._views.get(digest)
        if not fresh and known is not None and self._clock.now() - known[0] < VIEW_S and not known[1].missing():
            return known[1]
        groups = groups_of_span(0, num_blocks)
        keys = [blocks_key(self._swarm, digest, group) for group in groups]
        pages = await asyncio.gather(*(self._discovery.lookup(key, fresh=fresh) for key in keys))
        view = SwarmView.build(name, digest, num_blocks, self._announcements(pages))
        self._views[digest] = (self._clock.now(), view)
        return view

    def _announcements(self, pages: Iterable[Sequence[SignedEntry]]) -> list[Announcement]:
        found = []
        for page in pages:
            for entry in page:
                try:
                    announcement = Announcement.decode(entry.subkey, entry.payload)
                except ProtocolError as exc:
                    logger.debug("announcement of %s ignored: %s", entry.subkey.short, exc)
                    continue
                self._host.add_addrs(announcement.peer, announcement.addrs)
                found.append(announcement)
        return found

    async def plan(self, view: SwarmView, request: PlanRequest) -> Plan:
        """The best chain, after measuring servers that were never met. Raises NoRoute."""
        if len(view.servers) <= MEASURE_ALL:
            await self._measure(server.peer for server in view.servers)
            return self._plan(view, request)
        for _ in range(2):
            chosen = self._plan(view, request)
            if not await self._measure(chosen.peers):
                return chosen
        return self._plan(view, request)

    def _plan(self, view: SwarmView, request: PlanRequest) -> Plan:
        now = self._clock.now()
        self.metrics.coordinate = self._discovery.coordinate
        request = replace(request, client=self._host.peer_id)
        banned = self._banned(view, now)
        try:
            return plan(replace(request, banned=banned), view, self.metrics, now=now)
        except NoRoute:
            if not banned:
                raise
            return plan(request, view, self.metrics, now=now)  # better a suspect than nobody

    def repair(
        self, chain: Sequence[Hop], failed: Collection[PeerId], view: SwarmView, request: PlanRequest
    ) -> tuple[Repair, ...]:
        """Replacements for the failed hops, from memory alone. Raises NoRoute."""
        now = self._clock.now()
        self.metrics.coordinate = self._discovery.coordinate
        request = replace(request, client=self._host.peer_id, banned=self._banned(view, now))
        return plan_repair(chain, failed, view, self.metrics, request, now=now)

    def _banned(self, view: SwarmView, now: float) -> frozenset[PeerId]:
        return frozenset(server.peer for server in view.servers if self.bans.avoided(server.peer, now))

    async def _measure(self, peers: Iterable[PeerId]) -> int:
        """Meet peers never measured, all at once and for a second at most. Returns how many there were."""
        unknown = [peer for peer in peers if peer != self._host.peer_id and self._unmeasured(peer)]
        if unknown:
            await asyncio.gather(*(self._ping(peer) for peer in unknown))
        return len(unknown)

    def _unmeasured(self, peer: PeerId) -> bool:
        now = self._clock.now()
        known = self.metrics.peer(peer)
        return (known is None or known.rtt is None) and not self.bans.avoided(peer, now)

    async def _ping(self, peer: PeerId) -> None:
        try:
            async with asyncio.timeout(MEASURE_S):
                rtt_s = await self._host.ping(peer)
                for _ in range(PINGS - 1):
                    if rtt_s > LAN_RTT_S:  # a busy machine's first answer must not make a LAN look like a WAN
                        rtt_s = min(rtt_s, await self._host.ping(peer))
        except (OSError, SwarmError, TimeoutError) as exc:
            logger.debug("cannot measure %s: %s", peer.short, exc)
            self.failed(peer)
            return
        self.metrics.observe_rtt(peer, rtt_s, self._clock.now())

    def failed(self, peer: PeerId) -> None:
        """A server failed us: avoid it for a growing while."""
        now = self._clock.now()
        self.bans.failed(peer, now)
        self.metrics.observe_outcome(peer, failed=True, now=now)

    def succeeded(self, peer: PeerId) -> None:
        """A server did its part."""
        self.bans.succeeded(peer)
        self.metrics.observe_outcome(peer, failed=False, now=self._clock.now())

    def any_slow(self, peers: Iterable[PeerId]) -> bool:
        """Whether the way to any of these is slower than SLOW_LINK, as far as we know."""
        return any(self._is_slow(peer) for peer in peers)

    def _is_slow(self, peer: PeerId) -> bool:
        known = self.metrics.peer(peer)
        if known is None or known.rtt is None:
            return False
        if known.bandwidth is not None:
            return known.bandwidth.value < SLOW_LINK
        return known.rtt.value > LAN_RTT_S

    def servers(self, view: SwarmView) -> list[PeerId]:
        """Peers of a view that are up, as far as we know, the most trustworthy first."""
        now = self._clock.now()
        online = [s.peer for s in view.servers if s.announcement.state is State.ONLINE]
        return sorted(online, key=lambda peer: (self.bans.avoided(peer, now), peer))
