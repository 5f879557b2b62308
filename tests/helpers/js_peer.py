"""js-libp2p as an outside peer: installs the pinned npm set once, outside the source tree, and drives its
processes."""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "interop" / "js"
FILES = ("package.json", "package-lock.json", "polyfill.mjs", "node.mjs")
ECHO = "/swarmnode/test-echo/1.0.0"
PATIENCE_S = 60
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


class JsPeer:
    """A running peer process."""

    def __init__(self, process):
        self.process = process

    async def line(self) -> dict:
        """The next JSON object it prints."""
        async with asyncio.timeout(PATIENCE_S):
            line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("the js peer ended: " + (await self.process.stderr.read()).decode())
        return json.loads(line)


@contextlib.asynccontextmanager
async def js_peer(folder: Path, *arguments: str):
    """Run `node.mjs` with the arguments; killed and reaped at exit."""
    process = await asyncio.create_subprocess_exec(
        "node",
        "--import",
        "./polyfill.mjs",
        "node.mjs",
        *arguments,
        cwd=folder,
        env={**os.environ, "NODE_NO_WARNINGS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        limit=1 << 20,
    )
    try:
        yield JsPeer(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
