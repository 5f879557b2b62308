"""Counters of a host and of each connection as frozen snapshots, and their names for a metrics endpoint.

Taking a snapshot adds up plain integers of the open connections; nothing is counted for it. Names follow
Prometheus' and OpenMetrics' manners (base units, `_total` on counters); docs/operations.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, NamedTuple

from ..protocol.tally import CLASSES, Tally

if TYPE_CHECKING:
    from .transport.wire import Wire

PREFIX: Final = "swarmnode_transport_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTraffic:
    """Streams' payload of one priority class, as this end classes its streams."""

    name: str
    """control, decode or bulk."""
    bytes_in: int
    bytes_out: int
    frames_in: int
    frames_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionMetrics:
    """What one connection did, or the sum over many. Everything only ever grows."""

    bytes_in: int
    """On the link, encryption and headers included; so bytes_out."""
    bytes_out: int
    classes: tuple[ClassTraffic, ...]
    control_frames_in: int
    """Frames of the muxer itself: windows, pings, resets, go-away."""
    control_frames_out: int
    stale_bytes_in: int
    """Payload for streams that were gone already."""
    streams_opened_here: int
    streams_opened_there: int
    """By the peer."""
    streams_turned_away: int
    """The peer wanted to open them and was answered with a reset."""
    streams_closed: int
    """Ended well, both ways."""
    streams_reset_here: int
    streams_reset_there: int
    windows_grown: int
    """Receive windows enlarged because the path was faster than they were."""
    pings: int
    """Keepalives sent."""
    pongs: int
    """Round trips measured."""
    write_stalls: int
    """Times the link took no more and we waited."""
    write_stalled_s: float
    """How long, in sum."""
    go_aways_in: int
    go_aways_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMetrics:
    """One snapshot of a host's transport."""

    connections: int
    """Open now."""
    streams: int
    """Open now, both ways."""
    connections_in: int
    """Accepted, and the peer authenticated, so far."""
    connections_out: int
    """The same of dialed ones."""
    handshakes_failed: int
    """Links that ended before the peer was authenticated."""
    handshake_s: float
    """Duration of all finished handshakes in sum: divide by connections_in + connections_out."""
    total: ConnectionMetrics
    """Over all connections so far, open and gone."""
    dials: int
    """Addresses tried."""
    dials_failed: tuple[tuple[str, int], ...]
    """By cause."""
    refused: tuple[tuple[str, int], ...]
    """Connections and streams turned away, by reason."""


