"""What a node does with relays: being one for others when it can be reached, having some when it cannot.

reach     relay "on"    "auto"           "off"     places held
public    serves        serves           -         at relays named by the user
unknown   serves        if it has a      -         at relays named by the user
                        public address
private   serves        -                -         PLACES, those named among them
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

from ...protocol.multiaddr import Multiaddr
from ...protocol.relay_ledger import RelayLimits
from ...protocol.verdict import Reach
from ...routing.relays import relays_key
from ...routing.table import Contact
from ..discovery import Discovery
from ..host import Host
from .keeper import Keeper, PlaceEvent

if TYPE_CHECKING:
    from .server import Relay, RelayStatus

PLACES: Final = 2
"""Places of a node that nobody can dial: one more than it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaying:
    """What a node does with relays, in numbers."""

    serves: RelayStatus | None
    """Of its service to others; None: it offers none."""
    places: tuple[str, ...]
    """Its own addresses through relays."""


class RelayRole:
    """One node's relays, either way. Run it in a task."""

    def __init__(
        self,
        host: Host,
        discovery: Discovery,
        *,
        rng: Random,
        mode: str,
        named: Sequence[Multiaddr] = (),
        reach: Reach = Reach.UNKNOWN,
        limits: RelayLimits | None = None,
        swarm: str,
    ) -> None:
        self._host = host
        self._discovery = discovery
        self._mode = mode
        self._named = tuple(named)
        self._reach = reach
        self._limits = limits
        self._key = relays_key(swarm)
        self._service: Relay | None = None
        self._changed = asyncio.Event()
        self._changed.set()
        self.keeper = Keeper(host, rng=rng, named=named, find=self._find)
        """Our places at relays."""
        self._want()

    # -- what others call --

    def set_reach(self, reach: Reach) -> None:
        """Whether others can dial this node, as far as is known now."""
        self._reach = reach
        self._want()
        self._changed.set()

    def on_place(self, callback: Callable[[PlaceEvent], None]) -> Callable[[], None]:
        """Hear of places gained, renewed and lost; returns the unsubscription."""
        self.keeper.on_change.append(callback)
        return lambda: self.keeper.on_change.remove(callback)

    def status(self) -> Relaying:
        """One snapshot."""
        me = self._host.peer_id
        places = tuple(str(addr.with_peer(me)) for place in self.keeper.places for addr in place.addrs)
        return Relaying(serves=None if self._service is None else self._service.status(), places=places)

    async def settled(self, timeout_s: float) -> None:
        """Wait a while until the places wanted are held, as far as they can be had."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.keeper.settled()

    async def run(self) -> None:
        """Until cancelled."""
        keeping = asyncio.get_running_loop().create_task(self.keeper.run(), name="keep places at relays")
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                await self._serve(self.serves)
        finally:
            keeping.cancel()
            await asyncio.wait((keeping,))
            await self._serve(False)

    # -- decisions --

    @property
    def serves(self) -> bool:
        """Whether it is to be a relay for others now."""
        if self._mode == "auto":
            return self._reach is Reach.PUBLIC or (
                self._reach is Reach.UNKNOWN and any(_is_global(addr) for addr in self._host.listen_addrs)
            )
        return self._mode == "on"

    def _want(self) -> None:
        named = len({addr.peer_id for addr in self._named})
        self.keeper.want(max(PLACES, named) if self._reach is Reach.PRIVATE else named)

    async def _serve(self, wanted: bool) -> None:
        if wanted and self._service is None:
            from .server import Relay  # most nodes never are one

            self._service = await Relay(self._host, self._limits).__aenter__()
            self._provide = asyncio.get_running_loop().create_task(self._announce(), name="announce a relay")
        elif not wanted and self._service is not None:
            service, self._service = self._service, None
            self._provide.cancel()
            await asyncio.wait((self._provide,))
            self._discovery.stop_providing(self._key)
            await service.aclose()

    async def _announce(self) -> None:
        await self._discovery.provide(self._key)

    async def _find(self) -> Iterable[Contact]:
        """Relays the swarm names, then the servers of its DHT, which others can dial, after all."""
        named = await self._discovery.providers(self._key)
        return {contact.peer: contact for contact in (*self._discovery.peers(), *named)}.values()


def _is_global(address: Multiaddr) -> bool:
    ip = address.ip
    return ip is not None and ip.is_global and not address.is_relayed
