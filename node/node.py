"""Node: the whole of swarmnode as one async context manager, for the command line and for other programs alike.

It installs no signal handlers, runs no event loop of its own, and touches no global state: no torch threads, no logging
configuration. Everything it starts ends with it. Torch is loaded when blocks are served or a model's own ends are
used, not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ..protocol.errors import ConfigError, ModelNotFound, PeerUnreachable, SwarmError
from ..protocol.ids import PeerId
from ..protocol.messages import INFO_MESSAGES, INFO_PROTOCOL, GetInfo, Info
from ..protocol.multiaddr import Multiaddr
from ..protocol.report import KEY_BYTES
from ..routing.placement import choose_span
from ..routing.swarm import SwarmView
from . import lan
from .client.model import Context, RemoteModel
from .client.router import Router, SwarmModel
from .clock import Clock
from .config import NodeConfig
from .discovery import Discovery
from .framing import FrameStream
from .host import ConnectionInfo, Host
from .identity import Identity
from .models import Model, Models
from .observe import Reporter
from .remembered import Remembered
from .runtime import RuntimeFile
from .server.role import ServerRole
from .server.span import LoadProgress, ServedSpan, SpanSettings, blocks_that_fit
from .tasks import Supervisor
from .transport.base import Transport

logger = logging.getLogger(__name__)

BUILTIN_MODEL: Final = "gemma3-270m"
ASK_S: Final = 2.0
REMEMBER_S: Final = 60.0
"""How often the peers met are written down."""


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
        self._remote: dict[tuple[bytes, bool, str], RemoteModel] = {}

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
            await self._join()
            self._publish_runtime(stack)
            if self.config.persistent:
                stack.callback(self._save_peers)
            self._stack = stack.pop_all()
        return self

    async def _join(self) -> None:
        config, clock = self.config, self._clock
        self.discovery = Discovery(
            self.host, clock=clock, rng=self._rng, swarm_name=config.swarm, server_mode=config.dht_server
        )
        self._tasks.start(self.discovery.run(), "discovery")
        self.models_here = Models(self.host, config.cache_dir)
        self._router = Router(self.host, self.discovery, clock, self._rng, config.swarm)
        self._context = Context(self.host, self._router, clock, self._tasks, config.repair_timeout_s)
        await self._enter_swarm()
        if config.lan:
            self._tasks.start(lan.announce(config.swarm, self.peer_id, self.addrs), "lan")

    async def _enter_swarm(self) -> None:
        """Through the peers given, those met in earlier runs, or the local network.

        Raises PeerUnreachable when peers were given and nobody answers; else the node is the first of its swarm.
        """
        config, known = self.config, self._remembered()
        if config.peers:
            try:
                await self.discovery.bootstrap(config.peer_addrs)
            except PeerUnreachable:
                if not await self._try(known):
                    raise
                logger.warning("no peer given answers; joined through one met in an earlier run")
        elif not await self._try(known) and config.lan:
            await self._try(await lan.find(config.swarm, own=self.peer_id))
        if config.persistent:
            self._tasks.start(self._remember(), "remember peers")

    async def _try(self, addrs: Sequence[Multiaddr]) -> bool:
        """Enter through addresses that may be out of date."""
        if not addrs:
            return False
        try:
            return await self.discovery.bootstrap(addrs) > 0
        except PeerUnreachable as exc:
            logger.info("no way into the swarm: %s", exc)
            return False

    def _remembered(self) -> list[Multiaddr]:
        if not self.config.persistent:
            return []
        return [addr for addr in self._peer_file().load(self._clock.wall()) if addr.peer_id != self.peer_id]

    def _peer_file(self) -> Remembered:
        return Remembered(self.config.state_dir, self.config.swarm)

    async def _remember(self) -> None:
        """Keep the file of peers met up to date."""
        while True:
            await asyncio.sleep(REMEMBER_S)
            self._save_peers()

    def _save_peers(self) -> None:
        self._peer_file().save(self.discovery.met(), self._clock.wall())

    def _publish_runtime(self, stack: contextlib.AsyncExitStack) -> None:
        if self.config.publish_runtime:
            key = secrets.token_bytes(KEY_BYTES)
            Reporter(self.host, key)
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
        for model in self._remote.values():
            await model.close()
        self._remote.clear()
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
        progress: LoadProgress | None = None,
        opening: Callable[[str, int, int], None] | None = None,
    ) -> ServedSpan:
        """Serve blocks of a model; returns when they are announced. `span=None` chooses what the swarm lacks most.

        Raises ModelNotFound, UnsupportedModel, CorruptCheckpoint, ConfigError.
        """
        settings = SpanSettings(quant=quant, dtype=dtype, device=device, kv_bytes=self.config.kv_bytes)
        opened = await self.models_here.open(model, opening)
        if self._server is not None and any(s.model.digest == opened.digest for s in self._server.spans):
            raise ConfigError(f"this node already serves {opened.name}: start another node for another span of it")
        if span is None:
            span = await self._choose_span(opened)
        return await self._role().serve(opened, span, settings, progress)

    async def _choose_span(self, model: Model) -> tuple[int, int]:
        view = await self._view(model)
        return choose_span(view, blocks_that_fit(model), self._rng)

    def _role(self) -> ServerRole:
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
        model = await self._find_model(name)
        if local_ends is None and not _offers_ends(await self._view(model)):
            with contextlib.suppress(ModelNotFound):  # then planning says which blocks nobody serves
                model, local_ends = await self._with_files(model, name), True
        elif local_ends:
            model = await self._with_files(model, name)
        local_ends = bool(local_ends)
        key = model.digest, local_ends, dtype
        if key not in self._remote:
            self._remote[key] = RemoteModel(self._context, model, local_ends=local_ends, dtype=dtype)
        return self._remote[key]

    async def _find_model(self, name: str | None) -> Model:
        """By path, from the swarm's list, or from this machine: torch is loaded for files only."""
        if name is not None and _is_path(name):
            return await self.models_here.open(name)
        listed = await self._listed(name)
        if len(listed) > 1 and name is None:
            names = ", ".join(f"{model.name}@{model.digest.hex()[:12]}" for model in listed)
            raise ConfigError(f"the swarm serves several models: choose one with --model: {names}")
        if len(listed) > 1 and name is not None:
            return await self._among(listed, name)
        if listed:
            return await self._from_swarm(listed[0])
        return await self._from_files(name or BUILTIN_MODEL)

    async def _listed(self, name: str | None) -> list[SwarmModel]:
        """Models of the swarm that go by this name."""
        wanted, _, digest = (name or "").partition("@")
        return [
            model
            for model in await self.models()
            if name is None
            or (wanted in (model.name, model.name.rpartition("/")[2]) and model.digest.hex().startswith(digest))
        ]

    async def _among(self, listed: Sequence[SwarmModel], name: str) -> Model:
        """Several models go by one name: ours if we have its files, else the one most nodes serve."""
        with contextlib.suppress(ModelNotFound):
            ours = await self.models_here.open(name)
            if any(model.digest == ours.digest for model in listed):
                return ours
        return await self._from_swarm(listed[0])

    async def _from_swarm(self, listed: SwarmModel) -> Model:
        """A model the swarm lists, its manifest known or fetched from a server of it."""
        view = await self.view_of(listed)
        return await self.models_here.fetch(listed.digest, self._router.servers(view))

    async def _from_files(self, name: str) -> Model:
        try:
            return await self.models_here.open(name)
        except ModelNotFound as exc:
            if self.host.peers():
                raise ModelNotFound(
                    f"{exc}; nor does the swarm {self.config.swarm!r} list a model of that name"
                ) from exc
            raise

    async def _with_files(self, model: Model, name: str | None) -> Model:
        """The same model, its checkpoint opened on this machine."""
        if model.checkpoint is not None:
            return model
        opened = await self.models_here.open((name or model.name).partition("@")[0])
        if opened.digest != model.digest:
            raise ConfigError(
                f"the files of {opened.label} here are not the swarm's {model.label}: name one of the two"
            )
        return opened

    async def models(self) -> list[SwarmModel]:
        """Models the swarm serves, the most served first."""
        return await self._router.models()

    # Looking around.

    async def view(self, name: str) -> SwarmView:
        """Who serves which blocks of a model."""
        return await self._view(await self._find_model(name))

    async def view_of(self, listed: SwarmModel) -> SwarmView:
        """Who serves which blocks of a listed model. Needs no files of it, and no torch."""
        return await self._router.view(listed.name, listed.digest, listed.num_blocks, fresh=True)

    async def _view(self, model: Model) -> SwarmView:
        return await self._router.view(model.name, model.digest, model.config.num_blocks, fresh=True)

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
        )


def _is_path(name: str) -> bool:
    """A file or folder of that name is here, and it is written like a path, not like owner/name."""
    return (name.startswith((".", "~", os.sep)) or name.endswith(".gguf")) and Path(name).expanduser().exists()


def _offers_ends(view: SwarmView) -> bool:
    """Somebody embeds and somebody runs the head: a client needs only the tokenizer."""
    announced = [server.announcement for server in view.servers]
    return any(a.embed for a in announced) and any(a.head for a in announced)


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
