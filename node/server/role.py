"""The server role: spans held by this node, their announcements in the DHT, and the info protocol."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from ...protocol.errors import ProtocolError
from ...protocol.messages import INFO_MESSAGES, INFO_PROTOCOL, GetInfo, Info
from ...protocol.multiaddr import Multiaddr
from ...protocol.session_log import LogBudget
from ...routing.announce import MAX_ADDRESSES, Announcement, ModelListing, State, kv_bucket
from ...routing.keys import blocks_key, groups_of_span, models_key
from ..discovery import Discovery
from ..framing import FrameStream
from ..host import Host
from ..models import Model
from ..tasks import Supervisor
from ..transport.base import Stream
from .sessions import Sessions
from .span import LoadProgress, ServedSpan, SpanSettings

logger = logging.getLogger(__name__)

ANNOUNCE_S: Final = 20.0
"""How often what is announced is brought up to date."""
MAX_RELAYED: Final = 2
"""Announced addresses over relays."""
DRAIN_GRACE_S: Final = 5.0
REQUEST_S: Final = 10.0


class ServerRole:
    """Holds spans and serves them. Announcing runs in the node's supervisor."""

    def __init__(
        self, host: Host, discovery: Discovery, tasks: Supervisor, *, swarm: str, public_name: str, log_bytes: int
    ) -> None:
        self._host = host
        self._discovery = discovery
        self._swarm = swarm
        self._public_name = public_name
        self.spans: list[ServedSpan] = []
        self.sessions = Sessions(host, self.find, LogBudget(log_bytes))
        host.handle(INFO_PROTOCOL, self._serve_info)
        self._moved = asyncio.Event()
        tasks.start(self._announce_forever(), "announce")

    async def serve(
        self, model: Model, span: tuple[int, int], settings: SpanSettings, progress: LoadProgress | None = None
    ) -> ServedSpan:
        """Load a span, serve it and announce it. Returns when it is announced."""
        served = await ServedSpan.load(model, span, settings, progress)
        self.spans.append(served)
        await self._announce(served, State.ONLINE)
        return served

    def find(self, digest: bytes, start: int, end: int) -> ServedSpan | None:
        """A span held here that can run these blocks."""
        return next((span for span in self.spans if span.covers(digest, start, end)), None)

    async def drain(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """Leave without anybody noticing: take nothing new, tell clients to move, wait until they have, withdraw."""
        for span in self.spans:
            span.draining = True
        self.sessions.drain(grace_s)
        await asyncio.gather(*(self._withdraw(span) for span in self.spans))
        try:
            async with asyncio.timeout(grace_s):
                await self.sessions.until_empty()
        except TimeoutError:
            logger.info("leaving with %d sessions still open: their clients will replace us", len(self.sessions))

    async def aclose(self) -> None:
        """Stop computing. Sessions still open end with their connections."""
        self.sessions.close()
        self._host.unhandle(INFO_PROTOCOL)
        for span in self.spans:
            await asyncio.to_thread(span.close)

    def moved(self) -> None:
        """Our addresses are others now: announce them at once."""
        self._moved.set()

    async def _announce_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_S):
                    await self._moved.wait()
            self._moved.clear()
            for span in [span for span in self.spans if not span.draining]:
                await self._announce(span, State.ONLINE)

    async def _announce(self, span: ServedSpan, state: State) -> None:
        model = span.model
        payload = self._announcement(span, state).encode()
        listing = ModelListing(
            name=model.name,
            digest=model.digest,
            num_blocks=model.config.num_blocks,
            family=model.config.family,
            hidden_size=model.config.hidden_size,
        )
        async with asyncio.TaskGroup() as tasks:
            for key in self._keys(span):
                tasks.create_task(self._discovery.publish(key, payload))
            tasks.create_task(self._discovery.publish(models_key(self._swarm), listing.encode()))

    async def _withdraw(self, span: ServedSpan) -> None:
        keys = [*self._keys(span), models_key(self._swarm)]
        await asyncio.gather(*(self._discovery.withdraw(key) for key in keys))

    def _keys(self, span: ServedSpan) -> list[bytes]:
        groups = groups_of_span(span.start, span.end)
        return [blocks_key(self._swarm, span.model.digest, group) for group in groups]

    def _announcement(self, span: ServedSpan, state: State) -> Announcement:
        timings = span.worker.timings
        return Announcement(
            model=span.model.name[-64:],
            digest=span.model.digest,
            peer=self._host.peer_id,
            addrs=announced(self._host),
            start=span.start,
            end=span.end,
            num_blocks=span.model.config.num_blocks,
            state=state,
            compute_class=span.compute_class,
            prefill_s=timings.prefill_s,
            decode_s=timings.decode_s,
            kv_free=kv_bucket(span.kv_free),
            coordinate=self._discovery.coordinate,
            embed=span.embeds,
            head=span.has_head,
            quant=span.quant,
            public_name=self._public_name,
        )

    async def _serve_info(self, stream: Stream) -> None:
        """Answer GetInfo as often as the peer asks on this stream."""
        frames = FrameStream(stream, INFO_MESSAGES)
        try:
            async with asyncio.timeout(REQUEST_S):
                while (frame := await frames.receive()) is not None:
                    if isinstance(frame[0], GetInfo):
                        await frames.send(self._info(frame[0].digest))
        except (OSError, ProtocolError, TimeoutError):
            frames.reset()

    def _info(self, digest: bytes) -> Info:
        span = next((span for span in self.spans if span.model.digest == digest), None)
        if span is None:
            return Info(start=0, end=0, kv_free=0, queue_s=0, sessions=0, decode_s=0, prefill_s=0)
        return Info(
            start=span.start,
            end=span.end,
            kv_free=span.kv_free,
            queue_s=span.worker.queue_s,
            sessions=len(self.sessions),
            decode_s=span.worker.timings.decode_s,
            prefill_s=span.worker.timings.prefill_s,
            draining=span.draining,
        )


def announced(host: Host) -> tuple[Multiaddr, ...]:
    """The addresses worth telling others, the most reachable first, some over relays among them if there are any."""
    ranked = sorted(host.listen_addrs, key=lambda addr: addr.is_loopback)
    relayed = [addr for addr in ranked if addr.is_relayed][:MAX_RELAYED]
    direct = [addr for addr in ranked if not addr.is_relayed][: MAX_ADDRESSES - len(relayed)]
    return tuple(addr.without_peer() for addr in (*direct, *relayed))
