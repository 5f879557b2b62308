"""Logging for processes that are a node: one line per event on stderr.

A node inside another program sets up nothing.
"""

from __future__ import annotations

import logging
import sys
from typing import Final, TextIO

_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)
_FORMAT: Final = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


def configure_logging(verbosity: int = 0, stream: TextIO | None = None) -> None:
    """Send our records to `stream` (default stderr): 0 warnings, 1 also what operators want, 2 everything.

    Only the `swarmnode` logger is touched; calling again replaces what an earlier call set up.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_OneLine(_FORMAT, datefmt="%H:%M:%S"))
    logger = logging.getLogger("swarmnode")
    logger.handlers = [handler]
    logger.setLevel(_LEVELS[max(0, min(verbosity, len(_LEVELS) - 1))])
    logger.propagate = False


class _OneLine(logging.Formatter):
    """Drops the package's name, and keeps peers' text from breaking lines."""

    def format(self, record: logging.LogRecord) -> str:
        record.name = record.name.removeprefix("swarmnode.")
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = "".join(letter if letter.isprintable() else "?" for letter in record.message)
        return super().formatMessage(record)
