"""Notices that the network under the node has changed: another address, or the machine has slept.

Looking costs two system calls that send nothing. After a change connections over addresses we no longer have are cut at
once, and the others must answer a ping soon or are cut too: what was on them is then done anew over fresh connections,
long before TCP would give up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Final

from ...protocol import ping
from ...protocol.errors import SwarmError
from ..clock import Clock
from ..host import Host
from ..transport.tcp import NewSocket, machine_addresses
from ..transport.wire import Wire

logger = logging.getLogger(__name__)

LOOK_S: Final = 5.0
"""How often to look."""
SLEPT_S: Final = 10.0
"""The date went on so much further than the monotonic clock, which stands still in sleep: or somebody set the date."""
LATE_S: Final = 30.0
"""A look that comes so late: the machine slept, or was stopped."""
CALM_S: Final = 0.3
"""Changes come in groups: an address goes, another one comes, then its route."""
_GROUPS: Final = 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_: addresses and routes of both IP versions
PROOF_S: Final = 4.0
"""After a change each connection has this long to prove that it lives."""


class Watch:
    """Calls `changed(why)` after each change, when dead connections have been cut."""

    def __init__(
        self,
        host: Host,
        clock: Clock,
        changed: Callable[[str], None],
        *,
        addresses: Callable[[], tuple[str, ...]] = machine_addresses,
        new_socket: NewSocket = socket.socket,
    ) -> None:
        self._host = host
        self._clock = clock
        self._changed = changed
        self._addresses = addresses
        self._new_socket = new_socket
        self._had = addresses()
        self._mono, self._wall = clock.now(), clock.wall()

    async def run(self) -> None:
        """Until cancelled."""
        told = asyncio.Event()
        with _kernel_news(told, self._new_socket):
            while True:
                await _sleep(told)
                await self._act()

    async def _act(self) -> None:
        """Look, and put things in order after a change."""
        if why := self.look():
            logger.info("the network has changed: %s", why)
            self._host.readdress()
            self._changed(why)
            await self.cut_dead()

    def look(self) -> str:
        """What has changed since the last look, in words; empty: nothing."""
        mono, wall, have = self._clock.now(), self._clock.wall(), self._addresses()
        passed, dated = mono - self._mono, wall - self._wall
        had, self._had, self._mono, self._wall = self._had, have, mono, wall
        if have != had:
            gone, new = (", ".join(sorted(set(a) - set(b))) or "none" for a, b in ((had, have), (have, had)))
            return f"address {gone} is gone, {new} is new"
        if dated - passed > SLEPT_S or passed > LATE_S + LOOK_S:
            return f"the machine slept for {max(dated, passed):.0f} s"
        return ""

    async def cut_dead(self) -> None:
        """Cut connections over addresses that are gone, and those that no longer answer."""
        async with asyncio.TaskGroup() as group:
            for wire in self._host.wires:
                if self.is_gone(wire):
                    wire.abort("our address on it is gone")
                else:
                    group.create_task(self._prove(wire))

    def is_gone(self, wire: Wire) -> bool:
        """Whether this machine no longer has the address that a connection runs over."""
        local = wire.local_ip
        if local is None or wire.address.is_relayed:
            return False
        family = socket.AF_INET6 if ":" in local else socket.AF_INET
        with self._new_socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((local.partition("%")[0], 0))
            except OSError as exc:
                return exc.errno == errno.EADDRNOTAVAIL
        return False

    async def _prove(self, wire: Wire) -> None:
        try:
            async with asyncio.timeout(PROOF_S):
                stream = await self._host.open_on(wire, ping.PROTOCOL)
                try:
                    await stream.write(bytes(ping.SIZE))
                    await stream.read_exactly(ping.SIZE)
                finally:
                    stream.reset()
        except TimeoutError:
            wire.abort("no answer after the network changed")
        except (OSError, SwarmError) as exc:
            logger.debug("%r after a change of network: %s", wire, exc)


async def _sleep(told: asyncio.Event) -> None:
    """Until the kernel has news, or it is time to look anyhow."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOOK_S):
            await told.wait()
    if told.is_set():
        await asyncio.sleep(CALM_S)
        told.clear()


@contextlib.contextmanager
def _kernel_news(told: asyncio.Event, new_socket: NewSocket) -> Iterator[None]:
    """On Linux the kernel tells of new addresses and routes at once; elsewhere looking has to do."""
    with contextlib.ExitStack() as stack:
        if sys.platform == "linux":
            loop = asyncio.get_running_loop()
            try:
                news = stack.enter_context(new_socket(socket.AF_NETLINK, socket.SOCK_RAW))
                news.setblocking(False)
                news.bind((0, _GROUPS))
                loop.add_reader(news, _heard, news, told)
                stack.callback(loop.remove_reader, news)
            except OSError as exc:
                logger.debug("the kernel tells nothing: %s", exc)
        yield


def _heard(news: socket.socket, told: asyncio.Event) -> None:
    with contextlib.suppress(OSError):  # too much to tell: that is news, too
        news.recv(65536)
    told.set()
