"""Real `swarmnode` processes for end-to-end tests: started, waited for, killed, never left behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

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
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


class Process:
    """One running `swarmnode` command."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        command = [sys.executable, "-P", "-m", "swarmnode.cli", *arguments]
        self.child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ready(self) -> str:
        """Wait for the READY line; returns the address it names."""
        assert self.child.stdout is not None
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if select.select([self.child.stdout], [], [], 0.2)[0]:
                line = self.child.stdout.readline()
                if line.startswith("READY "):
                    return line.split()[1]
                if not line:
                    break
        self.child.kill()
        raise AssertionError(f"no READY line: {self.child.communicate()[1]}")

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; SIGKILL also reaps."""
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(how)
        if how == signal.SIGKILL:
            self.child.communicate()

    def finish(self, timeout_s: float = 60) -> tuple[int, str, str]:
        """Wait for the end: exit code, stdout, stderr."""
        out, err = self.child.communicate(timeout=timeout_s)
        return self.child.returncode, out, err


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
        for span in spans[1:]:
            processes.append(Process([*base, "--serve", span, "--peer", addresses[0]], env))
        addresses += [process.ready() for process in processes[1:]]
        yield processes, addresses
    finally:
        for process in processes:
            process.kill()
