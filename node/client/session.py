"""Hidden states in, hidden states out: the session API for researchers."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ...protocol.errors import ConfigError
from ...protocol.messages import Want
from ...protocol.tensors import Codec
from .chain import ChainSession

if TYPE_CHECKING:
    import torch

STEP_ROWS: Final = 128
"""Tokens a frame carries: longer steps go in several, so that stages overlap."""


class HiddenSession:
    """An inference session over a span of blocks, with KV caches at the servers. Close it, or use `async with`."""

    def __init__(self, chain: ChainSession, batch: int, hidden: int, codec: Codec, dtype: str) -> None:
        self._chain = chain
        self._batch = batch
        self._hidden = hidden
        self._codec = codec
        self._dtype = dtype

    @property
    def position(self) -> int:
        """Tokens per row of the batch so far."""
        return self._chain.position()

    @property
    def route(self) -> tuple[str, ...]:
        """`peer[start:end]` of each hop."""
        return self._chain.route

    async def step(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run [batch, tokens, hidden] through the blocks; the result has the same shape, in the compute dtype.

        Rows of the batch are independent sequences. Raises ConfigError for another shape, ServerFailed when a dead
        server cannot be replaced. Not safe to cancel: close the session then.
        """
        from .local import as_hidden, from_hidden  # torch is loaded here, not before

        shape = tuple(hidden.shape)
        if len(shape) != 3 or shape[0] != self._batch or shape[1] == 0 or shape[2] != self._hidden:
            raise ConfigError(f"hidden states {shape}: this session takes [{self._batch}, tokens, {self._hidden}]")
        chunks = [hidden[:, at : at + STEP_ROWS] for at in range(0, shape[1], STEP_ROWS)]
        for chunk in chunks:
            for lane in range(self._batch):
                self._chain.feed(from_hidden(chunk[lane], self._codec), chunk.shape[1], Want.ALL, lane)
        rows = [bytearray() for _ in range(self._batch)]
        for _ in range(len(chunks) * self._batch):
            result, payload = await self._chain.result()
            rows[result.lane] += payload
        return as_hidden(b"".join(rows), self._codec, self._hidden, self._dtype).view(shape)

    async def truncate(self, position: int) -> None:
        """Forget every row's tokens from `position` on."""
        for lane in range(self._batch):
            self._chain.truncate(position, lane)

    async def close(self) -> None:
        """Free the servers' caches."""
        await self._chain.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
