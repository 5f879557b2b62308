"""A weight matrix on its way from a file into memory, part by part.

What is multiplied together (queries, keys and values; gate and up) is stored apart, and a block's matrices in full
precision take several times what they take quantized. So nobody is handed a whole tensor: a Weight knows its shape and
how to make each of its parts, and shows them one after another, each gone before the next is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

GROUP_VALUES: Final = 1 << 18
"""Values shown at a time to whoever wants even groups of rows: 1 MiB in fp32, and libraries copy them several times."""

Part = Callable[[], torch.Tensor]
"""Makes some rows of a weight, [rows, in]."""


class Weight:
    """A matrix [out, in], its rows in parts from the top down."""

    def __init__(self, shape: tuple[int, int], parts: Sequence[Part]) -> None:
        self.shape = shape
        self._parts = parts

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Weight:
        """A tensor that is already there."""
        return cls((tensor.shape[0], tensor.shape[1]), [lambda: tensor])

    @property
    def values(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[1]

    def each(self, use: Callable[[int, torch.Tensor], None]) -> None:
        """Call `use` with the first row and the rows of every part. Nothing else refers to a part."""
        first = 0
        for make in self._parts:
            first += _shown(use, first, make())

    def groups(self, multiple: int, use: Callable[[int, torch.Tensor], None]) -> None:
        """The same in fp32 and in even groups, a multiple of so many rows each; the last is filled up with zeros.

        A group is overwritten by the next.
        """
        rows, width = self.shape
        step = max(1, GROUP_VALUES // max(1, width) // multiple) * multiple
        step = min(step, -(-rows // multiple) * multiple)
        buffer = torch.empty(step, width)

        def collect(first: int, part: torch.Tensor) -> None:
            done = 0
            while done < part.shape[0]:
                at = (first + done) % step
                count = min(step - at, part.shape[0] - done)
                buffer[at : at + count].copy_(part[done : done + count])
                done += count
                if at + count == step:
                    use(first + done - step, buffer)

        self.each(collect)
        if rest := rows % step:
            filled = rest + -rest % multiple
            use(rows - rest, buffer[:filled].index_fill_(0, torch.arange(rest, filled), 0.0))

    def joined(self, dtype: torch.dtype) -> torch.Tensor:
        """All of it; a view of what is stored where nothing has to be joined or converted."""
        if len(self._parts) == 1:
            return self._parts[0]().to(dtype)
        out = torch.empty(self.shape, dtype=dtype)
        self.each(lambda first, part: _copy(out, first, part))
        return out


def _shown(use: Callable[[int, torch.Tensor], None], first: int, part: torch.Tensor) -> int:
    use(first, part)
    return part.shape[0]


def _copy(out: torch.Tensor, first: int, part: torch.Tensor) -> None:
    out[first : first + part.shape[0]].copy_(part)
