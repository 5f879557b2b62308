"""The two ends of a model: token ids -> hidden states, and hidden states -> logits.

Both matrices can be the biggest of the model (Gemma 3 270M: 262,144 x 640, 60 % of all weights). A GGUF checkpoint
stores them as Q8_0; then the embedding stays in those 8 bits for good (a look-up dequantizes the rows it reads,
exactly), and the head is multiplied in 8 bits unless compute is fp32. With fp32 compute it is dequantized, so that
logits can be compared with other implementations of the same weights.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch

from ..protocol.errors import LocalProtocolError
from .linear import Linear, pad_rows
from .norms import Norm

Q8_BLOCK: Final = 32
"""Values that share a scale in GGUF's Q8_0."""


class Table(Protocol):
    """An embedding matrix in some storage."""

    @property
    def size_bytes(self) -> int:
        """Memory it holds."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [count] -> float [count, hidden]."""


class FloatTable:
    """An embedding matrix in a float dtype."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    @property
    def size_bytes(self) -> int:
        return self._weight.numel() * self._weight.element_size()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self._weight.index_select(0, ids)


class Q8Table:
    """An embedding matrix as GGUF stores it: int8 [vocab, hidden] and one fp16 scale per 32 values."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self._values = values
        self._scales = scales

    @property
    def size_bytes(self) -> int:
        return self._values.numel() + self._scales.numel() * 2

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return dequantize_q8(self._values.index_select(0, ids), self._scales.index_select(0, ids))


def dequantize_q8(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 [rows, hidden] and fp16 scales [rows, hidden / 32] -> fp32 [rows, hidden], exactly."""
    blocks = values.view(values.shape[0], -1, Q8_BLOCK).float() * scales.float().unsqueeze(-1)
    return blocks.view(values.shape)


class Embedding:
    """Token ids -> the hidden states that enter block 0."""

    def __init__(
        self, table: Table, scale: float, dtype: torch.dtype, device: torch.device, norm: Norm | None = None
    ) -> None:
        self._table = table
        self._norm = norm
        self._dtype = dtype
        self._device = device
        # transformers rounds Gemma's scale to the compute dtype first; so do we
        self._scale = None if scale == 1.0 else torch.tensor(scale, dtype=dtype).float().to(device)

    @property
    def size_bytes(self) -> int:
        """Memory of the matrix."""
        return self._table.size_bytes

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [count] -> [count, hidden] in the compute dtype. Ids must lie in the vocabulary: callers check."""
        with torch.inference_mode():
            rows = self._table.rows(ids.to(self._device)).to(self._dtype)
            if self._norm is not None:
                rows = self._norm(rows.float()).to(self._dtype)
            return rows if self._scale is None else rows.float().mul_(self._scale).to(self._dtype)


class Head:
    """Final norm, LM head, scale and soft cap."""

    def __init__(self, norm: Norm, linear: Linear, hidden_size: int, softcap: float | None, scale: float = 1.0) -> None:
        self._norm = norm
        self._linear = linear
        self._hidden_size = hidden_size
        self._softcap = softcap
        self._scale = scale

    @property
    def size_bytes(self) -> int:
        """Memory of the matrix."""
        return self._linear.size_bytes

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] after the last block -> fp32 [rows, vocab]. A row's logits depend on that row alone."""
        if hidden.dim() != 2 or hidden.shape[1] != self._hidden_size:
            raise LocalProtocolError(f"hidden states {tuple(hidden.shape)} are not [rows, {self._hidden_size}]")
        with torch.inference_mode():
            rows = self._norm(pad_rows(hidden.float()))
            if not self._linear.needs_padding:
                rows = rows[: hidden.shape[0]]
            logits = self._linear(rows)[: hidden.shape[0]]
            if self._scale != 1.0:
                logits.mul_(self._scale)
            if self._softcap is not None:
                logits.div_(self._softcap).tanh_().mul_(self._softcap)
            return logits
