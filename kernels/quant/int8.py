"""int8 weights, one scale per output row, multiplied in integers: exact sums, so a row's bits cannot depend on others.

An activation row is written as two int8 digits, x = s (hi + lo / 254) with one scale s per row: 15 bits, twice the
rows in the integer product. One digit alone (plain W8A8) is hurt by the outliers of Gemma's activations; weight-only
int8 kernels (aten._weight_int8pack_mm) take 3-4 times as long in prefill. In decode the second digit is nearly free:
the time goes into reading the weights, and 2 rows read them once. Figures: docs/engine.md.

Where torch has no oneDNN (not x86), aten's weight-only kernel is used, which is row-exact too, in bf16.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from ..head import dequantize_q8
from ..linear import Linear, PlainLinear, is_small, tensor_bytes

LEVELS: Final = 127
_ZERO: Final = 128
"""oneDNN wants unsigned activations: a digit d is stored as d + 128."""
_LOW: Final = 1 / 254
"""Weight of the low digit: half a step of the high one is 127 steps of it."""
_CHUNK: Final = 16_384
"""Rows of a weight quantized at a time: bounds the temporary memory for a big head."""
_MAX_ROWS: Final = 4_096
"""Activation rows multiplied at a time, for the same reason."""


class Int8Linear:
    """A weight of int8 values and one fp32 scale per row, in oneDNN's packed layout."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        operators: Any = torch.ops.onednn
        self._out_features, in_features = values.shape
        self._weight = operators.qlinear_prepack(values, None)
        self._scales = scales.float().contiguous()
        self._zero_points = torch.zeros(self._out_features, dtype=torch.int64)
        self._bias = None if bias is None else bias.float()
        self._multiply = operators.qlinear_pointwise.default
        self._step = torch.tensor(1 / LEVELS)
        self._smallest = torch.tensor(torch.finfo(torch.float32).tiny)
        self._high_offset, self._low_offset = torch.tensor(_ZERO + 0.5), torch.tensor(1.5)
        self._low_steps, self._low = torch.tensor(1 / _LOW), torch.tensor(_LOW)
        self._size_bytes = self._out_features * in_features + tensor_bytes(self._scales, self._bias)

    @classmethod
    def from_q8(cls, values: torch.Tensor, scales: torch.Tensor) -> Linear:
        """From GGUF's Q8_0 (a scale per 32 values): each row gets one scale and is rounded once more."""
        parts = [
            _quantize_rows(dequantize_q8(values[first : first + _CHUNK], scales[first : first + _CHUNK]))
            for first in range(0, values.shape[0], _CHUNK)
        ]
        return _from_rows(torch.cat([part for part, _ in parts]), torch.cat([scale for _, scale in parts]), None)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.shape[0] > _MAX_ROWS:
            return torch.cat([self(part) for part in torch.split(rows, _MAX_ROWS)])
        count = rows.shape[0]
        scale = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True).mul_(self._step)  # [rows, 1]
        scaled = rows / torch.maximum(scale, self._smallest, out=scale)
        # Positive values turn into integers by cutting off, so adding a half first rounds them.
        scaled.add_(self._high_offset)  # high digit + 128.5
        digits = torch.empty(2, *rows.shape, dtype=torch.uint8)
        high, low = digits.unbind(0)
        high.copy_(scaled)
        scaled.sub_(high).mul_(self._low_steps).add_(self._low_offset)  # low digit + 128.5, from a rest in [0, 1)
        low.copy_(scaled)
        products: torch.Tensor = self._multiply(
            digits.view(2 * count, -1),
            1.0,
            _ZERO,
            self._weight,
            self._scales,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )  # [2 * rows, out]
        out = (products[count:] * self._low).add_(products[:count]).mul_(scale)
        return out if self._bias is None else out.add_(self._bias)


class PortableInt8Linear:
    """The same weights under aten's weight-only kernel, with bf16 activations; on a GPU a dequantized product."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._values = values.contiguous()
        self._scales = scales.to(torch.bfloat16)
        self._bias = None if bias is None else bias.float()

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self._values, self._scales, self._bias)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        narrow = rows.to(torch.bfloat16)
        if rows.device.type == "cpu":
            product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(narrow, self._values, self._scales)
            out = product.float()
        else:
            out = (narrow @ self._values.to(torch.bfloat16).T).float().mul_(self._scales)
        return out if self._bias is None else out.add_(self._bias)


def make_int8(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """Quantize a float weight [out, in]."""
    if device.type == "cpu" and is_small(weight):
        return PlainLinear(dequantized(weight), bias, torch.float32)
    values, scales = _quantize_rows(weight.float())
    return _from_rows(values.to(device), scales.to(device), None if bias is None else bias.to(device))


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """What int8 makes of a weight, in fp32: the reference for tests and error reports."""
    values, scales = _quantize_rows(weight.float())
    return values.float() * scales[:, None]


def can_multiply_integers() -> bool:
    """Whether torch has oneDNN's quantized product (public through torch's compiler only, so probed)."""
    operators: Any = torch.ops.onednn
    return "onednn" in torch.backends.quantized.supported_engines and hasattr(operators, "qlinear_pointwise")


def _quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values [out, in] and fp32 scales [out]."""
    scales = weight.abs().amax(1).div_(LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scales[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scales


def _from_rows(values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    if values.device.type == "cpu" and can_multiply_integers():
        return Int8Linear(values, scales, bias)
    return PortableInt8Linear(values, scales, bias)
