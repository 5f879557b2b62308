"""Models by name and by digest: checkpoints on this machine, and manifests fetched from peers.

A manifest holds all of a model but its weights: config, tokenizer, chat template. Who has a checkpoint computes it, who
has none fetches it from any peer by digest, checks it against the digest and keeps it in the cache directory.
Opening a checkpoint may convert or hash gigabytes, so it happens on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..kernels.models.config import ModelConfig
from ..protocol.errors import (
    CorruptCheckpoint,
    ModelNotFound,
    PeerUnreachable,
    ProtocolError,
    RemoteProtocolError,
    SwarmError,
)
from ..protocol.ids import PeerId
from ..protocol.manifest import MAX_MANIFEST_BYTES, TEMPLATE_FILE, TOKENIZER_FILE, Manifest
from ..protocol.messages import MODEL_MESSAGES, MODEL_PROTOCOL, GetManifest, ManifestReply
from .framing import FrameStream
from .host import Host
from .transport.base import Stream

if TYPE_CHECKING:
    from ..kernels.loading.checkpoint import Checkpoint
    from ..kernels.tokenizer import Tokenizer

FETCH_S: Final = 60.0
MAX_MODELS: Final = 64
"""Models one node keeps open."""
REQUEST_S: Final = 10.0


class TokenizerOnce:
    """A model's tokenizer, made when first asked for: a server never needs it, and Gemma's takes a second to parse."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._made: Tokenizer | None = None
        self._making = threading.Lock()

    def get(self) -> Tokenizer:
        """The tokenizer. Raises CorruptCheckpoint. May be called on any thread."""
        from ..kernels.tokenizer import Tokenizer  # 10 MB that a node of the DHT alone never needs

        with self._making:
            if self._made is None:
                self._made = Tokenizer(self._manifest.file(TOKENIZER_FILE))
            return self._made


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model this node knows: what it is, and its weights if they are here."""

    name: str
    digest: bytes
    config: ModelConfig
    manifest: Manifest
    text: TokenizerOnce | None
    """Its tokenizer, made when first used. None if the checkpoint came without one: hidden states only."""
    checkpoint: Checkpoint | None = None

    @property
    def label(self) -> str:
        """`name@digest`, the digest shortened."""
        return f"{self.name}@{self.digest.hex()[:12]}"

    @property
    def chat_template(self) -> str | None:
        """The model's own chat template, if it has one."""
        return self.manifest.file(TEMPLATE_FILE).decode() if self.manifest.has_file(TEMPLATE_FILE) else None


class Models:
    """The models a node has met, and the protocol by which it hands out their manifests."""

    def __init__(self, host: Host, cache_dir: Path) -> None:
        self._host = host
        self._cache_dir = cache_dir
        self._by_digest: dict[bytes, Model] = {}
        self._by_source: dict[str, Model] = {}
        self._opening = asyncio.Lock()
        host.handle(MODEL_PROTOCOL, self._serve)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._by_digest.values())

    def known(self, digest: bytes) -> Model | None:
        """A model by digest, if this node has met it."""
        return self._by_digest.get(digest)

    async def open(self, source: str, progress: Callable[[str, int, int], None] | None = None) -> Model:
        """The model in a folder, a GGUF file, a repository id or a built-in name.

        Raises ModelNotFound, UnsupportedModel or CorruptCheckpoint.
        """
        async with self._opening:
            if source not in self._by_source:
                self._by_source[source] = self._keep(await asyncio.to_thread(self._open, source, progress))
            return self._by_source[source]

    def _open(self, source: str, progress: Callable[[str, int, int], None] | None) -> Model:
        from ..kernels.loading.checkpoint import open_checkpoint  # torch is loaded here, not before

        checkpoint = open_checkpoint(source, cache_dir=self._cache_dir, progress=progress)
        manifest = checkpoint.manifest
        return Model(
            name=checkpoint.name,
            digest=manifest.digest,
            config=checkpoint.config,
            manifest=manifest,
            text=_text(manifest),
            checkpoint=checkpoint,
        )

    async def fetch(self, digest: bytes, peers: Iterable[PeerId]) -> Model:
        """The model of this digest, from memory, disk, or the first of `peers` that has its manifest.

        Raises ModelNotFound when nobody does.
        """
        known = self.known(digest) or await asyncio.to_thread(self._from_disk, digest)
        if known is not None:
            return self._keep(known)
        failures = []
        for peer in peers:
            try:
                async with asyncio.timeout(FETCH_S):
                    data = await self._request(peer, digest)
                model = await asyncio.to_thread(_model, data, digest)
            except (OSError, SwarmError, TimeoutError) as exc:
                failures.append(f"{peer.short}: {exc or type(exc).__name__}")
                continue
            await asyncio.to_thread(self._to_disk, digest, data)
            return self._keep(model)
        raise ModelNotFound(
            f"no peer could give model {digest.hex()[:12]}: {'; '.join(failures) or 'nobody serves it'}"
        )

    async def _request(self, peer: PeerId, digest: bytes) -> bytes:
        frames = FrameStream(
            await self._host.open_stream(peer, MODEL_PROTOCOL, bulk=True), MODEL_MESSAGES, MAX_MANIFEST_BYTES
        )
        try:
            await frames.send(GetManifest(digest=digest))
            match await frames.receive():
                case (ManifestReply(found=True), data):
                    return data
            raise PeerUnreachable("it does not have the manifest")
        finally:
            frames.reset()

    async def _serve(self, stream: Stream) -> None:
        frames = FrameStream(stream, MODEL_MESSAGES)
        try:
            async with asyncio.timeout(REQUEST_S):
                request = await frames.receive()
            if request is None or not isinstance(request[0], GetManifest):
                return
            model = self.known(request[0].digest)
            data = b"" if model is None else await asyncio.to_thread(model.manifest.encode)
            async with asyncio.timeout(FETCH_S):
                await frames.send(ManifestReply(found=model is not None), data)
                await frames.close()
        except (OSError, ProtocolError, TimeoutError):
            frames.reset()

    def _keep(self, model: Model) -> Model:
        kept = self._by_digest.get(model.digest)
        if kept is not None and (kept.checkpoint is not None or model.checkpoint is None):
            return kept
        if len(self._by_digest) >= MAX_MODELS:
            self._by_digest.pop(next(iter(self._by_digest)))
        self._by_digest[model.digest] = model
        return model

    def _path(self, digest: bytes) -> Path:
        return self._cache_dir / "manifests" / f"{digest.hex()}.manifest"

    def _from_disk(self, digest: bytes) -> Model | None:
        """A damaged file is as good as none: it is fetched again."""
        with contextlib.suppress(OSError, RemoteProtocolError):
            return _model(self._path(digest).read_bytes(), digest)
        return None

    def _to_disk(self, digest: bytes, data: bytes) -> None:
        """Keep a manifest for the next run; a full disk must not stop this one."""
        path = self._path(digest)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{id(data)}.new")
            partial.write_bytes(data)
            partial.replace(path)


def _model(data: bytes, digest: bytes) -> Model:
    manifest = Manifest.decode(data, digest)
    try:
        config = ModelConfig.from_json(manifest.config)
    except CorruptCheckpoint as exc:
        raise RemoteProtocolError(f"the manifest's config is no model config: {exc}") from exc
    return Model(name=manifest.name, digest=digest, config=config, manifest=manifest, text=_text(manifest))


def _text(manifest: Manifest) -> TokenizerOnce | None:
    return TokenizerOnce(manifest) if manifest.has_file(TOKENIZER_FILE) else None
