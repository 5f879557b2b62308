"""Which connections go when there are too many: pure choices over snapshots, and the trimmer that carries them out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from ..protocol.ids import PeerId

RETRY_S: Final = 5.0
"""How soon to look again when connections are too many, but none may be closed."""

C = TypeVar("C")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Generic[C]):
    """An open connection, as far as trimming is concerned."""

    connection: C
    peer: PeerId
    opened_at: float
    used_at: float
    """When a stream was last open on it."""
    streams: int
    protected: bool


def idle(
    candidates: Iterable[Candidate[C]], *, now: float, grace_s: float, keep_protected: bool = True
) -> list[Candidate[C]]:
    """Those that may be closed, least valuable first: second connections of a peer, then the longest unused.

    Not those with streams, of protected peers, or younger than the grace.
    """
    everybody = sorted(candidates, key=lambda candidate: candidate.used_at)
    left = Counter(candidate.peer for candidate in everybody)
    spare: list[Candidate[C]] = []
    last: list[Candidate[C]] = []
    for candidate in everybody:
        if candidate.streams or (candidate.protected and keep_protected) or now - candidate.opened_at < grace_s:
            continue
        left[candidate.peer] -= 1
        (spare if left[candidate.peer] else last).append(candidate)
    return spare + last


@dataclass(frozen=True, slots=True)
class Stranger(Generic[C]):
    """An accepted connection in its handshake."""

    connection: C
    group: Hashable
    """The subnet it comes from."""
    due: float
    """From when on it gives way to whomever."""


def giving_way(strangers: Sequence[Stranger[C]], *, group: Hashable, now: float) -> C | None:
    """Which handshake ends so that one more, from `group`, can begin; None: none.

    The first due of the subnet that holds most, unless the newcomer's would then hold as many: who floods us from few
    places keeps nobody else out. Failing that the first due of all, if its time has come: handshakes take two round
    trips, a stranger that dawdles is not missed.
    """
    sizes = Counter(stranger.group for stranger in strangers)
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    if sizes[largest] > sizes[group] + 1:
        return min((s for s in strangers if s.group == largest), key=lambda s: s.due).connection
    first = min(strangers, key=lambda s: s.due, default=None)
    return first.connection if first is not None and now >= first.due else None


class Trimmer(Generic[C]):
    """Closes idle connections over the high-water mark, down to the low one."""

    def __init__(
        self,
        candidates: Callable[[], list[Candidate[C]]],
        close: Callable[[C], None],
        *,
        now: Callable[[], float],
        high_water: int,
        low_water: int,
        grace_s: float,
    ) -> None:
        self._candidates = candidates
        self._close = close
        self._now = now
        self._high_water = high_water
        self._low_water = low_water
        self._grace_s = grace_s
        self._timer: asyncio.TimerHandle | None = None

    def check(self, count: int) -> None:
        """There are `count` connections now. Cheap while they are few."""
        if count > self._high_water and self._timer is None:
            self._trim()

    def aclose(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _trim(self) -> None:
        self._timer = None
        candidates = self._candidates()
        if len(candidates) <= self._high_water:
            return
        surplus = len(candidates) - self._low_water
        victims = idle(candidates, now=self._now(), grace_s=self._grace_s)[:surplus]
        for victim in victims:
            self._close(victim.connection)
        if len(candidates) - len(victims) > self._high_water:
            self._timer = asyncio.get_running_loop().call_later(RETRY_S, self._trim)
