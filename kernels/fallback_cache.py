"""Between transformers' cache interface and our lanes: its layers store keys and values in our pages.

So sessions of a foreign model have the same budget, promises, truncation and sharing as all others. A layer may cache
fewer heads or narrower ones than the page has (DeepSeek's latents): the rest of the page stays zero.

Importing this needs transformers (fallback_skeleton.load_transformers first).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..protocol.errors import UnsupportedModel
from .attention import tile_ceil
from .fallback_skeleton import Flow
from .kvcache import BlockCache


class PagedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's past in one lane; without a block, a layer of another span, whose length is all that is asked."""

    def __init__(self, block: BlockCache | None, position: int, heads: int, width: int) -> None:
        super().__init__()
        self.is_initialized = True
        self._block = block
        self._length = position
        self._heads = heads
        self._width = width

    def get_seq_length(self) -> int:
        return self._length

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Store [1, heads, rows, width] of both; returns both from the first position on."""
        assert self._block is not None
        count = keys.shape[2]
        fresh = keys.new_zeros(2, self._heads, count, self._width)
        fresh[0, : keys.shape[1], :, : keys.shape[3]] = keys[0]
        fresh[1, : values.shape[1], :, : values.shape[3]] = values[0]
        self._block.write(self._length, fresh)
        self._length += count
        room = tile_ceil(self._length)
        both = keys.new_empty(2, self._heads, room, self._width)
        self._block.read(0, room, both)
        both = both[:, :, : self._length]
        return both[:1, : keys.shape[1], :, : keys.shape[3]], both[1:, : values.shape[1], :, : values.shape[3]]


def lane_cache(layers: int, start: int, blocks: Sequence[BlockCache], position: int, heads: int, width: int) -> Any:
    """A Cache for a model of so many layers, of which those from `start` on have `blocks`."""
    held = {start + number: block for number, block in enumerate(blocks)}
    return Cache(layers=[PagedLayer(held.get(index), position, heads, width) for index in range(layers)])


class Measured(Exception):
    """A layer handed over keys and values of these shapes."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes = shapes


class _MeasuringLayer(DynamicLayer):  # type: ignore[misc]
    def get_seq_length(self) -> int:
        return 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        raise Measured(tuple(keys.shape), tuple(values.shape))


def measuring_cache(layers: int) -> Any:
    """A Cache that stops a layer as soon as it has made its keys and values."""
    return Cache(layers=[_MeasuringLayer() for _ in range(layers)])


class Measuring(Flow):
    """Runs each layer up to its cache."""

    def __init__(self, tuples: bool) -> None:
        self.tuples = tuples
        self._shapes: dict[int, tuple[tuple[int, ...], ...]] = {}

    def at(self, index: int, layer: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
        try:
            layer(hidden)
        except Measured as found:
            self._shapes[index] = found.shapes
        return self.pack(hidden)

    def largest(self, name: str, layers: int) -> tuple[int, int]:
        """(heads, width) that hold what any layer caches. Raises UnsupportedModel when some layer caches nothing."""
        for index in range(layers):
            if index not in self._shapes:
                raise UnsupportedModel(
                    f"layer {index} of model family {name!r} keeps no keys and values (a recurrent or shared layer): "
                    f"such models are not supported"
                )
        shapes = [shape for pair in self._shapes.values() for shape in pair]
        return max(shape[1] for shape in shapes), max(shape[3] for shape in shapes)
