"""Getting connected to a peer: one dial however many callers, every known address, one clear error.

The race between addresses is in dial.py; here is what surrounds it: sharing, deadlines, names, causes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from ..protocol.errors import PeerUnreachable, SwarmError
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from .dial import DialFailed, Lookup, Race, order
from .journal import Journal
from .peerbook import PeerBook, PeerInfo
from .tasks import Supervisor
from .transport.base import Transport
from .transport.wire import Wire
from .wires import Wires

MAX_DIALS: Final = 256
"""Peers being dialed at once."""

_Causes = list[tuple[Multiaddr, str]]
_Usable = dict[Multiaddr, Transport]
_Goal = tuple[PeerId, bool]
"""A peer to connect to, and whether directly. One that dials a relay never waits for one that may use a relay."""


class Dialer:
    """Makes connections for one host."""

    def __init__(
        self, wires: Wires, book: PeerBook, tasks: Supervisor, transports: Sequence[Transport], journal: Journal
    ) -> None:
        self._wires = wires
        self._journal = journal
        self._book = book
        self._tasks = tasks
        self._transports = transports
        self._dials: dict[_Goal, asyncio.Future[PeerId]] = {}
        self.from_listener: Callable[[Multiaddr], bool] = lambda _: False
        """Whether an address is dialed from the port that others dial, to learn how a router shows that one."""

    async def connect(
        self, peer: PeerId, addrs: Sequence[Multiaddr], timeout_s: float, *, direct: bool = False
    ) -> PeerId:
        """Join the dial of this peer that is under way, or start it. Raises PeerUnreachable.

        `direct`: over no relay. Safe to cancel: the dial goes on for the others who wait for it.
        """
        pending = self._dials.get((peer, direct))
        if pending is None:  # the dial has this deadline itself, and says more when it passes
            return await asyncio.shield(self._start((peer, direct), addrs, timeout_s))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(pending)
        except TimeoutError:
            raise PeerUnreachable(f"cannot reach {peer}: no answer within {timeout_s:g} s") from None

    def _start(self, goal: _Goal, addrs: Sequence[Multiaddr], timeout_s: float) -> asyncio.Future[PeerId]:
        peer = goal[0]
        if len(self._dials) >= MAX_DIALS:
            raise PeerUnreachable(f"cannot reach {peer}: {MAX_DIALS} other peers are being dialed; try again")
        result: asyncio.Future[PeerId] = asyncio.get_running_loop().create_future()
        # when every waiter is gone nobody retrieves the exception, and that is fine
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        task = self._tasks.start(self._background(goal, addrs, timeout_s, result), f"dial {peer.short}")
        task.add_done_callback(lambda _: result.done() or result.cancel())
        self._dials[goal] = result
        return result

    async def _background(
        self, goal: _Goal, addrs: Sequence[Multiaddr], timeout_s: float, result: asyncio.Future[PeerId]
    ) -> None:
        try:
            found = await self.dial(goal[0], addrs, timeout_s, direct=goal[1])
        except PeerUnreachable as exc:
            if not result.done():
                result.set_exception(exc)
        else:
            if not result.done():
                result.set_result(found)
        finally:
            self._dials.pop(goal, None)

    async def dial(
        self, peer: PeerId | None, addrs: Sequence[Multiaddr], timeout_s: float, *, direct: bool = False
    ) -> PeerId:
        """Dial now; with None as peer whoever is there will do. Raises PeerUnreachable."""
        who = "the peer" if peer is None else str(peer)
        try:
            async with asyncio.timeout(timeout_s):
                return (await self._dial(peer, addrs, direct=direct)).remote
        except TimeoutError:
            tried = ", ".join(map(str, addrs)) or "its known addresses"
            raise PeerUnreachable(
                f"cannot reach {who}: no answer from {tried} within {timeout_s:g} s; "
                "check the address, and that the node is running and not behind a firewall"
            ) from None
        except DialFailed as exc:
            raise PeerUnreachable(f"cannot reach {who}: {exc}; check the address and that the node is running") from exc

    async def dial_bulk(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> Wire:
        """One more connection with a peer, for bulk; `addrs` empty: to those known. Raises PeerUnreachable."""
        try:
            return await self._dial(peer, addrs, bulk=True, direct=True)
        except DialFailed as exc:
            raise PeerUnreachable(f"no bulk connection to {peer}: {exc}") from exc

    async def _dial(
        self, peer: PeerId | None, addrs: Sequence[Multiaddr], *, bulk: bool = False, direct: bool = False
    ) -> Wire:
        info = self._book.get(peer) if peer is not None and not (bulk and addrs) else PeerInfo()
        wanted = [addr for addr in dict.fromkeys((*addrs, *info.addrs)) if not (direct and addr.is_relayed)]
        usable, names, causes = self._usable(peer, wanted)
        if not usable and not names and not causes:
            raise PeerUnreachable(f"cannot reach {peer or 'a peer'}: no address is known for it; pass one with --peer")
        race = Race(partial(self._attempt, peer, usable, bulk), _dispose)
        try:
            wire = await race.run(order(usable), names)
        except DialFailed as exc:
            raise DialFailed([*exc.causes, *causes]) from exc
        self._book.proven(wire.remote, wire.address)
        return wire

    def _usable(
        self, peer: PeerId | None, addrs: Sequence[Multiaddr]
    ) -> tuple[_Usable, dict[Multiaddr, Lookup], _Causes]:
        """Real addresses with the transport for each, how to look names up, and why others are neither."""
        usable: _Usable = {}
        names: dict[Multiaddr, Lookup] = {}
        causes: _Causes = []
        for address in addrs:
            if address.is_relayed and address.peer_id is None and peer is not None:
                address = address.with_peer(peer)  # a relay has to be told whom
            transport = next((t for t in self._transports if t.can_dial(address)), None)
            if transport is None:
                causes.append((address, "no transport for this kind of address"))
            elif peer is not None and address.peer_id not in (None, peer):
                causes.append((address, "names another peer"))
            elif address.is_relayed:
                usable[address] = transport
            elif address.ip is None and address.host is not None:
                names[address] = partial(self._look_up, transport, address, usable)
            else:
                usable[address.without_peer()] = transport
        return usable, names, causes

    async def _look_up(self, transport: Transport, name: Multiaddr, usable: _Usable) -> Sequence[Multiaddr]:
        """What a name stands for. Raises OSError."""
        try:
            found = await transport.resolve(name)
        except OSError as exc:
            self._journal.dialing()
            self._journal.dial_failed(name, exc)
            raise
        for address in found:
            usable.setdefault(address, transport)
        return found

    async def _attempt(
        self, peer: PeerId | None, transports: dict[Multiaddr, Transport], bulk: bool, address: Multiaddr
    ) -> Wire:
        """Dial one address and finish the handshake. Raises OSError or SwarmError."""
        if not bulk and self.from_listener(address):
            try:
                return await self._attempt_from(peer, transports, address, listener=True)
            except (ConnectionRefusedError, TimeoutError):
                raise
            except (OSError, SwarmError):
                pass  # the port is in use to there, or both of us dialed at once and nobody listened
        return await self._attempt_from(peer, transports, address, bulk=bulk)

    async def _attempt_from(
        self,
        peer: PeerId | None,
        transports: dict[Multiaddr, Transport],
        address: Multiaddr,
        *,
        bulk: bool = False,
        listener: bool = False,
    ) -> Wire:
        made: list[Wire] = []

        def factory(where: Multiaddr) -> Wire:
            made.append(self._wires.dialing(where, peer))
            made[-1].bulk = bulk
            made[-1].from_listener = listener
            return made[-1]

        self._journal.dialing()
        try:
            # a circuit takes no turn: the dial of its relay does, and two would wait for each other
            async with contextlib.nullcontext() if address.is_relayed else self._wires.dial_turns:
                await transports[address].dial(address, factory, bulk=bulk, from_listener=listener)
                await self._wires.opened(made[0])
        except BaseException as exc:
            self._journal.dial_failed(address, exc)
            for wire in made:
                wire.abort("the dial was given up")
            raise
        return made[0]


def _dispose(wire: Wire) -> None:
    wire.abort("another address of the peer answered first")
