"""Events of a connection's life as data: one schema, written as JSON lines in the manner of qlog.

A line is `{"time": ..., "name": "category:event", "data": {...}}`, as in the qlog drafts beside RFC 9000; the
first line of a file says the schema and who looks. Only headers, lengths, flags, ids and reasons are ever in
`data`: no payload, no key. Text that a peer chose is cut and stripped of what could draw on a terminal. Names and
fields: docs/operations.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import ConfigError

SCHEMA: Final = "urn:swarmnode:trace:1"
"""Changes when the meaning of an event does; readers refuse others."""
MAX_TEXT: Final = 200
"""Characters kept of any text in an event."""
MAX_LINE: Final = 1024 * 1024
"""Characters of one line that a reader accepts; a full Noise message of empty frames takes about 150 KB."""
MAX_NAME: Final = 64
MAX_TIME: Final = 1e15
"""Seconds; JSON has integers that are no float."""


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """Something that happened."""

    time: float
    """Seconds on the recording host's monotonic clock."""
    name: str
    """`category:event`."""
    data: Mapping[str, Any]
    """JSON values; what they mean depends on the name."""


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """A peer's or the system's words, short and printable: safe for logs, tables and terminals."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)


def header(*, title: str, client: bool, wall: float, time: float) -> str:
    """The first line of a file. `wall` is the date at `time`."""
    return _line(
        {
            "file_schema": SCHEMA,
            "serialization_format": "application/x-ndjson",
            "title": clean(title),
            "vantage_point": {"type": "client" if client else "server"},
            "common_fields": {"time_unit": "s", "reference_time": {"clock": "monotonic", "time": time, "wall": wall}},
        }
    )


def encode(event: TraceEvent) -> str:
    """One line, without its end."""
    return _line({"time": event.time, "name": event.name, "data": event.data})


def _line(body: Mapping[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))


def check_header(line: str) -> bool:
    """Whether the recorder was the yamux client. Raises ConfigError for anything but a trace of this schema."""
    body = _parse(line)
    if body.get("file_schema") != SCHEMA:
        found = clean(str(body.get("file_schema")), MAX_NAME)
        raise ConfigError(f"not a trace of {SCHEMA} (it says {found}): use the version that wrote it")
    vantage = body.get("vantage_point")
    kind = vantage.get("type") if isinstance(vantage, dict) else None
    if kind not in ("client", "server"):
        raise ConfigError("the trace's first line does not say vantage_point.type: client or server")
    return bool(kind == "client")


def decode(line: str) -> TraceEvent:
    """Parse one line. Raises ConfigError."""
    body = _parse(line)
    time, name, data = body.get("time"), body.get("name"), body.get("data")
    if not isinstance(time, int | float) or not abs(time) <= MAX_TIME:
        raise ConfigError("not an event: its time is no number of seconds")
    if not isinstance(name, str) or not isinstance(data, dict):
        raise ConfigError('not an event: {"time": number, "name": text, "data": object} is expected')
    if len(name) > MAX_NAME or not name.isprintable():
        raise ConfigError(f"the event's name is over {MAX_NAME} characters or not printable")
    return TraceEvent(float(time), name, data)


def _parse(line: str) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise ConfigError(f"a line of {len(line)} characters: at most {MAX_LINE} are read")
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"not JSON: {clean(str(exc))}") from exc
    if not isinstance(body, dict):
        raise ConfigError("not a JSON object")
    return body
