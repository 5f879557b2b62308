"""Node: the whole of swarmnode as one async context manager, for the command line and for other programs alike.

It installs no signal handlers, runs no event loop of its own, and touches no global state: no torch threads, no logging
configuration. Everything it starts ends with it. Torch is loaded when blocks are served or a model's own ends are
used, not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ..protocol.errors import ConfigError, SwarmError
from ..protocol.ids import PeerId
from ..protocol.multiaddr import Multiaddr
from ..protocol.report import KEY_BYTES
from ..protocol.verdict import Reach, Verdict
from . import lan
from .clock import Clock
from .config import NodeConfig
from .discovery import Discovery
from .framing import FrameStream
from .host import ConnectionInfo, Host
from .identity import Identity
from .joining import Joining
from .observe import Reporter
from .relay.keeper import PlaceEvent, Turn
from .relay.role import Relaying, RelayRole
from .runtime import RuntimeFile
from .tasks import Supervisor
from .transport.base import Transport

if TYPE_CHECKING:  # a node that neither serves nor uses models loads none of these
    from ..protocol.messages import Info
    from ..routing.swarm import SwarmView
    from .client.model import RemoteModel
    from .client.role import ClientRole
    from .client.router import SwarmModel
    from .models import Model, Models
    from .nat.service import Nat
    from .server.role import ServerRole
    from .server.span import LoadProgress, ServedSpan

logger = logging.getLogger(__name__)

ASK_S: Final = 2.0
RELAYS_S: Final = 5.0
"""How long a start waits for places at relays; they are looked for on."""
_REACH: Final = {"public": Reach.PUBLIC, "private": Reach.PRIVATE}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanStatus:
    """A span this node serves."""

    model: str
    digest: str
    start: int
    end: int
    num_blocks: int
    quant: str
    compute_class: str
    kv_free_tokens: int
    sessions: int
    rows_computed: int
    busy_s: float
    decode_s: float
    """Per block and token."""
    prefill_s: float
    """Per block and 128 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """One snapshot of a node."""

    peer_id: str
    swarm: str
    addrs: tuple[str, ...]
    peers: int
    """Open connections."""
    known_nodes: int
    """Nodes in the DHT's routing table."""
    sessions: int
    spans: tuple[SpanStatus, ...]
    relaying: Relaying
    """What it passes on for others, and its own addresses through relays."""


