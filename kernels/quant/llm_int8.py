"""bitsandbytes' LLM.int8 (arXiv 2208.07339): int8 products, with columns that hold an outlier taken in 16 bits.

What is an outlier is decided over all rows of a pass, so a neighbour can change a row's bits: such a server is a
compute class of its own, warns that replays may change tokens, and is never a default. Use `int8` unless weights were
tuned for this one.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch

from ..linear import Linear, PlainLinear, is_small, own, tensor_bytes
from ..weight import Weight
from .int8 import quantize
from .nf4 import load_bitsandbytes

THRESHOLD: Final = 6.0
"""Magnitude from which an activation is an outlier: the paper's."""
_LARGEST: Final = 65_504.0
"""Largest fp16: the library rounds rows to it, and Gemma's reach 100,000."""


class LlmInt8Linear:
    """A weight in bitsandbytes' 8-bit layout."""

    needs_padding = False

    def __init__(self, weight: Weight, bias: torch.Tensor | None, device: torch.device) -> None:
        library = load_bitsandbytes()
        # It warns at every product that rows are rounded to fp16 inside. fp16 rows would give fp16 sums, that overflow.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        out_features, in_features = weight.shape
        values = torch.empty(weight.shape, dtype=torch.int8, device=device)
        scales = torch.empty(out_features, device=device)

        def quantize_rows(first: int, rows: torch.Tensor) -> None:
            at = slice(first, first + rows.shape[0])
            values[at], scales[at], _ = library.functional.int8_vectorwise_quant(rows.to(device, torch.float16))

        weight.groups(1, quantize_rows)
        self._module: Any = library.nn.Linear8bitLt(
            in_features, out_features, bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta"
        ).eval()
        self._module.weight = library.nn.Int8Params(
            values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
        )
        self._bias = None if bias is None else own(bias).to(device)
        self._size_bytes = out_features * (in_features + 4) + tensor_bytes(self._bias)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = self._module(rows.clamp(-_LARGEST, _LARGEST))
        out = product if out is None else out.copy_(product)
        return out if self._bias is None else out.add_(self._bias)


def make_llm_int8(weight: Weight, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """Quantize a float weight as LLM.int8; a small one is rounded alike and multiplied in fp32."""
    if device.type == "cpu" and is_small(weight):
        return PlainLinear(quantize(weight).floats(), bias, torch.float32)
    return LlmInt8Linear(weight, bias, device)
