"""int8 weights multiplied in integers: exact sums, so a row's bits cannot depend on others.

Weights have one scale per output row. The head, where that is too coarse, also has one per column, multiplied into the
row before it is rounded; that costs nothing, a scale per group of columns as many products as there are groups.

An activation row is written as two int8 digits, x = s (high + low / 254) with one scale s per row: 15 bits, twice the
rows in the integer product. In decode the second digit is nearly free, because the time goes into reading the weights
and they are read once. Measured on Gemma 3 270M: perplexity +0.3 %; with one digit (plain W8A8) +4 %, because of
outliers in the activations; weight-only kernels (aten._weight_int8pack_mm) take 3-4 times as long in prefill.

Where torch has no such product (not x86), aten's weight-only kernel is used, which is row-exact too, in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from ..head import dequantize_q8
from ..linear import Linear, PlainLinear, as_fp32, is_small, own, tensor_bytes
from ..weight import Weight
from .products import IntegerProduct, available_products, integer_product, row_levels

LEVELS: Final = 127
"""Weights lie in +-LEVELS."""
_CHUNK: Final = 16_384
"""Rows of a weight quantized at a time: bounds the temporary memory for a big head."""
_ROUNDED: Final = 1 << 18
"""Values rounded at a time while quantizing."""
_SLICE: Final = 8_192
"""Outputs of a head multiplied at a time: their products stay in the processor's cache (262,144 x 640, decode: 8.9 ms,
16 in one piece)."""
_WIDE: Final = 65_536
"""Outputs from which a weight is sliced."""
_MAX_PRODUCTS: Final = 1 << 24
"""Values of a product at a time: bounds the temporary memory of a prefill."""
_SMALLEST: Final = torch.finfo(torch.float32).tiny
"""Lower bound of scales, so that zeros are divided by something."""


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """value[out, in] * scale[out] * column[in]."""

    values: torch.Tensor
    """int8 [out, in]."""
    scales: torch.Tensor
    """fp32 [out]."""
    columns: torch.Tensor | None = None
    """fp32 [in]."""

    def floats(self) -> torch.Tensor:
        """The weight in fp32."""
        floats = self.values.float().mul_(self.scales[:, None])
        return floats if self.columns is None else floats.mul_(self.columns)

    def to(self, device: torch.device) -> Int8Weight:
        """The same elsewhere."""
        columns = None if self.columns is None else self.columns.to(device)
        return Int8Weight(self.values.to(device), self.scales.to(device), columns)


class Int8Linear:
    """An int8 weight packed for integer products."""

    needs_padding = False

    def __init__(self, weight: Int8Weight, products: Sequence[IntegerProduct], bias: torch.Tensor | None) -> None:
        self._out_features, in_features = weight.values.shape
        self._products = products
        self._columns = weight.columns
        self._bias = own(bias)
        levels = row_levels()
        self._step, self._smallest = torch.tensor(1 / levels), torch.tensor(_SMALLEST)
        # A low digit is worth half a step of the high one divided by its levels.
        self._low_steps, self._low = torch.tensor(2.0 * levels), torch.tensor(0.5 / levels)
        self._size_bytes = self._out_features * in_features + tensor_bytes(weight.scales, weight.columns, self._bias)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        most = max(1, _MAX_PRODUCTS // self._out_features)
        if rows.shape[0] > most:
            if out is None:
                out = rows.new_empty(rows.shape[0], self._out_features)
            for part, target in zip(torch.split(rows, most), torch.split(out, most), strict=True):
                self(part, target)
            return out
        if self._columns is not None:
            rows = rows * self._columns
        scale = torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True).mul_(self._step)  # [rows, 1]
        torch.maximum(scale, self._smallest, out=scale)
        product = self._multiply(self._digits(rows, scale), rows.shape[0])
        out = product.mul_(scale) if out is None else torch.mul(product, scale, out=out)
        return out if self._bias is None else out.add_(self._bias)

    def _digits(self, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """fp32 whole numbers [2 * rows, in]: high digits, low digits."""
        count = rows.shape[0]
        digits = torch.empty(2 * count, rows.shape[1])
        high, low = digits.narrow(0, 0, count), digits.narrow(0, count, count)
        torch.div(rows, scale, out=low)
        torch.round(low, out=high)
        low.sub_(high).mul_(self._low_steps).round_()
        return digits

    def _multiply(self, digits: torch.Tensor, count: int) -> torch.Tensor:
        """fp32 [rows, out] of digits [2 * rows, in]."""
        if len(self._products) == 1:
            return self._joined(self._products[0](digits), count)
        out = torch.empty(count, self._out_features)
        first = 0
        for product in self._products:
            part = self._joined(product(digits), count)
            out.narrow(1, first, part.shape[1]).copy_(part)
            first += part.shape[1]
        return out

    def _joined(self, product: torch.Tensor, count: int) -> torch.Tensor:
        high, low = product.narrow(0, 0, count), product.narrow(0, count, count)
        return low.mul_(self._low).add_(high)


class PortableInt8Linear:
    """The same weights under aten's weight-only kernel, with bf16 activations; on a GPU a dequantized product."""

    needs_padding = False

    def __init__(self, weight: Int8Weight, bias: torch.Tensor | None) -> None:
        self._values = weight.values.contiguous()
        self._scales = weight.scales.to(torch.bfloat16)
        self._columns = weight.columns
        self._bias = own(bias)

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self._values, self._scales, self._columns, self._bias)

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._columns is not None:
            rows = rows * self._columns
        rows = rows.to(torch.bfloat16)
        if rows.device.type == "cpu":
            product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, self._values, self._scales)
            out = as_fp32(product, out)
        else:
            out = as_fp32(rows @ self._values.to(torch.bfloat16).T, out).mul_(self._scales)
        return out if self._bias is None else out.add_(self._bias)


