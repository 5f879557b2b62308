"""py-libp2p as an outside peer: a pinned venv of its own, made once outside the source tree, and its
processes."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from helpers.outside import ECHO, outside_peer

__all__ = ["BUILD", "ECHO", "can_install", "install", "py_peer"]

SOURCE = Path(__file__).parent.parent / "interop" / "py"
BUILD = Path(__file__).parent.parent.parent / "build" / "interop_py"
"""Where the repository keeps what is installed."""
CONSTRAINTS = SOURCE / "constraints.txt"
REQUIREMENT = "libp2p==0.8.1"
INSTALL_PATIENCE_S = 400


def can_install() -> bool:
    """Whether its dependency fastecdsa can be compiled here: it has no wheels."""
    headers = (Path("/usr/include"), *Path("/usr/include").glob("*-linux-gnu"))
    return shutil.which("gcc") is not None and any((folder / "gmp.h").exists() for folder in headers)


def install(cache: Path = BUILD) -> Path:
    """The venv's Python, ready to run peer.py; made anew when the pinned set changes. Raises RuntimeError."""
    key = CONSTRAINTS.read_bytes() + f"{REQUIREMENT} {sys.version}".encode()
    folder = cache.absolute() / hashlib.sha256(key).hexdigest()[:16]
    python = folder / "bin" / "python"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "ready").exists():
            _run(sys.executable, "-m", "venv", "--clear", str(folder))
            _run(str(python), "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), REQUIREMENT)
            (folder / "ready").touch()
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, timeout=INSTALL_PATIENCE_S, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")


def py_peer(python: Path, *arguments: str):
    """Run `peer.py` with the arguments under that Python; killed and reaped at exit."""
    return outside_peer((str(python), str(SOURCE / "peer.py"), *arguments), cwd=SOURCE, env=dict(os.environ))