class Node:
    """A swarm node. `async with Node(NodeConfig(...)) as node: ...`"""

    def __init__(
        self,
        config: NodeConfig | None = None,
        *,
        transports: Sequence[Transport] | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.config = config or NodeConfig()
        self._transports = transports
        self._clock = clock or Clock()
        self._rng = rng or random.Random()
        self._stack = contextlib.AsyncExitStack()
        self._server: ServerRole | None = None
        self._client: ClientRole | None = None
        self._models: Models | None = None
        self.nat: Nat | None = None
        """What is known of the network around the node; None where it does not matter."""

    async def __aenter__(self) -> Self:
        """Listen, join the swarm through the peers given. Raises ConfigError, PeerUnreachable."""
        async with contextlib.AsyncExitStack() as stack:
            identity = self._identity()
            stack.callback(identity.close)
            self.host = await stack.enter_async_context(
                Host(
                    identity.key,
                    listen=self.config.listen_addrs,
                    allow=self.config.allow,
                    transports=self._transports,
                    clock=self._clock,
                    rng=self._rng,
                    trace_dir=self.config.trace_dir,
                )
            )
            self._tasks = await stack.enter_async_context(Supervisor("node"))
            await self._look_around(stack)
            await self._join()
            self._publish_runtime(stack)
            if self.config.persistent:
                stack.callback(self._joining.save)
            self._stack = stack.pop_all()
        return self

    async def _look_around(self, stack: contextlib.AsyncExitStack) -> None:
        """Find out from now on whether others can dial us, and have the router let them."""
        if self.config.checks_reachability:
            from .nat.service import Nat

            nat = Nat(self.host, self.config, clock=self._clock, rng=self._rng)
            self.nat = await stack.enter_async_context(nat)

    def _reached(self, verdict: Verdict) -> None:
        """It has turned out whether others can dial us."""
        if self.config.dht_server:
            self.discovery.serve(verdict.reach is not Reach.PRIVATE)
        self.relaying.set_reach(verdict.reach)

    async def _join(self) -> None:
        config, clock = self.config, self._clock
        serves = config.dht_server and config.reachability != "private"
        self.discovery = Discovery(self.host, clock=clock, rng=self._rng, swarm_name=config.swarm, server_mode=serves)
        self.relaying = self._relay_role()
        if self.nat is not None:
            self.nat.on_change(self._reached)
        self._tasks.start(self.discovery.run(), "discovery")
        self._joining = Joining(config, self.discovery, clock, self.peer_id)
        self._tasks.start(self.relaying.run(), "relays")
        await self._joining.enter()
        if config.relays or config.reachability == "private":
            await self.relaying.settled(RELAYS_S)
        if config.persistent:
            self._tasks.start(self._joining.save_forever(), "remember peers")
        if config.lan:
            self._tasks.start(lan.announce(config.swarm, self.peer_id, self.addrs), "lan")

    def _relay_role(self) -> RelayRole:
        config = self.config
        role = RelayRole(
            self.host,
            self.discovery,
            rng=self._rng,
            mode=config.relay,
            named=config.relay_addrs,
            reach=_REACH.get(config.reachability, Reach.UNKNOWN),
            limits=config.relay_limits,
            swarm=config.swarm,
        )
        role.on_place(self._moved)
        return role

    def _moved(self, event: PlaceEvent) -> None:
        """A place at a relay was gained or lost: others must know soon."""
        if self._server is not None and event.turn is not Turn.RENEWED:
            self._server.moved()

    def _publish_runtime(self, stack: contextlib.AsyncExitStack) -> None:
        if self.config.publish_runtime:
            key = secrets.token_bytes(KEY_BYTES)
            Reporter(self.host, key, lambda: {"relaying": asdict(self.relaying.status())})
            file = RuntimeFile(self.config.state_dir, self.peer_id, self.config.swarm, self.addrs, key)
            stack.callback(file.remove)

    def _identity(self) -> Identity:
        if self.config.identity is not None:
            return Identity.at(Path(self.config.identity))
        return Identity.default(self.config.data_dir) if self.config.persistent else Identity.ephemeral()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Leave at once; see `drain` for leaving without anybody noticing. Safe to call twice."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        if self._server is not None:
            await self._server.aclose()
            self._server = None
        await self._stack.aclose()

    @property
    def peer_id(self) -> PeerId:
        """This node's id."""
        return self.host.peer_id

    @property
    def addrs(self) -> tuple[Multiaddr, ...]:
        """Addresses others can dial, with /p2p/<id>: what to give to their --peer."""
        return self.host.listen_addrs

    # The server role.

    async def serve(
        self,
        model: str,
        *,
        span: tuple[int, int] | None = None,
        quant: str | None = None,
        dtype: str = "bf16",
        device: str = "cpu",
        kv: str = "full",
        share_prefixes: str = "all",
        progress: LoadProgress | None = None,
        opening: Callable[[str, int, int], None] | None = None,
    ) -> ServedSpan:
        """Serve blocks of a model; returns when they are announced. `span=None` chooses what the swarm lacks most.

        Raises ModelNotFound, UnsupportedModel, CorruptCheckpoint, ConfigError.
        """
        from .server.span import SpanSettings

        settings = SpanSettings(
            quant=quant,
            dtype=dtype,
            device=device,
            kv_bytes=self.config.kv_bytes,
            kv=kv,
            share_prefixes=share_prefixes,
        )
        opened = await self._models_here().open(model, opening)
        if self._server is not None and any(s.model.digest == opened.digest for s in self._server.spans):
            raise ConfigError(f"this node already serves {opened.name}: start another node for another span of it")
        if span is None:
            span = await self._choose_span(opened)
        return await self._server_role().serve(opened, span, settings, progress)

    async def _choose_span(self, model: Model) -> tuple[int, int]:
        from ..routing.placement import choose_span
        from .server.span import blocks_that_fit

        return choose_span(await self._client_role().view(model), blocks_that_fit(model), self._rng)

    def _server_role(self) -> ServerRole:
        from .server.role import ServerRole

        if self._server is None:
            config = self.config
            self._server = ServerRole(
                self.host,
                self.discovery,
                self._tasks,
                swarm=config.swarm,
                public_name=config.public_name,
                log_bytes=config.log_bytes,
            )
        return self._server

    def _models_here(self) -> Models:
        from .models import Models

        if self._models is None:
            self._models = Models(self.host, self.config.cache_dir)
        return self._models

    async def drain(self) -> None:
        """Leave the swarm without anybody noticing: sessions move to other servers, records are withdrawn."""
        if self._server is not None:
            await self._server.drain()
        await self.discovery.leave()

    # The client role.

    async def model(
        self, name: str | None = None, *, local_ends: bool | None = None, dtype: str = "bf16"
    ) -> RemoteModel:
        """A model to use: a local path, a name the swarm lists (`name@digest` to be exact), or a local name.

        None: the only model the swarm serves. Embedding and LM head run at servers that offer them, else here if the
        model's files are here; `local_ends` says which. Raises ModelNotFound, ConfigError.
        """
        return await self._client_role().model(name, local_ends, dtype)

    async def models(self) -> list[SwarmModel]:
        """Models the swarm serves, the most served first."""
        return await self._client_role().models()

    def _client_role(self) -> ClientRole:
        from .client.model import Context
        from .client.role import ClientRole
        from .client.router import Router

        if self._client is None:
            config = self.config
            router = Router(self.host, self.discovery, self._clock, self._rng, config.swarm)
            models = self._models_here()
            context = Context(self.host, router, self._clock, self._tasks, config.repair_timeout_s, models)
            self._client = ClientRole(self.host, models, context, config.swarm)
        return self._client

    # Looking around.

    async def view(self, name: str) -> SwarmView:
        """Who serves which blocks of a model."""
        role = self._client_role()
        return await role.view(await role.find(name))

    async def view_of(self, listed: SwarmModel) -> SwarmView:
        """Who serves which blocks of a listed model. Needs no files of it, and no torch."""
        return await self._client_role().view_of(listed)

    async def peers(self) -> Sequence[ConnectionInfo]:
        """Open connections."""
        return self.host.connections()

    async def ping(self, addr: str) -> float:
        """Round trip in seconds to the node at a multiaddr, its id checked. Raises PeerUnreachable."""
        address = Multiaddr.parse(addr)
        peer = await self.host.connect(address.peer_id, [address])
        return await self.host.ping(peer)

    async def info(self, peer: PeerId, digest: bytes) -> Info | None:
        """A server's live state, asked from it; None if it does not answer."""
        from ..protocol.messages import INFO_MESSAGES, INFO_PROTOCOL, GetInfo, Info

        try:
            async with asyncio.timeout(ASK_S):
                frames = FrameStream(await self.host.open_stream(peer, INFO_PROTOCOL), INFO_MESSAGES)
                try:
                    await frames.send(GetInfo(digest=digest))
                    answer = await frames.receive()
                finally:
                    frames.reset()
        except (OSError, SwarmError, TimeoutError):
            return None
        return answer[0] if answer is not None and isinstance(answer[0], Info) else None

    async def status(self) -> NodeStatus:
        """One typed snapshot: addresses, peers, spans, sessions."""
        server = self._server
        return NodeStatus(
            peer_id=str(self.peer_id),
            swarm=self.config.swarm,
            addrs=tuple(str(addr) for addr in self.addrs),
            peers=len(self.host.peers()),
            known_nodes=len(self.discovery.peers()),
            sessions=len(server.sessions) if server else 0,
            spans=tuple(_span_status(span, len(server.sessions)) for span in server.spans) if server else (),
            relaying=self.relaying.status(),
        )


def _span_status(span: ServedSpan, sessions: int) -> SpanStatus:
    timings = span.worker.timings
    return SpanStatus(
        model=span.model.name,
        digest=span.model.digest.hex(),
        start=span.start,
        end=span.end,
        num_blocks=span.model.config.num_blocks,
        quant=span.quant,
        compute_class=span.compute_class.hex(),
        kv_free_tokens=span.kv_free,
        sessions=sessions,
        rows_computed=timings.rows,
        busy_s=timings.busy_s,
        decode_s=timings.decode_s,
        prefill_s=timings.prefill_s,
    )
