"""An emulated wide-area network between namespaces; wan.c does the work, this starts it and gives out addresses."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from .spaces import Space, Unavailable, checked

SOURCE = Path(__file__).with_name("wan.c")
BUILD = Path(__file__).parents[2] / "build" / "lab"
MTU = 1500
MAX_ENDS = 16

_subnets = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How one namespace is connected."""

    delay_ms: float = 0.0
    """Its share of the one-way delay; two ends' shares add up."""
    rate_mbit: float = 0.0
    """Of its uplink and of its downlink, counted in IP packets; 0 is no limit."""
    queue_ms: float = 100.0
    """Drained at its rate, a full queue takes this long; what comes when it is full is dropped."""
    loss: float = 0.0
    """Probability that a packet it sends is lost."""
    jitter_ms: float = 0.0
    """Up to this is added to the delay of each packet it sends, without reordering."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What an end has seen. Packets of up to 64 KB when nothing is to be lost."""

    sent: int
    """Packets from the namespace."""
    lost: int
    """Of them, lost by chance."""
    full_up: int
    """Of them, dropped because its uplink's queue was full."""
    full_down: int
    """Packets to it, dropped because its downlink's queue was full."""
    delivered: int
    """Packets to it."""
    bytes: int
    """Bytes to it, on the wire."""


class Wan:
    """A running network. `spaces[i]` has address 10.77.<n>.<i+1> and fd77:<n>::<i+1>."""

    def __init__(self, spaces: Sequence[Space], ends: Sequence[Access], *, seed: int = 0) -> None:
        if len(spaces) != len(ends) or not 1 < len(ends) <= MAX_ENDS:
            raise ValueError(f"{len(spaces)} spaces and {len(ends)} ends: as many of both, 2 to {MAX_ENDS}")
        self.spaces = tuple(spaces)
        self._number = next(_subnets) % 256
        self._device = f"wan{self._number}"
        # a packet that stands for 44 must not be lost at once
        gso = "0" if any(end.loss for end in ends) else "1"
        command = [str(build()), self._device, gso, str(seed), *map(_spec, spaces, ends)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if self._line() != "up":
            said = self._process.communicate()[1].strip()
            raise Unavailable(f"the emulator does not start: {said}")
        try:
            for number, space in enumerate(spaces, 1):
                self._configure(space, number)
        except BaseException:
            self.close()
            raise

    @property
    def a(self) -> Space:
        """The first namespace."""
        return self.spaces[0]

    @property
    def b(self) -> Space:
        """The second."""
        return self.spaces[1]

    def __enter__(self) -> Wan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the network away."""
        if self._process.poll() is None:
            self._process.communicate("")

    def counters(self) -> list[Counters]:
        """Per end."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return [Counters(**fields) for fields in json.loads(self._line())]

    def down(self, space: Space) -> None:
        """Cut one namespace off; nobody is told."""
        space.ip("link", "set", self._device, "down")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _configure(self, space: Space, number: int) -> None:
        four, six = f"10.77.{self._number}.{number}", f"fd77:{self._number}::{number}"
        space.ip("address", "add", f"{four}/24", "dev", self._device)
        space.ip("address", "add", f"{six}/64", "dev", self._device, "nodad")
        space.ip("link", "set", self._device, "mtu", str(MTU), "txqueuelen", "10000", "up")
        space.addresses.append(four)


def _spec(space: Space, end: Access) -> str:
    nanoseconds = [int(ms * 1e6) for ms in (end.delay_ms, end.jitter_ms, end.queue_ms)]
    delay, jitter, queue = nanoseconds
    return f"{space.name},{delay},{jitter},{end.rate_mbit * 1e6 / 8:.0f},{queue},{end.loss}"


def build() -> Path:
    """The emulator's program, compiled when its source is new. Raises Unavailable without a compiler."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    program = BUILD / f"wan-{digest}"
    if program.exists():
        return program
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler here: install gcc")
    BUILD.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{id(program)}.new")
    checked(compiler, "-O2", "-o", str(fresh), str(SOURCE))
    fresh.replace(program)
    return program
