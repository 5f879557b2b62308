"""Who serves what of one model, at one moment: an immutable view that every decision in this package reads.

A view is built from announcements, narrowed by filters that return new views, and thrown away. Nothing here decides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final

from ..protocol.ids import PeerId
from .announce import Announcement, State, newest

MAX_SERVERS: Final = 10_000
"""Servers kept in a view: a flood of forged records must not make planning slow without bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """One server: what it announced, and what was asked from it since."""

    announcement: Announcement
    queue_s: float = 0.0
    """Seconds a step waits there before it runs, as last asked."""
    kv_asked: int | None = None
    """KV room in tokens as last asked; None: only the announced bucket is known."""

    @property
    def peer(self) -> PeerId:
        """Whose server this is."""
        return self.announcement.peer

    @property
    def start(self) -> int:
        """First block served."""
        return self.announcement.start

    @property
    def end(self) -> int:
        """One past the last block served."""
        return self.announcement.end

    @property
    def kv_free(self) -> int:
        """Tokens it has KV room for, the freshest figure known."""
        return self.announcement.kv_free if self.kv_asked is None else self.kv_asked


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmView:
    """The servers of one model, sorted by peer so that equal swarms give equal decisions. Use build()."""

    model: str
    """Name for messages."""
    digest: bytes
    num_blocks: int
    servers: tuple[ServerInfo, ...]

    @classmethod
    def build(cls, model: str, digest: bytes, num_blocks: int, announcements: Iterable[Announcement]) -> SwarmView:
        """A view of the announcements of this digest, the last given of each peer; others are left out.

        A record that lies about the number of blocks is left out too. Beyond MAX_SERVERS the peers that sort first
        stay: which ones is arbitrary, but the same for everybody.
        """
        fitting = (a for a in announcements if a.digest == digest and a.num_blocks == num_blocks)
        servers = tuple(ServerInfo(announcement=a) for a in newest(fitting)[:MAX_SERVERS])
        return cls(model=model, digest=digest, num_blocks=num_blocks, servers=servers)

    def server(self, peer: PeerId) -> ServerInfo | None:
        """The server with this id, if it is in the view."""
        return next((server for server in self.servers if server.peer == peer), None)

    def where(
        self,
        *,
        states: Collection[State] | None = None,
        compute_class: bytes | None = None,
        allow: Collection[PeerId] | None = None,
        deny: Collection[PeerId] = (),
    ) -> SwarmView:
        """The same view with only the servers that pass every condition given."""
        kept = tuple(
            server
            for server in self.servers
            if (states is None or server.announcement.state in states)
            and (compute_class is None or server.announcement.compute_class == compute_class)
            and (allow is None or server.peer in allow)
            and server.peer not in deny
        )
        return replace(self, servers=kept)

    def with_load(self, peer: PeerId, *, queue_s: float, kv_free: int) -> SwarmView:
        """The same view after `peer` was asked for its queue and KV room."""
        servers = tuple(
            replace(server, queue_s=queue_s, kv_asked=kv_free) if server.peer == peer else server
            for server in self.servers
        )
        return replace(self, servers=servers)

    def coverage(self) -> tuple[int, ...]:
        """For each block, how many servers of this view hold it."""
        return coverage(self.num_blocks, ((server.start, server.end) for server in self.servers))

    def missing(self, start: int = 0, end: int | None = None) -> tuple[tuple[int, int], ...]:
        """The spans inside [start, end) that no server of this view holds."""
        return gaps(self.coverage(), start, self.num_blocks if end is None else end)


def coverage(num_blocks: int, spans: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """For each of `num_blocks` blocks, how many of the spans hold it."""
    steps = [0] * (num_blocks + 1)
    for start, end in spans:
        steps[start] += 1
        steps[end] -= 1
    counts, running = [], 0
    for step in steps[:num_blocks]:
        running += step
        counts.append(running)
    return tuple(counts)


def gaps(counts: tuple[int, ...], start: int, end: int) -> tuple[tuple[int, int], ...]:
    """The maximal spans inside [start, end) whose count is 0."""
    found: list[tuple[int, int]] = []
    for block in range(start, end):
        if counts[block]:
            continue
        if found and found[-1][1] == block:
            found[-1] = (found[-1][0], block + 1)
        else:
            found.append((block, block + 1))
    return tuple(found)
