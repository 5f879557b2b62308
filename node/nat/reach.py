"""Keeps finding out whether others can reach this node, and says so when that changes.

Candidate addresses come from what we listen on, from routers and from what peers say they see; AutoNAT servers among
the connected peers dial them; protocol/verdict.py makes a verdict of it. Addresses that proved reachable are announced.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from random import Random
from typing import Final

from ...protocol.multiaddr import Multiaddr
from ...protocol.reachability import DIAL_REQUEST, is_public, place, vicinity
from ...protocol.verdict import Assessor, Question, Server, Source, Verdict
from ..clock import Clock
from ..host import Host
from .autonat import Answering, Asking

logger = logging.getLogger(__name__)

GATHER_S: Final = 1.0
"""How long the first question waits for more peers to say where they see us."""
LOOK_S: Final = 30.0
"""Candidates and servers are looked at again at least so often."""
MAX_ASKED: Final = 4
"""Questions under way at once."""
THROUGH: Final = 3
"""Connections dialed from the listening port: enough to learn how a router shows it."""
DIALING_S: Final = 15.0
"""A dial takes no longer."""
WITNESSES: Final = 2
"""Networks whose peers must see the same address before it counts as observed, not guessed."""
ADVERTISED: Final = "reachable"

Listener = Callable[[Verdict], None]


class Reachability:
    """Run it in a task; it is safe to ask at any time."""

    def __init__(self, host: Host, *, clock: Clock, rng: Random) -> None:
        self._host = host
        self._clock = clock
        self._assessor = Assessor(rng)
        self._asking = Asking(host)
        self._answering = Answering(host, rng)
        self._mapped: tuple[Multiaddr, ...] = ()
        self._wake = asyncio.Event()
        self._asked = 0
        self._through: dict[Multiaddr, float] = {}  # dialed from the listening port, and when
        self._last = self._assessor.node(0.0)
        self.on_change: list[Listener] = []
        """Told the node's verdict when it turns: unknown, public, private."""
        self.on_news: list[Callable[[], None]] = []
        """Told whenever an answer came."""

    @property
    def verdict(self) -> Verdict:
        """The node's verdict now."""
        return self._assessor.node(self._clock.now())

    @property
    def verdicts(self) -> dict[Multiaddr, tuple[Source, Verdict]]:
        """What is known of each candidate address."""
        sources = self._assessor.candidates
        return {address: (sources[address], v) for address, v in self._assessor.verdicts(self._clock.now()).items()}

    @property
    def testers(self) -> int:
        """Connected peers that dial on request."""
        return len(self._servers())

    def mapped(self, addrs: Sequence[Multiaddr]) -> None:
        """A router lets these through to us; they replace those of the last call."""
        if tuple(addrs) != self._mapped:
            self._mapped = tuple(addrs)
            self._wake.set()

    def recheck(self) -> None:
        """The network may be another one: ask about everything again."""
        self._assessor.recheck(self._clock.now())
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        self._host.dial_from_listener(self._from_listener)
        self._asking.register()
        self._answering.register()
        unlisten = self._host.on_identify(lambda _: self._wake.set())
        try:
            await asyncio.sleep(GATHER_S)
            async with asyncio.TaskGroup() as group:
                while True:
                    self._wake.clear()
                    self._ask_what_is_due(group)
                    now = self._clock.now()
                    due = self._assessor.next_timer(self._servers(), now)
                    # with all questions under way there is nothing to do before one is answered
                    await self._sleep(LOOK_S if self._asked >= MAX_ASKED else min(LOOK_S, due - now))
        finally:
            unlisten()
            self._asking.unregister()
            self._answering.unregister()
            self._host.dial_from_listener(lambda _: False)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _ask_what_is_due(self, group: asyncio.TaskGroup) -> None:
        self._assessor.offer(self._candidates())
        self._tell()
        while self._asked < MAX_ASKED:
            question = self._assessor.next_question(self._servers(), self._clock.now())
            if question is None:
                return
            self._asked += 1
            group.create_task(self._ask(question))

    async def _ask(self, question: Question) -> None:
        try:
            outcome = await self._asking.ask(question.server.peer, question.address)
        finally:
            self._asked -= 1
        logger.debug("%s about %s: %s", question.server.peer.short, question.address, outcome)
        self._assessor.heard(question, outcome, self._clock.now())
        self._tell()
        self._wake.set()
        for listener in tuple(self.on_news):
            listener()

    def _tell(self) -> None:
        now = self._clock.now()
        own = set(self._host.bound_addrs)
        self._host.advertise(ADVERTISED, [a for a in self._assessor.reachable(now) if a not in own])
        verdict = self._assessor.node(now)
        if verdict.reach is not self._last.reach:
            logger.info("others can reach this node: %s (confidence %.1f)", verdict.reach, verdict.confidence)
            self._last = verdict
            for listener in tuple(self.on_change):
                listener(verdict)
        self._last = verdict

    # what there is

    def _servers(self) -> list[Server]:
        found: dict[Hashable, Server] = {}
        for wire in self._host.wires:
            speaks = DIAL_REQUEST in self._host.book.get(wire.remote).protocols
            if wire.is_open and speaks and not wire.address.is_relayed and is_public(wire.address.without_peer()):
                found.setdefault(wire.remote, Server(wire.remote, vicinity(wire.address), wire.from_listener))
        return list(found.values())

    def _candidates(self) -> dict[Multiaddr, Source]:
        found: dict[Multiaddr, Source] = dict.fromkeys(filter(is_public, self._mapped), Source.MAPPED)
        for address in filter(is_public, self._host.bound_addrs):
            found.setdefault(address, Source.LISTEN)
        if self._host.bound_addrs:
            self._add_observed(found)
        return found

    def _add_observed(self, found: dict[Multiaddr, Source]) -> None:
        witnesses: defaultdict[Multiaddr, set[Hashable]] = defaultdict(set)
        seen_ips: dict[Multiaddr, None] = {}
        for wire, seen in self._host.observations():
            if is_public(seen):
                seen_ips[seen] = None
                if wire.from_listener or not wire.outbound:
                    witnesses[seen].add(vicinity(wire.address))
        for address, networks in witnesses.items():
            ports = sum(place(other) == place(address) for other in witnesses)
            if len(networks) >= WITNESSES:
                found.setdefault(address, Source.OBSERVED)
            elif ports == 1:  # with more, the router shows another one to each: nobody could foresee the next
                found.setdefault(address, Source.GUESSED)
        for address in _guesses(seen_ips, self._host.bound_addrs):
            found.setdefault(address, Source.GUESSED)

    def _from_listener(self, address: Multiaddr) -> bool:
        """Few connections show how a router maps our port. More would collide, and let in everybody we dialed where a
        router only looks who that is: somebody must be left to ask."""
        now = self._clock.now()
        used = {wire.address for wire in self._host.wires if wire.from_listener}
        self._through = {addr: at for addr, at in self._through.items() if addr in used or now - at < DIALING_S}
        if not self._host.bound_addrs or not is_public(address):
            return False
        if address not in self._through and len(self._through) >= THROUGH:
            return False
        self._through[address] = now
        return True


def _guesses(seen: Iterable[Multiaddr], listening: Sequence[Multiaddr]) -> Iterable[Multiaddr]:
    """Our IPs as peers see them, each with the ports we listen on."""
    for address in seen:
        for own in listening:
            if own.ip is not None and address.ip is not None and own.ip.version == address.ip.version:
                yield Multiaddr((address.parts[0], ("tcp", str(own.port))))
