"""Who this node is: a key file with mode 0600, held under a lock while the node runs.

The default file has profiles: when another node of this user holds `node.key`, the next one takes `node-1.key`, and
so on, so that four nodes on one machine have four identities and keep them between runs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Final

from ..protocol.errors import ConfigError, RemoteProtocolError
from ..protocol.ids import PrivateKey

if sys.platform != "win32":
    import fcntl

MAX_PROFILES: Final = 64
MAX_KEY_BYTES: Final = 1024


class Identity:
    """A key and, for one from a file, the lock that keeps it ours. Close it when the node stops."""

    def __init__(self, key: PrivateKey, path: Path | None = None, lock: int | None = None) -> None:
        self.key = key
        self.path = path
        self._lock = lock

    @classmethod
    def ephemeral(cls) -> Identity:
        """A fresh key nobody keeps."""
        return cls(PrivateKey.generate())

    @classmethod
    def at(cls, path: Path) -> Identity:
        """The key in `path`, made if missing. Raises ConfigError if it is unreadable, or another node uses it."""
        lock = _lock(path)
        if lock is None:
            raise ConfigError(f"another node runs with the identity {path}: stop it, or use another --identity")
        return cls(_load_or_make(path), path, lock)

    @classmethod
    def default(cls, data_dir: Path) -> Identity:
        """The first profile of this user that no running node holds."""
        for number in range(MAX_PROFILES):
            path = data_dir / ("node.key" if number == 0 else f"node-{number}.key")
            lock = _lock(path)
            if lock is not None:
                return cls(_load_or_make(path), path, lock)
        raise ConfigError(f"{MAX_PROFILES} nodes of this user are running: name a key file with --identity")

    def close(self) -> None:
        """Give the key file up."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(path: Path) -> int | None:
    """Lock the file beside the key; None when another process holds it. The lock ends with the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    except OSError as exc:
        raise ConfigError(f"cannot use identity {path}: {exc.strerror}; choose a writable --identity") from exc
    if sys.platform != "win32":  # Windows has no advisory locks of this kind: profiles cannot be told apart there
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
    return descriptor


def _load_or_make(path: Path) -> PrivateKey:
    with contextlib.suppress(FileNotFoundError):
        return _load(path)
    key = PrivateKey.generate()
    partial = path.with_suffix(".new")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(key.marshal())
    partial.replace(path)  # never a half-written key
    return key


def _load(path: Path) -> PrivateKey:
    try:
        with path.open("rb") as file:
            return PrivateKey.unmarshal(file.read(MAX_KEY_BYTES))
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise ConfigError(f"cannot read identity {path}: {exc.strerror}") from exc
    except (ConfigError, RemoteProtocolError) as exc:
        raise ConfigError(f"{path} is not a swarmnode key ({exc}): move it away, or use another --identity") from exc
