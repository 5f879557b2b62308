"""Products of integer rows with int8 weights, summed exactly, on an x86 CPU.

Two libraries inside torch do it, bit for bit alike, and neither is public API (torch's compiler and its older
quantized modules call them), so both are probed. Measured on one Zen 4 core, 4096 x 4096: fbgemm reads weights at
27 GB/s for 1 to 4 rows, oneDNN at 16; from 32 rows on oneDNN is 5-15 % faster. fbgemm knows no AMX, oneDNN does.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any, Final, Protocol

import torch

from ..linear import cpu_has

_ZERO: Final = 128
"""Both want unsigned rows: an integer i is multiplied as i + 128."""
FULL_LEVELS: Final = 127
HALF_LEVELS: Final = 63
"""Without VNNI pairs of products are added in 16 bits: rows in +-127 would saturate them, 7-bit rows cannot."""


class IntegerProduct(Protocol):
    """scale[out] * sum over in of row * weight, for rows of whole numbers in +-row_levels()."""

    def __call__(self, digits: torch.Tensor) -> torch.Tensor:
        """fp32 whole numbers [rows, in] -> fp32 [rows, out]."""


class FbgemmProduct:
    """The kernels of torch's quantized modules."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        operators: Any = torch.ops.quantized
        zeros = torch.zeros(values.shape[0], dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated; prepacking takes no other
            quantized = torch._make_per_channel_quantized_tensor(values.contiguous(), scales.double(), zeros, 0)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            self._weight = operators.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = before
        self._multiply = operators.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def __call__(self, digits: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._multiply(digits, 1.0, _ZERO, self._weight)
        return product


class OneDnnProduct:
    """oneDNN's, which use AMX where the processor has it."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        operators: Any = torch.ops.onednn
        self._weight = operators.qlinear_prepack(values.contiguous(), None)
        self._scales = scales.contiguous()
        self._zero_points = torch.zeros(values.shape[0], dtype=torch.int64)
        self._multiply = operators.qlinear_pointwise.default

    def __call__(self, digits: torch.Tensor) -> torch.Tensor:
        rows = digits.add(_ZERO).to(torch.uint8)
        product: torch.Tensor = self._multiply(
            rows, 1.0, _ZERO, self._weight, self._scales, self._zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


def integer_product(values: torch.Tensor, scales: torch.Tensor) -> IntegerProduct | None:
    """int8 [out, in] and fp32 [out], packed for the faster library; None where torch has neither."""
    kinds = (OneDnnProduct, FbgemmProduct) if has_amx() else (FbgemmProduct, OneDnnProduct)
    for kind in kinds:
        if kind in available_products():
            return kind(values, scales)
    return None


@lru_cache(maxsize=1)
def available_products() -> tuple[type[FbgemmProduct] | type[OneDnnProduct], ...]:
    """Which of the two this torch has."""
    engines = torch.backends.quantized.supported_engines
    has_fbgemm = "fbgemm" in engines and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
    has_onednn = "onednn" in engines and hasattr(torch.ops.onednn, "qlinear_pointwise")
    found: list[type[FbgemmProduct] | type[OneDnnProduct]] = []
    if has_fbgemm:
        found.append(FbgemmProduct)
    if has_onednn:
        found.append(OneDnnProduct)
    return tuple(found)


def row_levels() -> int:
    """Largest whole number a row may hold on this processor."""
    return FULL_LEVELS if cpu_has("_is_vnni_supported") else HALF_LEVELS


def has_amx() -> bool:
    """Whether the processor multiplies int8 tiles."""
    return cpu_has("_is_amx_tile_supported")
