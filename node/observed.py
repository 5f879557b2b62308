"""How a node's report on its connections looks on a terminal, and what a replayed trace says.

A report comes from a node of the same user, yet what it repeats came from peers: every cell is made printable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ..protocol.errors import ConfigError
from ..protocol.replay import Replayed, replay
from ..protocol.trace import MAX_LINE, clean
from .console import Console, milliseconds
from .observe import Json

MAX_SHOWN: Final = 20
"""Ended connections and failed dials shown; --json has all that are remembered."""
MAX_CELL: Final = 120
_COLUMNS: Final = (
    *("peer", "address", "path", "dir", "age", "rtt min", "rtt", "streams", "in", "out", "in/s", "out/s", "software"),
    "kept for",
)


def show_connections(said: Json, console: Console) -> None:
    """A node's open connections, and why the last others ended."""
    rows = [_row(row) for row in said["connections"]]
    console.data(f"node {said['peer_id']}: {len(rows)} connections")
    if rows:
        console.table(_COLUMNS, rows)
    ended = sorted(said["ended"], key=lambda row: row["ago_s"])[:MAX_SHOWN]
    if ended:
        console.data("\nended lately")
        console.table(
            ("peer", "address", "dir", "lasted", "ago", "in", "out", "why"), [_ended_row(row) for row in ended]
        )
    failed = sorted(said["dial_failures"], key=lambda row: row["ago_s"])[:MAX_SHOWN]
    if failed:
        console.data("\ndialed in vain")
        rows = [(_cell(row["address"]), duration(row["ago_s"]), _cell(row["reason"])) for row in failed]
        console.table(("address", "ago", "why"), rows)


def show_relaying(said: Json | None, console: Console) -> None:
    """What a node passes on for others, and by which relays others find it; nothing when there is nothing."""
    if not said:
        return
    for place in said["places"]:
        console.data(f"  relayed at {place}")  # an address that was parsed: nothing in it draws on a terminal
    if (serves := said["serves"]) is not None:
        refused = sum(serves["refused"].values())
        console.data(
            f"  relay: {serves['reservations']} places taken, {serves['circuits']} circuits open of "
            f"{serves['circuits_total']}, {size(serves['bytes_total'])} passed on, {refused} refused"
        )


def _row(row: Json) -> tuple[str, ...]:
    return (
        _cell(row["peer_id"])[-8:],
        _cell(row["address"]),
        ("relayed" if row["relayed"] else "direct") + (", bulk" if row["bulk"] else ""),
        row["direction"],
        duration(row["age_s"]),
        milliseconds(row["rtt_min_s"]),
        milliseconds(row["rtt_s"]),
        _cell(protocols_text(row["protocols"])),
        size(row["bytes_in"]),
        size(row["bytes_out"]),
        size(row["rate_in"]),
        size(row["rate_out"]),
        _cell(row["agent"]),
        _cell(", ".join(row["protected_by"])),
    )


def _ended_row(row: Json) -> tuple[str, ...]:
    why = row["reason"] if row["phase"] == "open" else f"{row['reason']} (while {row['phase']})"
    return (
        _cell(row["peer_id"] or "")[-8:],
        _cell(row["address"]),
        row["direction"],
        duration(row["lasted_s"]),
        duration(row["ago_s"]),
        size(row["bytes_in"]),
        size(row["bytes_out"]),
        _cell(f"{why} [{row['rule']}]" if row["rule"] else why),
    )


def _cell(text: str) -> str:
    return clean(text, MAX_CELL)


def protocols_text(protocols: Mapping[str, int]) -> str:
    """Open streams in few words: our own protocols by their middle name."""
    names: Counter[str] = Counter()
    for protocol, count in protocols.items():
        parts = protocol.split("/")
        own = len(parts) == 4 and parts[1] == "swarmnode"
        names[parts[2] if own else protocol or "(negotiating)"] += count
    return ", ".join(f"{count} {name}" for name, count in sorted(names.items()))


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds as people read ages."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 60:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} d"


# Traces


def replay_file(path: Path, console: Console) -> int:
    """Replay a trace; exit code 1 when it departs."""
    found = replay(_lines(path))
    body: dict[str, Any] = {
        "records": found.records,
        "streams": found.streams,
        "frames_in": found.frames_in,
        "frames_out": found.frames_out,
        "complete": found.complete,
    }
    departure = found.departure
    if console.as_json:
        told = departure and {name: getattr(departure, name) for name in departure.__slots__}
        console.json(body | {"departure": told})
    else:
        _show_replayed(found, console)
    return 0 if departure is None else 1


def _show_replayed(found: Replayed, console: Console) -> None:
    what = f"{found.records} records, {found.streams} streams, {found.frames_in} frames in, {found.frames_out} out"
    if found.departure is None:
        console.data(f"same to the end: {what}" + ("" if found.complete else "; the trace does not reach the end"))
        return
    console.data(f"departs after {what}")
    console.data(f"line      {found.departure.line}, {found.departure.name}")
    console.data(f"expected  {found.departure.expected}")
    console.data(f"got       {found.departure.got}")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, none longer than a reader needs to see that it is too long. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(MAX_LINE + 2):
                yield line
    except OSError as exc:
        raise ConfigError(f"cannot read the trace {path}: {exc.strerror}") from exc
