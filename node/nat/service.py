"""A node's dealings with the network around it, in one: reachability, the router's port, and changes underneath."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Self

from ...protocol.verdict import Reach, Verdict
from ..clock import Clock
from ..config import NodeConfig
from ..host import Host
from ..tasks import Supervisor
from .gateway import Gateway, find_gateway
from .mapping import PortMapper, PortState
from .reach import Reachability
from .watch import Watch

logger = logging.getLogger(__name__)


class Nat:
    """Use as an async context manager, inside the host's."""

    def __init__(
        self,
        host: Host,
        config: NodeConfig,
        *,
        clock: Clock,
        rng: Random,
        gateway: Callable[[], Gateway | None] = find_gateway,
    ) -> None:
        self._tasks = Supervisor("nat")
        self._news = asyncio.Event()
        self.reach = Reachability(host, clock=clock, rng=rng)
        self.reach.on_news.append(self._news.set)
        self.watch = Watch(host, clock, self._changed)
        self.mapper: PortMapper | None = None
        if config.port_mapping == "auto" and any(a.ip is not None and not a.is_loopback for a in host.bound_addrs):
            self.mapper = PortMapper(host, clock=clock, rng=rng, changed=self._mapped, gateway=gateway)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._tasks.start(self.reach.run(), "reachability")
        self._tasks.start(self.watch.run(), "network watch")
        if self.mapper is not None:
            self._tasks.start(self.mapper.run(), "port mapping")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._tasks.aclose()
        if self.mapper is not None:
            await self.mapper.aclose()

    def on_change(self, listener: Callable[[Verdict], None]) -> None:
        """Hear the node's verdict each time it turns."""
        self.reach.on_change.append(listener)

    async def settled(self) -> None:
        """Wait until it is known whether others can dial us, and what the router says."""
        while self.reach.verdict.reach is Reach.UNKNOWN or (self.mapper is not None and self.mapper.pending):
            self._news.clear()
            await self._news.wait()

    def _mapped(self, state: PortState) -> None:
        self._news.set()
        self.reach.mapped([state.outside] if state.outside is not None else [])

    def _changed(self, why: str) -> None:
        self.reach.recheck()
        if self.mapper is not None:
            self.mapper.renew()
