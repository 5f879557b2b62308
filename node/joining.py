"""Getting into the swarm and back into it: peers given, peers met in earlier runs, the local network.

docs/spec/joining.md has the order and the formats.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from ..protocol.errors import PeerUnreachable
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from . import lan
from .clock import Clock
from .config import NodeConfig
from .discovery import Discovery
from .remembered import Remembered

logger = logging.getLogger(__name__)

SAVE_S: Final = 60.0
"""How often the peers met are written down."""
TRY_S: Final = 3.0
"""How long a start waits for peers that may be gone; they are tried again later."""
MAX_TRIED: Final = 16
"""Remembered addresses tried at the start."""


class Joining:
    """One node's ways in."""

    def __init__(self, config: NodeConfig, discovery: Discovery, clock: Clock, own: PeerId) -> None:
        self._config = config
        self._discovery = discovery
        self._clock = clock
        self._own = own
        self._file = Remembered(config.state_dir, config.swarm)

    async def enter(self) -> None:
        """Join the swarm. Raises PeerUnreachable when peers were given and nobody, remembered ones neither, answers.

        Without peers given, a node that finds nobody is the first of its swarm.
        """
        config, known = self._config, self._remembered()
        if config.peers:
            try:
                await self._discovery.bootstrap(config.peer_addrs)
            except PeerUnreachable:
                if not await self._try(known):
                    raise
                logger.warning("no peer given answers; joined through one met in an earlier run")
        elif not await self._try(known) and config.lan:
            await self._try(await lan.find(config.swarm, own=self._own))

    async def _try(self, addrs: Sequence[Multiaddr]) -> bool:
        """Enter through addresses that may be out of date."""
        if not addrs:
            return False
        try:
            async with asyncio.timeout(TRY_S):
                return await self._discovery.bootstrap(addrs) > 0
        except (PeerUnreachable, TimeoutError) as exc:
            logger.info("no way into the swarm: %s", exc or f"no answer within {TRY_S:g} s")
            return False

    def _remembered(self) -> list[Multiaddr]:
        if not self._config.persistent:
            return []
        known = self._file.load(self._clock.wall())
        return [addr for addr in known if addr.peer_id != self._own][:MAX_TRIED]

    def save(self) -> None:
        """Write down the peers met."""
        self._file.save(self._discovery.met(), self._clock.wall())

    async def save_forever(self) -> None:
        """Keep what is written down up to date."""
        while True:
            await asyncio.sleep(SAVE_S)
            self.save()