def make_int8(weight: Weight, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """Quantize a float weight, one scale per row."""
    quantized = quantize(weight)
    if device.type == "cpu" and is_small(weight):
        return PlainLinear(quantized.floats(), bias, torch.float32)
    return _linear(quantized.to(device), None if bias is None else bias.to(device))


def make_int8_from_q8(values: torch.Tensor, scales: torch.Tensor, device: torch.device) -> Linear:
    """From GGUF's Q8_0 (fp16 scale per 32 values of a row): scales per row and column, so values are rounded once more.

    Scores of Gemma 3 270M's head against fp32: KL 4.8e-4, like bf16's 4.2e-4. A scale per row alone gives 2.2e-3, one
    per 128 columns of a row 3.2e-4 at twice the time.
    """
    columns = torch.zeros(values.shape[1])
    for first in range(0, values.shape[0], _CHUNK):
        part = dequantize_q8(values[first : first + _CHUNK], scales[first : first + _CHUNK])
        torch.maximum(columns, part.abs_().amax(0), out=columns)
    columns.clamp_(min=_SMALLEST)
    quantized = torch.empty(values.shape, dtype=torch.int8)
    row_scales = torch.empty(values.shape[0])
    for first in range(0, values.shape[0], _CHUNK):
        part = dequantize_q8(values[first : first + _CHUNK], scales[first : first + _CHUNK])
        fresh = quantize(Weight.of(part.div_(columns)))
        quantized[first : first + _CHUNK] = fresh.values
        row_scales[first : first + _CHUNK] = fresh.scales
    return _linear(Int8Weight(quantized, row_scales, columns).to(device), None)


def quantize(weight: Weight) -> Int8Weight:
    """The nearest int8 weight to a float one, with a scale per row. A few rows at a time: no second fp32 copy."""
    values, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0])
    step = max(1, _ROUNDED // max(1, weight.shape[1]))

    def use(start: int, rows: torch.Tensor) -> None:
        for first in range(0, rows.shape[0], step):
            part = rows[first : first + step].float()
            at = slice(start + first, start + first + part.shape[0])
            scales[at] = scale = part.abs().amax(1).div_(LEVELS).clamp_(min=_SMALLEST)
            values[at] = (part / scale[:, None]).round_().clamp_(-LEVELS, LEVELS)

    weight.each(use)
    return Int8Weight(values, scales)


def _linear(weight: Int8Weight, bias: torch.Tensor | None) -> Linear:
    if weight.values.device.type != "cpu" or not available_products():
        return PortableInt8Linear(weight, bias)
    height = weight.values.shape[0]
    step = _SLICE if height >= _WIDE else height
    slices = zip(torch.split(weight.values, step), torch.split(weight.scales, step), strict=True)
    found = (integer_product(values, scales) for values, scales in slices)
    return Int8Linear(weight, [product for product in found if product is not None], bias)
