"""Keeps one session running over a chain of servers, whatever happens to them.

The decisions are elsewhere: protocol/chain.py knows what to send and how a repair is worded, routing/ knows who takes
over. This file opens streams, feeds the first hop, collects results, and notices failures: a stream that ends, a hop
that reports its neighbour, a hop that does not answer in time. Whoever waits for a result waits through a repair.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from ...protocol.chain import ChainMachine, ChainSpec, Hop
from ...protocol.errors import NoRoute, ProtocolError, RemoteProtocolError, ServerFailed, SessionClosed, SwarmError
from ...protocol.ids import PeerId
from ...protocol.messages import (
    Data,
    Draining,
    Failed,
    Fork,
    HopFailed,
    LogGone,
    NeedReplay,
    Open,
    Probe,
    Progress,
    Report,
    Result,
    Rewire,
    Truncate,
    Want,
)
from ...protocol.wire import Message
from ...routing.planner import Hop as PlannedHop
from ...routing.planner import Plan, PlanRequest
from ..clock import Clock
from ..host import Host
from ..tasks import Supervisor
from .lessons import note_report
from .link import HopRefused, Link, open_link
from .patience import Patience
from .router import Router
from .succession import as_planned, with_repairs
from .suspicion import holdup, investigate
from .target import Target, new_session_id

logger = logging.getLogger(__name__)

RETRY_S: Final = 0.2
"""Pause between looks for a replacement when nobody has the blocks."""
FRUITLESS_REPAIRS: Final = 8
"""Repairs without any result between them before a client may give up: what takes over breaks as well."""
STUCK_PROBES: Final = 3
"""Probes in a row without any progress before the hop that holds things up is replaced."""


class ChainSession:
    """An open session: feed rows, await results, truncate. `open` first; `close` frees every server at once."""

    def __init__(self, host: Host, router: Router, clock: Clock, tasks: Supervisor, repair_timeout_s: float) -> None:
        self._host = host
        self._router = router
        self._clock = clock
        self._tasks = tasks
        self._repair_timeout_s = repair_timeout_s
        self._links: dict[Hop, Link] = {}
        self._failed: dict[Hop, str] = {}
        self._leaving: set[Hop] = set()
        self.refusing: set[PeerId] = set()
        """Servers that declined: not asked again by this session."""
        self._trouble = asyncio.Event()
        self._have_rows = asyncio.Event()
        self._results: asyncio.Queue[tuple[Result, bytes] | None] = asyncio.Queue()
        self._error: SwarmError | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._repairer: asyncio.Task[None] | None = None
        self._repairing = False
        self._patience = Patience()
        self._unproven: set[PeerId] = set()
        """Servers in the chain that no result has come through yet."""
        self._fruitless = 0
        """Repairs since the last result."""
        self._down_since: float | None = None
        """When the first failure since the last result was noticed."""
        self.repairs = 0
        """Repairs made so far."""

    async def open(self, target: Target, plan: Plan) -> list[SwarmError]:
        """Open the planned chain. Returns what went wrong; then nothing is left open, and another plan is needed."""
        self._target = target
        self._machine = ChainMachine(target.spec, [self._hop(hop) for hop in plan.hops])
        try:
            problems = await self._open_hops(self._machine.opens())
        except BaseException:  # cancelled while some hops are open already
            await self.close()
            raise
        if problems:
            await self.close()
        else:
            logger.info("session %s opened over %s", target.spec.session.hex()[:8], " -> ".join(self.route))
            self._start()
        return problems

    def _start(self) -> None:
        self._feeder = self._tasks.start(self._feed(), "chain-feed")
        self._repairer = self._tasks.start(self._repair_forever(), "chain-repair")

    @property
    def failed(self) -> set[PeerId]:
        """Servers of the chain that declined or failed and were not replaced."""
        return {PeerId(hop.peer) for hop in self._failed}

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The chain as it is now."""
        return self._machine.hops

    @property
    def route(self) -> tuple[str, ...]:
        """`peer[start:end]` of each hop, for people."""
        return tuple(f"{PeerId(hop.peer).short}[{hop.start}:{hop.end}]" for hop in self._machine.hops)

    @property
    def spec(self) -> ChainSpec:
        """The session's constants."""
        return self._machine.spec

    def position(self, lane: int = 0) -> int:
        """Rows of a lane fed so far."""
        return self._machine.position(lane)

    def feed(self, payload: bytes, count: int, want: Want, lane: int = 0) -> int:
        """Send rows down the chain, as fast as the first hop takes them; returns the position of the first."""
        self._check()
        position = self._machine.feed(payload, count, want, lane)
        self._patience.began(self._clock.now(), count)
        self._have_rows.set()
        return position

    def truncate(self, position: int, lane: int = 0) -> None:
        """Forget a lane's rows from `position` on, everywhere. Only while no result is awaited."""
        self._check()
        self._machine.truncate(position, lane)
        self._have_rows.set()

    def fork(self, source: int, target: int) -> None:
        """Make lane `target` what lane `source` is, everywhere. Only while neither has a result awaited."""
        self._check()
        self._machine.fork(source, target)
        self._have_rows.set()

    def drop(self, lane: int) -> None:
        """Forget a lane, everywhere: its memory is freed. It can be forked into, or fed from position 0, again."""
        self.truncate(0, lane)

    async def result(self) -> tuple[Result, bytes]:
        """The next result that was wanted. Waits through repairs.

        Raises ServerFailed when no replacement was found in time, SessionClosed after close. Cancel-safe.
        """
        probes = 0
        while True:
            self._check()
            try:
                async with asyncio.timeout(self._patience.deadline_s(self._rtt_s())):
                    item = await self._results.get()
            except TimeoutError:
                probes = await self._suspect(probes)
                continue
            if item is not None:
                self._patience.ended(self._clock.now())
                return item

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """End the session. Every server frees its memory when its control stream ends. Safe to call twice."""
        if isinstance(self._error, SessionClosed):
            return
        self._error = SessionClosed("the session is closed")
        tasks = [task for task in (self._feeder, self._repairer) if task is not None]
        for task in tasks:
            task.cancel()
        self._drop(list(self._links))
        self._results.put_nowait(None)

    # The way down: feeding the first hop.

    async def _feed(self) -> None:
        first = self._machine.hops[0]
        link = self._links[first]
        try:
            while True:
                while (outgoing := self._machine.next_outgoing()) is not None:
                    await link.frames.send(outgoing.message, outgoing.payload)
                self._have_rows.clear()
                await self._have_rows.wait()
        except OSError as exc:
            self._fail(first, str(exc) or type(exc).__name__)

    def _restart_feeder(self) -> None:
        if self._feeder is not None:
            self._feeder.cancel()
        self._feeder = self._tasks.start(self._feed(), "chain-feed")
        self._have_rows.set()

    # The way back: each hop's control stream.

    async def _read(self, hop: Hop, link: Link) -> None:
        reason = "it ended the session"
        try:
            while (frame := await link.frames.receive()) is not None:
                message, payload = frame
                if isinstance(message, Data | Truncate | Fork):
                    await self._pass_on(hop, message, payload)
                else:
                    self._on_message(hop, link, message, payload)
        except (OSError, ProtocolError) as exc:
            reason = str(exc) or type(exc).__name__
        self._fail(hop, reason)

    def _on_message(self, hop: Hop, link: Link, message: Message, payload: bytes) -> None:
        match message:
            case Result():
                self._on_result(hop, message, payload)
            case HopFailed(peer=peer, reason=reason):
                self._on_hop_failed(hop, peer, reason)
            case LogGone(epoch=epoch) | NeedReplay(epoch=epoch):
                self._machine.replay(epoch)
                self._have_rows.set()
            case Progress():
                link.progress = message
                link.answered.set()
            case Report():
                note_report(self._router.metrics, self._machine, hop, message, self._clock.now())
            case Failed(reason=reason):
                self._fail(hop, reason)
            case Draining():
                self._leaving.add(hop)
                self._trouble.set()
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__} from a server")

    def _on_result(self, hop: Hop, result: Result, payload: bytes) -> None:
        if hop is not self._machine.hops[-1]:
            return
        if not self._target.fits(result, payload):
            raise RemoteProtocolError("a result of the wrong form")
        if not self._machine.on_result(result):
            return
        if self._unproven or self._down_since is not None:
            self._proven()
        if result.want != Want.NOTHING:
            self._results.put_nowait((result, payload))

    def _proven(self) -> None:
        """Rows came through the whole chain as it is now."""
        for peer in self._unproven:
            self._router.succeeded(peer)
        self._unproven.clear()
        self._fruitless, self._down_since = 0, None

    def _on_hop_failed(self, reporter: Hop, peer: bytes, reason: str) -> None:
        """A hop blames a neighbour. Only a neighbour it has now: reports of replaced ones are old news.

        One that blames the hop before it got rows that make no sense. One that cannot send to the hop after it may
        only lack a way there: if we have one, we pass the rows on.
        """
        hops = self._machine.hops
        if reporter not in hops:
            return
        index = hops.index(reporter)
        if index and hops[index - 1].peer == peer:
            self._fail(hops[index - 1], reason)
        if index + 1 < len(hops) and hops[index + 1].peer == peer:
            self._tasks.start(self._relay_or_fail(reporter, hops[index + 1], reason), "chain-relay")

    async def _relay_or_fail(self, sender: Hop, receiver: Hop, reason: str) -> None:
        link = self._links.get(receiver)
        alive = link is not None and await link.probe(Probe(nonce=1), self._patience.probe_s(self._rtt_s()))
        if receiver in self._failed or sender in self._failed or self._error is not None:
            return
        if not alive or (sender, receiver) in self._machine.relayed:
            self._fail(receiver, reason)
        elif sender in self._machine.hops and receiver in self._machine.hops:
            await self._begin_relay(sender, receiver, reason)

    async def _begin_relay(self, sender: Hop, receiver: Hop, reason: str) -> None:
        peers = PeerId(sender.peer), PeerId(receiver.peer)
        logger.info("%s cannot reach %s (%s): rows between them go over this node", *(p.short for p in peers), reason)
        self._router.metrics.observe_relayed(*peers, self._clock.now())
        await self._tell(self._machine.relay(sender, receiver).rewires)
        self._have_rows.set()

    async def _pass_on(self, sender: Hop, message: Data | Truncate | Fork, payload: bytes) -> None:
        """Rows between two hops that cannot reach each other."""
        receiver = self._machine.relay_target(sender)
        link = self._links.get(receiver) if receiver else None
        if receiver is None or link is None:
            return
        try:
            await link.frames.send(message, payload)
        except OSError as exc:
            self._fail(receiver, str(exc) or type(exc).__name__)

    # Failures and their repair.

    def _fail(self, hop: Hop, reason: str) -> None:
        if hop not in self._machine.hops or hop in self._failed or self._error is not None:
            return
        logger.info("server %s (blocks %d:%d) failed: %s", PeerId(hop.peer).short, hop.start, hop.end, reason)
        self._failed[hop] = reason
        self._unproven.discard(PeerId(hop.peer))
        if self._down_since is None:
            self._down_since = self._clock.now()
        self._router.failed(PeerId(hop.peer))
        self._trouble.set()

    async def _repair_forever(self) -> None:
        while True:
            await self._trouble.wait()
            self._trouble.clear()
            self._repairing = True
            try:
                await self._repair()
            except SwarmError as exc:
                self._error = exc
                self._results.put_nowait(None)
                return
            finally:
                self._repairing = False

    async def _repair(self) -> None:
        """Replace hops until none has failed. Raises ServerFailed when time is up."""
        began = self._clock.now()
        forgive = False
        while self._bad_hops():
            await self._pace(forgive)
            try:
                hops, session = await self._replace(self._bad_hops(), forgive)
            except NoRoute as exc:
                if not self._failed:
                    self._leaving.clear()  # nobody else has the blocks: stay as long as it stays
                    return
                if self._clock.now() - began > self._repair_timeout_s:
                    raise self._gave_up(str(exc)) from exc
                forgive = True
                continue
            forgive = False
            await self._go_over(hops, session)

    async def _pace(self, forgive: bool) -> None:
        """Servers that open sessions only to break them must keep us busy neither all the time nor for ever."""
        if self._fruitless < FRUITLESS_REPAIRS:
            await asyncio.sleep(RETRY_S if forgive else 0)
            return
        if self._down_since is not None and self._clock.now() - self._down_since > self._repair_timeout_s:
            raise self._gave_up("Who took over failed as well: start another server of these blocks")
        await asyncio.sleep(RETRY_S)

    def _bad_hops(self) -> list[Hop]:
        return [hop for hop in self._machine.hops if hop in self._failed or hop in self._leaving]

    def _gave_up(self, cause: str) -> ServerFailed:
        reasons = "; ".join(
            f"{PeerId(hop.peer).short} (blocks {hop.start}:{hop.end}): {why}" for hop, why in self._failed.items()
        )
        return ServerFailed(f"no replacement within {self._repair_timeout_s:g} s for {reasons}. {cause}")

    async def _replace(self, bad: Sequence[Hop], forgive: bool, fresh: bool = False) -> tuple[list[Hop], bytes | None]:
        """The chain with its bad hops planned anew. A wholly new chain comes with a new session id.

        From memory if it can be; the swarm is asked before a server is tried that failed lately (`fresh`). `forgive`:
        nobody else had the blocks, so the swarm is asked anew and who failed just now may have come back.
        """
        view = await self._target.view(fresh or forgive)
        chain = as_planned(self._machine.hops, self._failed if forgive else ())
        peers = {planned.peer for hop, planned in zip(self._machine.hops, chain, strict=True) if hop in bad}
        repairs = self._router.repair(chain, peers, view, self._request())
        if any(repair.banned_used for repair in repairs) and not (fresh or forgive):
            return await self._replace(bad, forgive, fresh=True)
        hops = with_repairs(self._machine.hops, repairs, self._hop)
        whole = any((r.start, r.end) == (self._target.spec.start, self._target.spec.end) for r in repairs)
        return hops, new_session_id() if whole else None

    async def _go_over(self, hops: Sequence[Hop], session: bytes | None) -> None:
        """Open the fresh hops, then tell the survivors. A fresh hop that fails to open has failed like any other."""
        before = self._machine.hops
        new_first = before[0] is not hops[0]
        if new_first and self._feeder is not None:
            self._feeder.cancel()  # or it would take out the rows of the replay and send them to the old one
        repair = self._machine.repair(hops, session)
        self.repairs += 1
        self._fruitless += 1
        gone = [hop for hop in before if hop not in hops]
        self._drop(gone)
        for hop in gone:
            self._failed.pop(hop, None)
            self._leaving.discard(hop)
        await self._open_hops(repair.opens)
        for hop, rewire in repair.rewires:
            try:
                await self._links[hop].frames.send(rewire)
            except OSError as exc:
                self._fail(hop, str(exc) or type(exc).__name__)
        if new_first and hops[0] in self._links:
            self._restart_feeder()
        self._have_rows.set()

    async def _tell(self, rewires: Sequence[tuple[Hop, Rewire]]) -> None:
        """Send rewires. A hop that cannot be told has failed."""
        for hop, rewire in rewires:
            link = self._links.get(hop)
            if link is None:
                continue
            try:
                await link.frames.send(rewire)
            except OSError as exc:
                self._fail(hop, str(exc) or type(exc).__name__)

    async def _open_hops(self, opens: Sequence[tuple[Hop, Open]]) -> list[SwarmError]:
        """Open hops side by side. Returns what went wrong; the hops concerned are marked."""
        problems = await asyncio.gather(*(self._open_hop(hop, open_) for hop, open_ in opens))
        return [problem for problem in problems if problem is not None]

    async def _open_hop(self, hop: Hop, open_: Open) -> SwarmError | None:
        peer = PeerId(hop.peer)
        try:
            link = await open_link(self._host, hop, open_, self._target.max_payload)
        except HopRefused as exc:
            self.refusing.add(peer)
            self._failed[hop] = str(exc)
            return exc.cause
        except SwarmError as exc:
            self._fail(hop, str(exc))
            return exc
        self._links[hop] = link
        self._unproven.add(peer)
        link.reader = self._tasks.start(self._read(hop, link), "chain-read")
        return None

    def _drop(self, hops: Sequence[Hop]) -> None:
        for hop in hops:
            link = self._links.pop(hop, None)
            if link is not None:
                link.drop()

    # Silence.

    def _rtt_s(self) -> float:
        """The longest round trip to any hop."""
        known = (self._host.rtt(PeerId(hop.peer)) for hop in self._machine.hops)
        return max((rtt for rtt in known if rtt is not None), default=0.0)

    async def _suspect(self, probes: int) -> int:
        """No result in time: ask every hop how far it is. Returns how often in a row that showed no progress."""
        if self._repairing or self._error is not None:
            return 0
        links = dict(self._links)
        silent, moved = await investigate(links, self._patience.probe_s(self._rtt_s()))
        for hop in silent:
            self._fail(hop, "it does not answer")
        if silent or moved:
            return 0
        if probes + 1 >= STUCK_PROBES:
            self._fail(holdup(self._machine, links), "it is stuck")
            return 0
        return probes + 1

    # Between planner and protocol.

    def _request(self) -> PlanRequest:
        request = self._target.request
        return replace(request, deny=request.deny | self.refusing)

    def _hop(self, planned: PlannedHop) -> Hop:
        addresses = self._host.addrs(planned.peer)
        return Hop(
            peer=planned.peer.raw,
            start=planned.start,
            end=planned.end,
            addresses=tuple(str(address) for address in addresses[:8]),
            compute_class=planned.compute_class,
        )
