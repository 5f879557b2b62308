"""Ways into the swarm that a node keeps between runs: nodes it met, in a small file per swarm.

A machine that was switched off for a night finds its way back without anybody typing an address. Several nodes of one
user share the file: each adds what it met to what is there. The file is a cache; a damaged one counts as empty.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from ..protocol.errors import ConfigError
from ..protocol.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

MAX_ADDRS: Final = 64
"""Addresses kept, the last met first."""
MAX_AGE_S: Final = 30 * 86_400.0
"""Home addresses change: what was not met for a month is dropped."""
MAX_FILE_BYTES: Final = 256 * 1024


class Remembered:
    """The file of one swarm in a folder."""

    def __init__(self, folder: Path, swarm: str) -> None:
        self._path = folder / f"peers-{swarm}.json"

    def load(self, wall: float) -> list[Multiaddr]:
        """Addresses with /p2p/<id>, the last met first. Never fails: at worst nothing is remembered."""
        return list(self._read(wall))

    def save(self, met: Iterable[Multiaddr], wall: float) -> None:
        """Put addresses met just now in front of those in the file. A folder that cannot be written is logged."""
        seen = dict.fromkeys(met, wall)
        if not seen:
            return
        for addr, when in self._read(wall).items():
            seen.setdefault(addr, when)
        newest = sorted(seen.items(), key=lambda item: -item[1])[:MAX_ADDRS]
        try:
            self._write({str(addr): round(when) for addr, when in newest})
        except OSError as exc:
            logger.warning("cannot remember peers in %s: %s", self._path, exc.strerror)

    def _read(self, wall: float) -> dict[Multiaddr, float]:
        try:
            with self._path.open("rb") as file:
                body = json.loads(file.read(MAX_FILE_BYTES))
            return dict(_entries(body, wall))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as exc:
            logger.warning("ignored %s: %s", self._path, exc)
            return {}

    def _write(self, body: Mapping[str, int]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(f".{os.getpid()}.new")
        partial.write_text(json.dumps({"addrs": body}, indent=1))
        partial.replace(self._path)


def _entries(body: Mapping[str, Mapping[str, float]], wall: float) -> Iterable[tuple[Multiaddr, float]]:
    """Checked entries of a file's body, without what is too old. Raises what _read() expects."""
    entries = sorted(((str(text), float(when)) for text, when in body["addrs"].items()), key=lambda item: -item[1])
    for text, when in entries[:MAX_ADDRS]:
        addr = Multiaddr.parse(text)
        if addr.peer_id is not None and wall - when < MAX_AGE_S:
            yield addr, min(when, wall)
