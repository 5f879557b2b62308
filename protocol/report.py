"""The report protocol: a node of this machine tells another command of the same user how it is doing.

Spec: docs/spec/report.md. Who asks must know the key in the node's runtime file, which only its user can read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .wire import Catalogue, Message, blob, flag

REPORT_PROTOCOL: Final = "/swarmnode/report/1.0.0"
KEY_BYTES: Final = 32
MAX_REPORT: Final = 16 * 1024 * 1024
"""Bytes of one report: a few KB per connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GetReport(Message, kind=64):
    """Ask for a report."""

    key: bytes = blob(1, low=KEY_BYTES, high=KEY_BYTES)
    """What the runtime file says."""
    connections: bool = flag(2)
    """Every connection too, not only the sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Message, kind=65):
    """The answer: JSON in the payload, as documented in docs/operations.md."""


REPORT_MESSAGES: Final = Catalogue(GetReport, Report)
