"""The client role: models by name, from the swarm or this machine, and who serves them. Loaded when first used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from ...protocol.errors import ConfigError, ModelNotFound
from ...routing.swarm import SwarmView
from ..config import BUILTIN_MODEL
from ..host import Host
from ..models import Model, Models
from .model import RemoteModel
from .opening import Context
from .router import SwarmModel


class ClientRole:
    """Finds models and hands out RemoteModels, one per model and kind of ends."""

    def __init__(self, host: Host, models: Models, context: Context, swarm: str) -> None:
        self._host = host
        self._models = models
        self._context = context
        self._router = context.router
        self._swarm = swarm
        self._remote: dict[tuple[bytes, bool, str], RemoteModel] = {}

    async def aclose(self) -> None:
        """End every session."""
        for model in self._remote.values():
            await model.close()
        self._remote.clear()

    async def model(self, name: str | None, local_ends: bool | None, dtype: str) -> RemoteModel:
        """See Node.model."""
        model = await self.find(name)
        if local_ends is None and not _offers_ends(await self.view(model)):
            with contextlib.suppress(ModelNotFound):  # then planning says which blocks nobody serves
                model, local_ends = await self._with_files(model, name), True
        elif local_ends:
            model = await self._with_files(model, name)
        local_ends = bool(local_ends)
        key = model.digest, local_ends, dtype
        if key not in self._remote:
            self._remote[key] = RemoteModel(self._context, model, local_ends=local_ends, dtype=dtype)
        return self._remote[key]

    async def find(self, name: str | None) -> Model:
        """By path, from the swarm's list, or from this machine: torch is loaded for files only."""
        if name is not None and _is_path(name):
            return await self._models.open(name)
        listed = await self._listed(name)
        if len(listed) > 1 and name is None:
            names = ", ".join(f"{model.name}@{model.digest.hex()[:12]}" for model in listed)
            raise ConfigError(f"the swarm serves several models: choose one with --model: {names}")
        if len(listed) > 1 and name is not None:
            return await self._among(listed, name)
        if listed:
            return await self._from_swarm(listed[0])
        return await self._from_files(name or BUILTIN_MODEL)

    async def models(self) -> list[SwarmModel]:
        """Models the swarm serves, the most served first."""
        return await self._router.models()

    async def view(self, model: Model) -> SwarmView:
        """Who serves which blocks of a model now."""
        return await self._router.view(model.name, model.digest, model.config.num_blocks, fresh=True)

    async def view_of(self, listed: SwarmModel) -> SwarmView:
        """Who serves which blocks of a listed model now."""
        return await self._router.view(listed.name, listed.digest, listed.num_blocks, fresh=True)

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
            ours = await self._models.open(name)
            if any(model.digest == ours.digest for model in listed):
                return ours
        return await self._from_swarm(listed[0])

    async def _from_swarm(self, listed: SwarmModel) -> Model:
        """A model the swarm lists, its manifest known or fetched from a server of it."""
        view = await self.view_of(listed)
        return await self._models.fetch(listed.digest, self._router.servers(view))

    async def _from_files(self, name: str) -> Model:
        try:
            return await self._models.open(name)
        except ModelNotFound as exc:
            if self._host.peers():
                raise ModelNotFound(f"{exc}; nor does the swarm {self._swarm!r} list a model of that name") from exc
            raise

    async def _with_files(self, model: Model, name: str | None) -> Model:
        """The same model, its checkpoint opened on this machine."""
        if model.checkpoint is not None:
            return model
        opened = await self._models.open((name or model.name).partition("@")[0])
        if opened.digest != model.digest:
            raise ConfigError(
                f"the files of {opened.label} here are not the swarm's {model.label}: name one of the two"
            )
        return opened


def _is_path(name: str) -> bool:
    """A file or folder of that name is here, and it is written like a path, not like owner/name."""
    return (name.startswith((".", "~", os.sep)) or name.endswith(".gguf")) and Path(name).expanduser().exists()


def _offers_ends(view: SwarmView) -> bool:
    """Somebody embeds and somebody runs the head: a client needs only the tokenizer."""
    announced = [server.announcement for server in view.servers]
    return any(a.embed for a in announced) and any(a.head for a in announced)
