"""Real `swarmnode` processes for end-to-end tests: started, waited for, killed, never left behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.spaces import Space

READY_S = 90


def environment(home: Path, cache: Path, threads: int = 1) -> dict[str, str]:
    """A user of their own: keys, state and settings under `home`; converted weights shared under `cache`."""
    return {
        **os.environ,
        "HOME": str(home),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "XDG_CACHE_HOME": str(cache),
        "SWARMNODE_CACHE_DIR": str(cache),
        "SWARMNODE_LAN": "no",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


class Process:
    """One running `swarmnode` command, in a network namespace if one is given.

    Its stderr goes to a file, so that it can never wait for us to read.
    """

    def __init__(self, arguments: list[str], env: dict[str, str], space: Space | None = None) -> None:
        command = [sys.executable, "-P", "-m", "swarmnode.cli", *arguments]
        if space is not None:
            command = space.command(command)
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=self._stderr, text=True)

    def line(self) -> str:
        """The next line of stdout; empty when it ended. Fails after READY_S without any."""
        assert self.child.stdout is not None
        if not select.select([self.child.stdout], [], [], READY_S)[0]:
            raise AssertionError(f"no line of output in {READY_S} s: {self.stderr()}")
        return self.child.stdout.readline()

    def ready(self) -> str:
        """Wait for the READY line; returns the address it names."""
        line = self.line()
        if not line.startswith("READY "):
            self.child.kill()
            raise AssertionError(f"no READY line: {line!r} {self.finish()[2]}")
        return line.split()[1]

    def stderr(self) -> str:
        """What it wrote there so far."""
        self._stderr.seek(0)
        return self._stderr.read()

    def says(self, text: str) -> None:
        """Wait until it has written this on stderr."""
        for _ in range(READY_S * 20):
            if text in self.stderr():
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(0.05)
        raise AssertionError(f"no {text!r} in {self.stderr()!r}")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; SIGKILL also reaps."""
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(how)
        if how == signal.SIGKILL:
            self.finish()

    def finish(self, timeout_s: float = 60) -> tuple[int, str, str]:
        """Wait for the end: exit code, stdout, stderr."""
        if self._stderr.closed:
            return self.child.returncode, "", ""
        out, _ = self.child.communicate(timeout=timeout_s)
        err = self.stderr()
        self._stderr.close()
        return self.child.returncode, out, err


@dataclass(frozen=True, eq=False)
class Server:
    """A `swarmnode join` that serves a span."""

    process: Process
    span: tuple[int, int]
    address: str

    @property
    def peer(self) -> str:
        """Its peer id."""
        return self.address.rpartition("/")[2]


class Servers:
    """A swarm of processes that tests kill and fill up again. `stop` kills the rest."""

    def __init__(self, env: dict[str, str], *options: str, model: str = "gemma3-270m") -> None:
        self.env = env
        self.running: list[Server] = []
        self._command = ["join", model, "--listen", "/ip4/127.0.0.1/tcp/0", *options]

    @property
    def address(self) -> str:
        """Where to join."""
        return self.running[0].address

    def start(self, *spans: tuple[int, int]) -> list[Server]:
        """Start servers side by side (the very first alone: others join through it) and wait until they are ready."""
        started: list[Server] = []
        if not self.running:
            started, spans = self._launch(spans[:1]), spans[1:]
        started += self._launch(spans)
        return started

    def _launch(self, spans: Sequence[tuple[int, int]]) -> list[Server]:
        peer = ["--peer", self.address] if self.running else []
        processes = [Process([*self._command, *peer, "--serve", f"{start}:{end}"], self.env) for start, end in spans]
        try:
            started = [Server(process, span, process.ready()) for process, span in zip(processes, spans, strict=True)]
        except BaseException:
            for process in processes:
                process.kill()
            raise
        self.running += started
        return started

    def ensure(self, *spans: tuple[int, int]) -> None:
        """Start what is missing of these."""
        missing = Counter(spans) - Counter(server.span for server in self.running)
        self.start(*missing.elements())

    def by_peer(self, suffix: str) -> Server:
        """The server whose peer id ends like this."""
        return next(server for server in self.running if server.peer.endswith(suffix))

    def kill(self, server: Server, how: signal.Signals = signal.SIGKILL) -> None:
        """Signal a server; one that is killed or stopped no longer counts as running."""
        server.process.kill(how)
        self.running.remove(server)

    def stop(self) -> None:
        """Kill all."""
        for server in self.running:
            server.process.kill()
        self.running.clear()


@contextlib.contextmanager
def swarm(env: dict[str, str], spans: list[str], *options: str, model: str = "gemma3-270m"):
    """Servers of the given spans on loopback, joined through the first; yields (processes, addresses)."""
    processes: list[Process] = []
    addresses: list[str] = []
    base = ["join", model, "--listen", "/ip4/127.0.0.1/tcp/0", *options]
    try:
        for span in spans[:1]:
            processes.append(Process([*base, "--serve", span], env))
            addresses.append(processes[-1].ready())
        others = [[*base, "--serve", span, "--peer", addresses[0]] for span in spans[1:]]
        processes.extend(Process(command, env) for command in others)
        addresses += [process.ready() for process in processes[1:]]
        yield processes, addresses
    finally:
        for process in processes:
            process.kill()