class Sums:
    """Adds up connections; the ended ones of a host stay in one of these."""

    __slots__ = ("bytes_in", "bytes_out", "pauses", "paused_s", "pings", "pongs", "tally")  # noqa: RUF023

    def __init__(self) -> None:
        self.tally = Tally()
        self.bytes_in = self.bytes_out = self.pings = self.pongs = self.pauses = 0
        self.paused_s = 0.0

    def add(self, wire: Wire) -> None:
        """Fold in one connection."""
        life = wire.life
        self.tally.add(wire.session.tally)
        self.bytes_in += wire.bytes_in
        self.bytes_out += wire.bytes_out
        self.pings += life.pings
        self.pongs += life.pongs
        self.pauses += life.pauses
        self.paused_s += life.paused_s

    def merge(self, other: Sums) -> None:
        """Fold in what another has added up."""
        self.tally.add(other.tally)
        for name in ("bytes_in", "bytes_out", "pings", "pongs", "pauses", "paused_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def snapshot(self) -> ConnectionMetrics:
        """What has been added so far."""
        t = self.tally
        classes = zip(CLASSES, t.bytes_in, t.bytes_out, t.frames_in, t.frames_out, strict=True)
        return ConnectionMetrics(
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            classes=tuple(
                ClassTraffic(name=name, bytes_in=bi, bytes_out=bo, frames_in=fi, frames_out=fo)
                for name, bi, bo, fi, fo in classes
            ),
            control_frames_in=t.control_in,
            control_frames_out=t.control_out,
            stale_bytes_in=t.stale_bytes_in,
            streams_opened_here=t.opened_here,
            streams_opened_there=t.opened_there,
            streams_turned_away=t.turned_away,
            streams_closed=t.closed,
            streams_reset_here=t.reset_here,
            streams_reset_there=t.reset_there,
            windows_grown=t.windows_grown,
            pings=self.pings,
            pongs=self.pongs,
            write_stalls=self.pauses,
            write_stalled_s=self.paused_s,
            go_aways_in=t.go_aways_in,
            go_aways_out=t.go_aways_out,
        )


def of(wires: Iterable[Wire], before: Sums | None = None) -> ConnectionMetrics:
    """The sum over some connections, and over what was added up before."""
    sums = Sums()
    if before is not None:
        sums.merge(before)
    for wire in wires:
        sums.add(wire)
    return sums.snapshot()


class Sample(NamedTuple):
    """One line of a metrics endpoint."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


_Labels = tuple[tuple[str, str], ...]
_COUNTERS: Final[Mapping[str, tuple[str, _Labels]]] = {
    "control_frames_in": ("control_frames_total", (("direction", "in"),)),
    "control_frames_out": ("control_frames_total", (("direction", "out"),)),
    "bytes_in": ("bytes_total", (("direction", "in"),)),
    "bytes_out": ("bytes_total", (("direction", "out"),)),
    "stale_bytes_in": ("stale_bytes_total", ()),
    "streams_opened_here": ("streams_opened_total", (("by", "us"),)),
    "streams_opened_there": ("streams_opened_total", (("by", "peer"),)),
    "streams_turned_away": ("streams_turned_away_total", ()),
    "streams_closed": ("streams_closed_total", ()),
    "streams_reset_here": ("streams_reset_total", (("by", "us"),)),
    "streams_reset_there": ("streams_reset_total", (("by", "peer"),)),
    "windows_grown": ("windows_grown_total", ()),
    "pings": ("pings_total", ()),
    "pongs": ("round_trips_total", ()),
    "write_stalls": ("write_stalls_total", ()),
    "write_stalled_s": ("write_stalled_seconds_total", ()),
    "go_aways_in": ("go_aways_total", (("direction", "in"),)),
    "go_aways_out": ("go_aways_total", (("direction", "out"),)),
}
"""Field of ConnectionMetrics -> metric and labels."""


def samples(metrics: HostMetrics) -> Iterator[Sample]:
    """A snapshot as named samples, for a metrics endpoint."""
    yield _sample("connections", metrics.connections)
    yield _sample("streams", metrics.streams)
    yield _sample("connections_opened_total", metrics.connections_in, ("direction", "in"))
    yield _sample("connections_opened_total", metrics.connections_out, ("direction", "out"))
    yield _sample("handshakes_failed_total", metrics.handshakes_failed)
    yield _sample("handshake_seconds_total", metrics.handshake_s)
    yield _sample("dials_total", metrics.dials)
    for cause, count in metrics.dials_failed:
        yield _sample("dials_failed_total", count, ("cause", cause))
    for reason, count in metrics.refused:
        yield _sample("refused_total", count, ("reason", reason))
    yield from _connection_samples(metrics.total)


def _connection_samples(total: ConnectionMetrics) -> Iterator[Sample]:
    for field in fields(total):
        if field.name != "classes":
            name, labels = _COUNTERS[field.name]
            yield _sample(name, getattr(total, field.name), *labels)
    for group in total.classes:
        for direction, size, frames in (
            ("in", group.bytes_in, group.frames_in),
            ("out", group.bytes_out, group.frames_out),
        ):
            both = ("class", group.name), ("direction", direction)
            yield _sample("stream_bytes_total", size, *both)
            yield _sample("stream_frames_total", frames, *both)


def _sample(name: str, value: float, *labels: tuple[str, str]) -> Sample:
    return Sample(PREFIX + name, labels, value)
