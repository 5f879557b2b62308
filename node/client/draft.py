"""The draft model of a generation, on a thread of its own. Torch-free until one is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from ...protocol.errors import ConfigError, ServerBusy, UnsupportedModel
from ...protocol.sampling import SamplingParams
from ..models import Model

if TYPE_CHECKING:
    from ...kernels.draft import Drafter

T = TypeVar("T")


class DraftModel:
    """A whole small model in this process. Make one with `load`; `close` ends its thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft-model")
        self._drafter: Drafter | None = None

    @classmethod
    async def load(cls, model: Model, target: Model, dtype: str) -> DraftModel:
        """Load `model` to guess for `target`. Raises ConfigError when their tokenizers differ."""
        await asyncio.to_thread(_check_same_tokens, model, target)
        draft = cls(model.name)
        await draft._run(lambda: draft._load(model, dtype))
        return draft

    def _load(self, model: Model, dtype: str) -> None:
        from ...kernels.draft import Drafter  # torch is loaded here, not before
        from ...kernels.engine import DTYPES

        assert model.checkpoint is not None
        self._drafter = Drafter(model.checkpoint, dtype=DTYPES[dtype])

    async def guess(self, key: object, history: Sequence[int], count: int, params: SamplingParams) -> list[int]:
        """What it would write after `history`; nothing when it has no memory left for this sequence."""
        known = list(history)

        def work() -> list[int]:
            assert self._drafter is not None
            try:
                return self._drafter.guess(key, known, count, params)
            except ServerBusy:
                return []

        return await self._run(work)

    async def free(self, key: object) -> None:
        """Forget a sequence."""

        def work() -> None:
            assert self._drafter is not None
            self._drafter.free(key)

        await self._run(work)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """End the thread, after what it is doing. Blocks for that long."""
        self._thread.shutdown()


def _check_same_tokens(model: Model, target: Model) -> None:
    """Raises unless every token has the same id in both: a guess travels as an id."""
    if model.text is None or target.text is None:
        raise UnsupportedModel(f"{(model if model.text is None else target).name} has no tokenizer: it cannot draft")
    if not model.text.get().same_tokens(target.text.get()):
        raise ConfigError(
            f"{model.name} cannot draft for {target.name}: their tokenizers differ; "
            "use a smaller model of the same family"
        )
