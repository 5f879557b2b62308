"""Norms over rows, in fp32, with bits that depend on the row alone.

RMS norm is written with a vector norm and correctly rounded operations only (multiply, add, square root, divide):
torch's own costs 10-13 us a call at decode sizes, this 6, and rsqrt may round differently in vector and scalar code.
Layer norm is torch's: it goes row by row, from each row's own start.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch.nn import functional

from .linear import own


class Norm(Protocol):
    """fp32 rows in, normed fp32 rows out."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [..., width] -> fp32 [..., width], a tensor of its own."""


class RMSNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight. `weight` may have leading dimensions, e.g. one row per head."""

    __slots__ = ("_epsilon", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float, device: torch.device) -> None:
        width = weight.shape[-1]
        # sqrt(mean + eps) = sqrt(sum + width * eps) / sqrt(width): the constants move into weight and epsilon.
        self._weight = (weight.float() * math.sqrt(width)).contiguous().to(device)
        self._epsilon = torch.tensor(width * eps, dtype=torch.float32, device=device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [..., width] -> fp32 [..., width]."""
        return torch.div(rows, self._length(rows)).mul_(self._weight)

    def apply_(self, rows: torch.Tensor) -> None:
        """The same in place."""
        rows.div_(self._length(rows)).mul_(self._weight)

    def _length(self, rows: torch.Tensor) -> torch.Tensor:
        length: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)  # [..., 1]
        return length.mul_(length).add_(self._epsilon).sqrt_()


class LayerNorm:
    """y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias."""

    __slots__ = ("_bias", "_epsilon", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float, device: torch.device) -> None:
        self._weight = own(weight).contiguous().to(device)
        self._bias = own(bias).contiguous().to(device)
        self._epsilon = eps

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """fp32 [..., width] -> fp32 [..., width]."""
        return functional.layer_norm(rows, self._weight.shape, self._weight, self._bias, self._epsilon)
