"""A process of another libp2p implementation: takes one task per line, prints one JSON object per line."""

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ECHO = "/swarmnode/test-echo/1.0.0"
"""The echo protocol that every outside peer speaks; see tests/interop/js/node.mjs."""
PATIENCE_S = 60


class OutsidePeer:
    """A running peer process."""

    def __init__(self, process):
        self.process = process

    async def line(self) -> dict:
        """The next JSON object it prints."""
        async with asyncio.timeout(PATIENCE_S):
            line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("the outside peer ended: " + (await self.process.stderr.read()).decode())
        return json.loads(line)

    async def do(self, task: str) -> dict:
        """Have it do one of its tasks; what it says when that is done. See tests/interop/js/node.mjs."""
        self.process.stdin.write(task.encode() + b"\n")
        await self.process.stdin.drain()
        return await self.line()


@contextlib.asynccontextmanager
async def outside_peer(command: Sequence[str], *, cwd: Path, env: Mapping[str, str]):
    """Run the command; killed and reaped at exit."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, limit=1 << 20
    )
    try:
        yield OutsidePeer(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
