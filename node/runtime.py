"""How other commands on this machine find a running node: a small file per node in the state directory.

The file says pid, peer id and addresses; it is written whole, removed on exit, and ignored when its process is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..protocol.errors import ConfigError
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr

MAX_FILE_BYTES: Final = 64 * 1024
MAX_NODES: Final = 256
MAX_PID: Final = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class RunningNode:
    """Another node of this user on this machine."""

    pid: int
    peer: PeerId
    swarm: str
    addrs: tuple[Multiaddr, ...]
    report_key: bytes = b""
    """Opens the report protocol (protocol/report.py); empty when the node does not offer it."""


class RuntimeFile:
    """This node's own file. `remove` when it stops."""

    def __init__(
        self, state_dir: Path, peer: PeerId, swarm: str, addrs: Sequence[Multiaddr], report_key: bytes = b""
    ) -> None:
        self._path = state_dir / f"node-{os.getpid()}-{peer.short}.json"
        body = {"pid": os.getpid(), "peer": str(peer), "swarm": swarm, "addrs": [str(addr) for addr in addrs]}
        body["report_key"] = report_key.hex()
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".new")
            partial.touch(mode=0o600)
            partial.chmod(0o600)  # left over from a crash, it may have another mode
            partial.write_text(json.dumps(body))
            partial.replace(self._path)
        except OSError as exc:
            raise ConfigError(f"cannot write {self._path}: {exc.strerror}; set a writable state directory") from exc

    def remove(self) -> None:
        """Take the file away."""
        self._path.unlink(missing_ok=True)


def running_nodes(state_dir: Path, swarm: str) -> list[RunningNode]:
    """Live nodes of this swarm on this machine, the newest first. Files of dead processes are removed."""
    found = []
    for path in sorted(_files(state_dir), key=_age)[:MAX_NODES]:
        node = _read(path)
        if node is not None and node.swarm == swarm:
            found.append(node)
    return found


def _files(state_dir: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(state_dir.glob("node-*.json"))
    return []


def _age(path: Path) -> float:
    with contextlib.suppress(OSError):
        return -path.stat().st_mtime
    return 0.0


def _read(path: Path) -> RunningNode | None:
    try:
        with path.open("rb") as file:
            body = json.loads(file.read(MAX_FILE_BYTES))
        addrs = tuple(Multiaddr.parse(text) for text in body["addrs"])
        key = bytes.fromhex(body.get("report_key", ""))
        node = RunningNode(int(body["pid"]), PeerId.parse(body["peer"]), str(body["swarm"]), addrs, key)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError):
        return None
    if _alive(node.pid):
        return node
    path.unlink(missing_ok=True)
    return None


def _alive(pid: int) -> bool:
    if not 0 < pid <= MAX_PID:  # 0 and below would mean whole groups of processes
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True
