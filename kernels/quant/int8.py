"""int8 weights multiplied in integers: exact sums, so a row's bits cannot depend on others.

Weights have one scale per output row, or, where that is too coarse (the head), per row and group of columns.

An activation row is written as two int8 digits, x = s (hi + lo / 254) with one scale s per row: 15 bits, twice the
rows in the integer product. In decode the second digit is nearly free, because the time goes into reading the weights
and they are read once. Measured on Gemma 3 270M: perplexity +0.3 %; with one digit (plain W8A8) +4 %, because of
outliers in the activations; weight-only kernels (aten._weight_int8pack_mm) take 3-4 times as long in prefill.

Where torch has no oneDNN (not x86), aten's weight-only kernel is used, which is row-exact too, in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from ..head import dequantize_q8
from ..linear import Linear, PlainLinear, is_small, tensor_bytes

LEVELS: Final = 127
HEAD_GROUP: Final = 128
"""Columns that share a scale in a row of the head. Against fp32 on Gemma 3 270M: one scale a row KL 2.3e-3, 160
columns 5e-4, 64 columns 2e-4; smaller groups make the product slower."""
_ZERO: Final = 128
"""oneDNN wants unsigned activations: a digit d is stored as d + 128."""
_LOW: Final = 1 / 254
"""Weight of the low digit: half a step of the high one is 127 steps of it."""
_CHUNK: Final = 16_384
"""Rows of a weight quantized at a time: bounds the temporary memory for a big head."""
_MAX_PRODUCTS: Final = 1 << 24
"""Values of a product at a time, for the same reason."""
_SMALLEST: Final = torch.finfo(torch.float32).tiny
"""Lower bound of scales, so that zeros are divided by something."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """value[out, in] * scale[out, group of in]."""

    values: torch.Tensor
    """int8 [out, in]."""
    scales: torch.Tensor
    """fp32 [out, groups]; all groups but the last have the same width."""
    group: int
    """Columns per group."""

    def floats(self) -> torch.Tensor:
        """The weight in fp32."""
        columns = self.scales.repeat_interleave(self.group, 1)[:, : self.values.shape[1]]
        return self.values.float().mul_(columns)

    def to(self, device: torch.device) -> Int8Weight:
        """The same elsewhere."""
        return Int8Weight(self.values.to(device), self.scales.to(device), self.group)


class Int8Linear:
    """An int8 weight in oneDNN's packed layout."""

    needs_padding = False

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        operators: Any = torch.ops.onednn
        self._out_features, in_features = weight.values.shape
        self._group = weight.group
        self._weights = [
            (operators.qlinear_prepack(values.contiguous(), None), scales.contiguous())
            for values, scales in zip(torch.split(weight.values, weight.group, 1), weight.scales.unbind(1), strict=True)
        ]
        self._zero_points = torch.zeros(self._out_features, dtype=torch.int64)
        self._bias = None if bias is None else bias.float()
        self._multiply = operators.qlinear_pointwise.default
        self._step, self._smallest = torch.tensor(1 / LEVELS), torch.tensor(_SMALLEST)
        self._high_offset, self._low_offset = torch.tensor(_ZERO + 0.5), torch.tensor(1.5)
        self._low_steps, self._low = torch.tensor(1 / _LOW), torch.tensor(_LOW)
        self._size_bytes = self._out_features * in_features + tensor_bytes(weight.scales, self._bias)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        most = max(1, _MAX_PRODUCTS // self._out_features)
        if rows.shape[0] > most:
            return torch.cat([self(part) for part in torch.split(rows, most)])
        scale = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True).mul_(self._step)  # [rows, 1]
        torch.maximum(scale, self._smallest, out=scale)
        products = self._products(self._digits(rows, scale))  # [2, rows, out]
        high, low = products.unbind(0)
        out = low.mul_(self._low).add_(high).mul_(scale)
        return out if self._bias is None else out.add_(self._bias)

    def _digits(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """uint8 [2, rows, in]: high digits, low digits, each + 128."""
        digits = torch.empty(2, *rows.shape, dtype=torch.uint8)
        high, low = digits.unbind(0)
        # Positive values turn into integers by cutting off, so adding a half first rounds them.
        rest = torch.div(rows, scale).add_(self._high_offset)  # high digit + 128.5
        high.copy_(rest)
        rest.sub_(high).mul_(self._low_steps).add_(self._low_offset)  # low digit + 128.5, from a rest in [0, 1)
        low.copy_(rest)
        return digits

    def _products(self, digits: torch.Tensor) -> torch.Tensor:
        """fp32 [2, rows, out], group by group in order."""
        _, rows, in_features = digits.shape
        flat = digits.view(2 * rows, in_features)
        total: torch.Tensor | None = None
        for index, (weight, scales) in enumerate(self._weights):
            part = flat[:, index * self._group : (index + 1) * self._group].contiguous()
            product: torch.Tensor = self._multiply(
                part, 1.0, _ZERO, weight, scales, self._zero_points, None, 1.0, 0, torch.float32, "none", [], ""
            )
            total = product if total is None else total.add_(product)
        assert total is not None
        return total.view(2, rows, self._out_features)


class PortableInt8Linear:
    """The same weights under aten's weight-only kernel, with bf16 activations; on a GPU a dequantized product."""

    needs_padding = False

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        self._group = weight.group
        self._values = [values.contiguous() for values in torch.split(weight.values, weight.group, 1)]
        self._scales = [scales.to(torch.bfloat16) for scales in weight.scales.unbind(1)]
        self._bias = None if bias is None else bias.float()

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(*self._values, *self._scales, self._bias)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        parts = torch.split(rows.to(torch.bfloat16), self._group, 1)
        out = torch.zeros(rows.shape[0], self._scales[0].shape[0], device=rows.device)
        for part, values, scales in zip(parts, self._values, self._scales, strict=True):
            if rows.device.type == "cpu":
                product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(part.contiguous(), values, scales)
                out.add_(product)
            else:
                out.add_((part @ values.to(torch.bfloat16).T).float().mul_(scales))
        return out if self._bias is None else out.add_(self._bias)


def make_int8(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """Quantize a float weight [out, in], one scale per row."""
    quantized = quantize(weight.float(), weight.shape[1])
    if device.type == "cpu" and is_small(weight):
        return PlainLinear(quantized.floats(), bias, torch.float32)
    return _linear(quantized.to(device), None if bias is None else bias.to(device))


def make_int8_from_q8(values: torch.Tensor, scales: torch.Tensor, device: torch.device) -> Linear:
    """From GGUF's Q8_0 (fp16 scale per 32 values of a row): bigger groups, so values are rounded once more."""

    def chunks() -> Iterator[Int8Weight]:
        for first in range(0, values.shape[0], _CHUNK):
            floats = dequantize_q8(values[first : first + _CHUNK], scales[first : first + _CHUNK])
            yield quantize(floats, HEAD_GROUP)

    parts = list(chunks())
    weight = Int8Weight(
        torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]), HEAD_GROUP
    )
    return _linear(weight.to(device), None)


def quantize(weight: torch.Tensor, group: int) -> Int8Weight:
    """The nearest int8 weight to an fp32 one, with a scale per row and `group` columns."""
    scales, values = [], []
    for part in torch.split(weight, group, 1):
        scale = part.abs().amax(1).div_(LEVELS).clamp_(min=_SMALLEST)
        scales.append(scale)
        values.append((part / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8))
    return Int8Weight(torch.cat(values, 1), torch.stack(scales, 1), group)


def can_multiply_integers() -> bool:
    """Whether torch has oneDNN's quantized product (public through torch's compiler only, so probed)."""
    operators: Any = torch.ops.onednn
    return "onednn" in torch.backends.quantized.supported_engines and hasattr(operators, "qlinear_pointwise")


def _linear(weight: Int8Weight, bias: torch.Tensor | None) -> Linear:
    if weight.values.device.type == "cpu" and can_multiply_integers():
        return Int8Linear(weight, bias)
    return PortableInt8Linear(weight, bias)
