"""Dialing a peer that has several addresses: in order of promise, staggered, first complete handshake wins.

RFC 8305 ("happy eyeballs") with one change: the race is decided by who proves the right identity, not by who
accepts a TCP connection, for another node may sit behind an old address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Final, Generic, TypeVar

from ..protocol.errors import SwarmError
from ..protocol.multiaddr import Multiaddr

STAGGER_S: Final = 0.25
"""Head start of each address over the next (RFC 8305 recommends 250 ms)."""
MAX_ADDRESSES: Final = 16
"""Addresses tried in one dial."""

T = TypeVar("T")
Lookup = Callable[[], Awaitable[Sequence[Multiaddr]]]
"""Finds out what a name stands for; raises OSError."""


class DialFailed(Exception):
    """No address worked; `causes` has one line per address, in the order tried."""

    def __init__(self, causes: Sequence[tuple[Multiaddr, str]]) -> None:
        super().__init__("; ".join(f"{address}: {cause}" for address, cause in causes))
        self.causes = tuple(causes)


def order(addresses: Iterable[Multiaddr], *, after: Multiaddr | None = None) -> list[Multiaddr]:
    """Without doubles, IPv6 and IPv4 in turn, relayed ones last; cut to MAX_ADDRESSES.

    The turns begin with IPv6, which needs no open port at a router; or with the other family than `after`. Where direct
    addresses alone are too many, half the room is for relayed ones.
    """
    unique = list(dict.fromkeys(addresses))
    relayed = [address for address in unique if address.is_relayed][: MAX_ADDRESSES // 2]
    direct = [address for address in unique if not address.is_relayed]
    six = [address for address in direct if _is_six(address)]
    rest = [address for address in direct if not _is_six(address)]
    turns = (rest, six) if after is not None and _is_six(after) else (six, rest)
    pairs = [address for pair in zip_longest(*turns) for address in pair if address is not None]
    return [*pairs[: MAX_ADDRESSES - len(relayed)], *relayed]


def _is_six(address: Multiaddr) -> bool:
    return address.ip is not None and address.ip.version == 6


class Race(Generic[T]):
    """One dial of several addresses. `attempt` returns the connection or raises OSError, TimeoutError,
    SwarmError.

    `dispose` gets rid of a connection that came second. Cancelling run() cancels every attempt.
    """

    def __init__(
        self,
        attempt: Callable[[Multiaddr], Awaitable[T]],
        dispose: Callable[[T], None],
        *,
        stagger_s: float = STAGGER_S,
    ) -> None:
        self._attempt = attempt
        self._dispose = dispose
        self._stagger_s = stagger_s
        self._winner: T | None = None
        self._causes: dict[Multiaddr, str] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._untried: list[Multiaddr] = []
        self._last: Multiaddr | None = None

    async def run(self, addresses: Sequence[Multiaddr], names: Mapping[Multiaddr, Lookup] | None = None) -> T:
        """Dial until one works, in the order given; names are looked up meanwhile, and what they stand for joins in.

        Raises DialFailed.
        """
        lookups = names or {}
        self._untried = list(addresses)
        self._causes = dict.fromkeys((*addresses, *lookups), "not tried")
        try:
            async with asyncio.TaskGroup() as group:
                looking = {group.create_task(self._look_up(name, lookup)) for name, lookup in lookups.items()}
                self._tasks += looking
                await self._race(group, looking)
        except BaseException:
            if self._winner is not None:
                self._dispose(self._winner)
            raise
        if self._winner is None:
            raise DialFailed(list(self._causes.items()))
        return self._winner

    async def _race(self, group: asyncio.TaskGroup, looking: set[asyncio.Task[None]]) -> None:
        tried = 0
        while self._winner is None:
            if self._untried and tried < MAX_ADDRESSES:
                tried += 1
                self._last = self._untried.pop(0)
                task = group.create_task(self._one(self._last))
                self._tasks.append(task)
                await asyncio.wait((task,), timeout=self._stagger_s)
            elif waiting := [task for task in looking if not task.done()]:
                running = [task for task in self._tasks if not task.done()]
                await asyncio.wait({*waiting, *running}, return_when=asyncio.FIRST_COMPLETED)
            else:
                return

    async def _look_up(self, name: Multiaddr, lookup: Lookup) -> None:
        try:
            found = await lookup()
        except OSError as exc:
            self._causes[name] = exc.strerror or str(exc)
            return
        fresh = [address for address in found if address not in self._causes]
        self._causes |= dict.fromkeys(fresh, "not tried")
        if fresh:
            del self._causes[name]  # what becomes of its addresses says more
        else:
            self._causes[name] = "stands for no address that can be dialed, or for known ones"
        self._untried = order([*self._untried, *fresh], after=self._last)

    async def _one(self, address: Multiaddr) -> None:
        try:
            found = await self._attempt(address)
        except TimeoutError:
            self._causes[address] = "timed out"
            return
        except (OSError, SwarmError) as exc:
            self._causes[address] = _reason(exc)
            return
        if self._winner is not None:
            self._dispose(found)
            return
        self._winner = found
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


def _reason(exc: Exception) -> str:
    """One line for the user, without the numbers and tuples that asyncio puts into its messages."""
    if isinstance(exc, OSError) and exc.strerror and exc.errno is not None:
        text = exc.strerror
        return "connection refused" if isinstance(exc, ConnectionRefusedError) else text.lower()
    return str(exc) or type(exc).__name__
