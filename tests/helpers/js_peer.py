"""js-libp2p as an outside peer: installs the pinned npm set once, outside the source tree, and drives its
processes."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock
from helpers.outside import ECHO, outside_peer

__all__ = ["BUILD", "ECHO", "install", "js_peer", "npm"]

SOURCE = Path(__file__).parent.parent / "interop" / "js"
BUILD = Path(__file__).parent.parent.parent / "build" / "interop_js"
"""Where the repository keeps what is installed."""
PINS = ("package.json", "package-lock.json")
SCRIPTS = ("polyfill.mjs", "node.mjs")
INSTALL = (
    *("--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts", "--prefer-offline"),
    *("--fetch-retries=1", "--fetch-retry-mintimeout=1000"),  # without a network, know it soon
)
INSTALL_PATIENCE_S = 300


def npm() -> str | None:
    """Path of npm, None where there is none."""
    return shutil.which("npm")


def install(cache: Path = BUILD) -> Path:
    """A folder with the peer ready to run; made anew when the pinned set changes. Raises RuntimeError."""
    digest = hashlib.sha256(b"".join((SOURCE / name).read_bytes() for name in PINS)).hexdigest()[:16]
    folder = cache.absolute() / digest
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        for name in (*PINS, *SCRIPTS):
            shutil.copy(SOURCE / name, folder / name)
        if not (folder / "ready").exists():
            done = subprocess.run(
                [npm() or "npm", "ci", *INSTALL],
                cwd=folder,
                timeout=INSTALL_PATIENCE_S,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"npm ci failed in {folder}: {done.stderr}")
            (folder / "ready").touch()
    return folder


def js_peer(folder: Path, *arguments: str):
    """Run `node.mjs` with the arguments; killed and reaped at exit."""
    command = ("node", "--import", "./polyfill.mjs", "node.mjs", *arguments)
    return outside_peer(command, cwd=folder, env=environment())


def environment() -> dict[str, str]:
    """What the processes run under."""
    return {**os.environ, "NODE_NO_WARNINGS": "1"}
