"""What comes back from the compute thread, free of torch so that a node that computes nothing never loads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ...protocol.errors import SwarmError
from .scheduler import DECODE_ROWS

_SMOOTHING: Final = 0.1
"""Weight of the newest pass in the running mean of block times."""


class BadRows(SwarmError):
    """The previous hop sent hidden states that are not numbers: its fault, not ours."""


class KVGone(SwarmError):
    """A windowed layer has dropped keys that a rewind needs: the rows must be replayed from the start."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job."""

    payload: bytes = b""
    token: int = -1
    logprob: float = 0.0
    seconds: float = 0.0
    """Wall time of the pass the job was part of."""
    error: SwarmError | None = None


@dataclass(slots=True)
class Timings:
    """Running means of what a block takes here, in seconds; what the server announces."""

    decode_s: float = 0.0
    prefill_s: float = 0.0
    """Per block, for a chunk of 128 tokens."""
    busy_s: float = 0.0
    """Time spent computing so far."""
    rows: int = field(default=0)
    """Rows computed so far."""

    def learn(self, rows: int, blocks: int, seconds: float) -> None:
        """One pass of `rows` rows through `blocks` blocks took this long."""
        self.busy_s += seconds
        self.rows += rows
        if rows <= DECODE_ROWS:
            self.decode_s += (seconds / blocks - self.decode_s) * _SMOOTHING
        else:
            self.prefill_s += (seconds / blocks * 128 / rows - self.prefill_s) * _SMOOTHING
