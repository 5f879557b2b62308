"""The control stream from a client to one hop of its chain."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from ...protocol.chain import Hop
from ...protocol.errors import DeadlineExceeded, PeerUnreachable, Refused, ServerBusy, SwarmError
from ...protocol.ids import PeerId
from ...protocol.messages import SESSION_PROTOCOL, TO_CLIENT, Open, Opened, Probe, Progress, RefusalCode
from ...protocol.messages import Refused as RefusedMessage
from ...protocol.multiaddr import Multiaddr
from ..framing import FrameStream
from ..host import Host
from ..transport.base import Priority

OPEN_S: Final = 5.0
"""A server that has not answered Open in this time is taken for dead."""


class HopRefused(SwarmError):
    """A server declined the session; `cause` is what to tell the user if nobody takes it."""

    def __init__(self, cause: Refused) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(slots=True)
class Link:
    """An open session at one server, as its client sees it."""

    frames: FrameStream
    reader: asyncio.Task[None] | None = None
    progress: Progress | None = None
    """Its last answer to a probe."""
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def probe(self, probe: Probe, wait_s: float) -> bool:
        """Ask how far it is; False if no answer comes in time."""
        self.answered.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self.frames.send(probe)
                await self.answered.wait()
        except (OSError, TimeoutError):
            return False
        return True

    def drop(self) -> None:
        """Tear it down: the server frees the session when the stream is gone."""
        if self.reader is not None:
            self.reader.cancel()
        self.frames.reset()


async def open_link(host: Host, hop: Hop, request: Open, max_payload: int) -> Link:
    """Open a session at a server. Raises HopRefused when it declines, another SwarmError when it cannot be had."""
    peer = PeerId(hop.peer)
    addresses = [Multiaddr.parse(text) for text in hop.addresses]
    try:
        async with asyncio.timeout(OPEN_S):
            stream = await host.open_stream(peer, SESSION_PROTOCOL, addrs=addresses)
            return await _ask(FrameStream(stream, TO_CLIENT, max_payload), request)
    except TimeoutError as exc:
        raise DeadlineExceeded(f"server {peer.short} did not open the session within {OPEN_S:.0f} s") from exc
    except OSError as exc:
        raise PeerUnreachable(f"server {peer.short} cannot be reached: {exc}") from exc


async def _ask(frames: FrameStream, request: Open) -> Link:
    """Whatever comes but Opened, our own cancellation too, takes the stream down and the session with it."""
    try:
        frames.set_priority(Priority.DECODE)
        await frames.send(request)
        reply = await frames.receive()
        match reply:
            case (Opened(), _):
                return Link(frames)
            case (RefusedMessage() as refusal, _):
                raise HopRefused(_refused(frames.stream.remote, refusal))
        raise PeerUnreachable(f"server {frames.stream.remote.short} ended the stream instead of opening a session")
    except BaseException:
        frames.reset()
        raise


def _refused(peer: PeerId, refusal: RefusedMessage) -> Refused:
    kind = ServerBusy if refusal.code == RefusalCode.BUSY else Refused
    return kind(f"server {peer.short} declined: {refusal.reason}", refusal.retry_after_s or None)
