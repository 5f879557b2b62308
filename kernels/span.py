"""A span: consecutive blocks of a model, run over ragged batches.

One pass carries rows of many sessions at once. Matrices see all rows together, attention goes by ragged.py. By
the recipe of linear.py, attention.py and activation.py no row's bits depend on what else is in the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from ..protocol.errors import LocalProtocolError
from ..protocol.tensors import Codec
from . import codecs
from .blocks import Block
from .kvcache import LaneCache
from .linear import pad_rows
from .models.config import ModelConfig, RopeConfig
from .ragged import Attention, Rows
from .rope import RopeTable
from .scratch import Scratch

MAX_ROWS: Final = 65_536
"""Rows of one pass. Schedulers stay far below; a bug above this must not eat the memory of the host."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One session's share of a pass: `count` rows that follow the first `position` cached ones."""

    cache: LaneCache
    """Where its keys and values live; cut back to `position` if it is longer."""
    position: int
    """Absolute position of its first row."""
    count: int
    """Rows."""
    cuts: frozenset[int] = frozenset()
    """Block borders where this session's activations are encoded and decoded, whoever computes both sides."""
    codec: Codec = Codec.BF16
    """The session's wire codec."""


class Span:
    """Blocks [start, end) of a model, ready to compute. Not safe for concurrent runs: one thread owns it."""

    def __init__(
        self,
        config: ModelConfig,
        start: int,
        blocks: Sequence[Block],
        *,
        dtype: torch.dtype,
        quant: str,
        device: torch.device,
    ) -> None:
        self.config = config
        self.start = start
        self.end = start + len(blocks)
        self.dtype = dtype
        """Dtype of hidden states at block borders, and of the cache."""
        self.quant = quant
        """How the weights are held: none, int8 or nf4."""
        self.device = device
        self._blocks = list(blocks)
        self._needs_padding = any(linear.needs_padding for block in blocks for linear in block.linears)
        self._tables = {
            rope: RopeTable(rope, config.head_dim, device, config.rotated) for rope in {block.rope for block in blocks}
        }

    @property
    def size_bytes(self) -> int:
        """Memory of the weight matrices."""
        return sum(linear.size_bytes for block in self._blocks for linear in block.linears)

    def run(
        self, hidden: torch.Tensor, pieces: Sequence[Piece], start: int | None = None, end: int | None = None
    ) -> torch.Tensor:
        """Run rows [sum of counts, hidden] of several pieces through blocks [start, end).

        Returns [rows, hidden] in the span's dtype and leaves every cache `count` positions longer. Raises ServerBusy
        when a cache cannot grow and NeedReplay when one cannot be cut back; then no cache was extended.
        """
        start, end = self.start if start is None else start, self.end if end is None else end
        self._check(hidden, pieces, start, end)
        for piece in pieces:
            piece.cache.truncate(piece.position)
            piece.cache.reserve(piece.position + piece.count)
        with torch.inference_mode():
            return self._run(hidden, pieces, start, end)

    def _check(self, hidden: torch.Tensor, pieces: Sequence[Piece], start: int, end: int) -> None:
        rows = sum(piece.count for piece in pieces)
        if not self.start <= start < end <= self.end:
            raise LocalProtocolError(f"blocks {start}:{end} are not in this span {self.start}:{self.end}")
        if hidden.shape != (rows, self.config.hidden_size) or not 0 < rows <= MAX_ROWS:
            raise LocalProtocolError(
                f"hidden states {tuple(hidden.shape)} do not match {rows} rows of {len(pieces)} pieces"
            )
        if len({id(piece.cache) for piece in pieces}) != len(pieces):
            raise LocalProtocolError("two pieces of one pass share a lane")
        for piece in pieces:
            if piece.count < 1 or not piece.cache.start <= start < end <= piece.cache.end:
                raise LocalProtocolError(f"a piece of {piece.count} rows does not fit blocks {start}:{end} of its lane")

    def _run(self, hidden: torch.Tensor, pieces: Sequence[Piece], start: int, end: int) -> torch.Tensor:
        count = hidden.shape[0]
        rows = hidden.to(device=self.device, dtype=self.dtype)
        rows = pad_rows(rows) if self._needs_padding else rows.contiguous()
        blocks = self._blocks[start - self.start : end - self.start]
        attentions = self._attentions(pieces, rows.shape[0], {(block.window, block.batched) for block in blocks})
        rotations = self._rotations(pieces, rows.shape[0], {block.rope for block in blocks})
        scratch = Scratch(self.config, rows.shape[0], self.device)
        for border, block in enumerate(blocks, start):
            if border > start:
                rows = _cut(rows, pieces, border)
            caches = [piece.cache.blocks[border - piece.cache.start] for piece in pieces]
            rows = block.forward(rows, rotations[block.rope], attentions[block.window, block.batched], caches, scratch)
        for piece in pieces:
            piece.cache.length = piece.position + piece.count
        return rows[:count]

    def _attentions(
        self, pieces: Sequence[Piece], rows: int, kinds: set[tuple[int | None, bool]]
    ) -> dict[tuple[int | None, bool], Attention]:
        shares, first = [], 0
        for piece in pieces:
            shares.append(Rows(first, first + piece.count, piece.position))
            first += piece.count
        mixed = torch.zeros(rows, self.config.num_heads * self.config.head_dim, device=self.device)
        return {
            (window, batched): Attention(self.config, window, shares, mixed, self.dtype, batched=batched)
            for window, batched in kinds
        }

    def _rotations(self, pieces: Sequence[Piece], rows: int, ropes: set[RopeConfig]) -> dict[RopeConfig, torch.Tensor]:
        positions = torch.zeros(rows, dtype=torch.int64)
        first = 0
        for piece in pieces:
            torch.arange(piece.position, piece.position + piece.count, out=positions[first : first + piece.count])
            first += piece.count
        end = max(piece.position + piece.count for piece in pieces)
        positions = positions.to(self.device)
        return {rope: self._tables[rope].rows(positions, end) for rope in ropes}


def _cut(rows: torch.Tensor, pieces: Sequence[Piece], border: int) -> torch.Tensor:
    """Replace the rows of sessions that have a cut here by what the next server would have received."""
    first = 0
    for piece in pieces:
        last = first + piece.count
        if border in piece.cuts and not lossless(piece.codec, rows.dtype):
            rows[first:last] = codecs.round_trip(rows[first:last], piece.codec)
        first = last
    return rows


def lossless(codec: Codec, dtype: torch.dtype) -> bool:
    """Whether a codec gives hidden states of this dtype back as they were."""
    return codec is Codec.FP32 or (codec is Codec.BF16 and dtype is torch.bfloat16)
