"""Dialing a peer that has several addresses: in order of promise, staggered, first complete handshake wins.

RFC 8305 ("happy eyeballs") with one change: the race is decided by who proves the right identity, not by who
accepts a TCP connection, for another node may sit behind an old address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Final, Generic, TypeVar

from ..protocol.errors import SwarmError
from ..protocol.multiaddr import Multiaddr

STAGGER_S: Final = 0.25
"""Head start of each address over the next (RFC 8305 recommends 250 ms)."""
MAX_ADDRESSES: Final = 16
"""Addresses tried in one dial."""

T = TypeVar("T")


class DialFailed(Exception):
    """No address worked; `causes` has one line per address, in the order tried."""

    def __init__(self, causes: Sequence[tuple[Multiaddr, str]]) -> None:
        super().__init__("; ".join(f"{address}: {cause}" for address, cause in causes))
        self.causes = tuple(causes)


def order(addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
    """Without doubles, IPv6 and IPv4 in turn, relayed ones last, otherwise as given; cut to MAX_ADDRESSES.

    Where direct addresses alone are too many, half the room is for relayed ones.
    """
    unique = list(dict.fromkeys(addresses))
    relayed = [address for address in unique if address.is_relayed][: MAX_ADDRESSES // 2]
    direct = [address for address in unique if not address.is_relayed]
    six = [address for address in direct if address.ip is not None and address.ip.version == 6]
    rest = [address for address in direct if address not in six]
    pairs = [address for pair in zip_longest(rest, six) for address in pair if address is not None]
    return [*pairs[: MAX_ADDRESSES - len(relayed)], *relayed]


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

    async def run(self, addresses: Sequence[Multiaddr]) -> T:
        """Dial until one works. Raises DialFailed."""
        try:
            async with asyncio.TaskGroup() as group:
                for address in addresses:
                    task = group.create_task(self._one(address))
                    self._tasks.append(task)
                    await asyncio.wait((task,), timeout=self._stagger_s)
                    if self._winner is not None:
                        break
        except BaseException:
            if self._winner is not None:
                self._dispose(self._winner)
            raise
        if self._winner is None:
            raise DialFailed([(a, self._causes.get(a, "not tried")) for a in addresses])
        return self._winner

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
