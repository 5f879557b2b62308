"""Network namespaces for tests and benches: small internets on one machine, gone when the test is.

    with Lab() as lab:
        link = lab.wan(delay_ms=50, rate_mbit=100)
        lab.run(link.a, ["ip", "address"])

Everything in a Lab has names of its own, so labs of several processes live side by side, and whatever a killed
process left is removed by the next one. Needs Linux, root and iproute2; Lab() raises Unavailable otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .wan import Access, Wan

PREFIX = "swarmlab"
NAMES = Path("/run/netns")
GONE_S = 5.0
"""How long a terminated process may take before it is killed."""
CLONE_NEWNET = 0x40000000

_serial = itertools.count(1)


class Unavailable(Exception):
    """This machine cannot run a lab; the message says why."""


class Space:
    """One network namespace: a machine of its own, as far as the network goes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.addresses: list[str] = []
        """Its IPv4 addresses, in the order they were given."""

    def __repr__(self) -> str:
        return f"<space {self.name} {' '.join(self.addresses)}>"

    @property
    def address(self) -> str:
        """Its first IPv4 address."""
        return self.addresses[0]

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` inside."""
        return ["ip", "netns", "exec", self.name, *argv]

    def ip(self, *argv: str) -> None:
        """Run `ip` on it."""
        checked("ip", "-n", self.name, *argv)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is inside: sockets made now belong to it for good, whoever uses them later."""
        with open("/proc/thread-self/ns/net") as home, open(NAMES / self.name) as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def socket(self, *args: Any) -> socket.socket:
        """A socket of this namespace, in this process."""
        with self.entered():
            return socket.socket(*args)

    def sysctl(self, name: str, value: object) -> None:
        """Set a network setting that each namespace has for itself, say net.ipv4.ip_forward."""
        with self.entered():
            Path("/proc/sys", *name.split(".")).write_text(str(value))


class Lab:
    """Owns namespaces, links and the processes in them; all end with it."""

    def __init__(self) -> None:
        require()
        self._stack = contextlib.ExitStack()
        self._name = f"{PREFIX}-{os.getpid()}-{next(_serial)}"
        self.spaces: list[Space] = []

    def __enter__(self) -> Lab:
        _sweep()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self.spaces.clear()

    def space(self, label: str) -> Space:
        """A new namespace, connected to nothing."""
        made = Space(f"{self._name}-{label}")
        checked("ip", "netns", "add", made.name)
        self._stack.callback(_delete, made.name)
        made.ip("link", "set", "lo", "up")
        self.spaces.append(made)
        return made

    def wan(
        self,
        ends: int | Sequence[Access] = 2,
        *,
        spaces: Sequence[Space] | None = None,
        delay_ms: float = 0.0,
        rate_mbit: float = 0.0,
        queue_ms: float = 100.0,
        loss: float = 0.0,
        jitter_ms: float = 0.0,
        seed: int = 0,
    ) -> Wan:
        """Join namespaces (new ones unless given) by an emulated network; see wan.Wan for the figures.

        `delay_ms` is one way between any two of them, half of it at each end. For ends that differ, pass an
        Access for each.
        """
        from .wan import Access, Wan

        if isinstance(ends, int):
            each = Access(delay_ms=delay_ms / 2, rate_mbit=rate_mbit, queue_ms=queue_ms, loss=loss, jitter_ms=jitter_ms)
            ends = [each] * (len(spaces) if spaces else ends)
        if spaces is None:
            spaces = [self.space(f"w{len(self.spaces)}") for _ in ends]
        return self._stack.enter_context(Wan(spaces, ends, seed=seed))

    def run(self, space: Space, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end; raises CalledProcessError when it fails."""
        options.setdefault("check", True)
        return subprocess.run(space.command(argv), text=True, capture_output=True, **options)

    def start(self, space: Space, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command inside; it is ended with the lab."""
        process = subprocess.Popen(space.command(argv), text=True, **options)
        self._stack.callback(_end, process)
        return process


def require() -> None:
    """Raises Unavailable unless namespaces can be made here."""
    if sys.platform != "linux":
        raise Unavailable("network namespaces are a Linux thing")
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    if shutil.which("ip") is None:
        raise Unavailable("the command ip is missing: install iproute2")


def checked(*argv: str, text: str | None = None) -> str:
    """Run a tool; its output. Raises Unavailable with what the tool says when it fails."""
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns failed")


def _delete(name: str) -> None:
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=GONE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _sweep() -> None:
    """Delete the namespaces of processes that are no more."""
    for path in NAMES.glob(f"{PREFIX}-*"):
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _delete(path.name)
