"""js-libp2p as an outside peer: installs the pinned npm set once, outside the source tree, and drives its
processes."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from helpers.outside import ECHO, outside_peer

__all__ = ["ECHO", "install", "js_peer", "npm"]

SOURCE = Path(__file__).parent.parent / "interop" / "js"
FILES = ("package.json", "package-lock.json", "polyfill.mjs", "node.mjs")
INSTALL_PATIENCE_S = 300


def npm() -> str | None:
    """Path of npm, None where there is none."""
    return shutil.which("npm")


def install(cache: Path) -> Path:
    """A folder with the peer ready to run; made anew when one of its files changes."""
    digest = hashlib.sha256(b"".join((SOURCE / name).read_bytes() for name in FILES)).hexdigest()[:16]
    folder = cache / digest
    ready = folder / "ready"
    if not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copy(SOURCE / name, folder / name)
        command = [npm() or "npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts"]
        done = subprocess.run(
            command, cwd=folder, timeout=INSTALL_PATIENCE_S, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"npm ci failed in {folder}: {done.stderr}")
        ready.touch()
    return folder


def js_peer(folder: Path, *arguments: str):
    """Run `node.mjs` with the arguments; killed and reaped at exit."""
    command = ("node", "--import", "./polyfill.mjs", "node.mjs", *arguments)
    return outside_peer(command, cwd=folder, env={**os.environ, "NODE_NO_WARNINGS": "1"})
