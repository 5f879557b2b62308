"""4-bit NormalFloat weights by bitsandbytes, in blocks of 64 with one scale each.

bitsandbytes is imported only when a model is loaded in NF4: it costs 100 MiB. Its fused kernel for CPUs with
AVX512-BF16 passes the row-identity test of tests/kernels/test_exactness.py; on other CPUs it dequantizes for every
product, which is right but slow.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from ...protocol.errors import ConfigError
from ..linear import Linear, PlainLinear, as_fp32, is_small, own, tensor_bytes
from ..weight import Weight
from .int8 import make_int8

BLOCK: Final = 64
"""Values that share a scale."""
_OUT_MULTIPLE: Final = 32
"""The fused kernel handles outputs in groups of this many; weights are padded with zero rows."""

_log = logging.getLogger(__name__)


class NF4Linear:
    """A weight in bitsandbytes' 4-bit layout; activations in bf16."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None, device: torch.device) -> None:
        library = load_bitsandbytes()
        self._out_features = weight.shape[0]
        self._padded = weight.shape[0] % _OUT_MULTIPLE > 0
        packed = _Packed(library, weight, device)
        self._multiply: Any = library.matmul_4bit
        self._weight, self._state = packed.weight, packed.state
        # The fused kernel takes rows one by one (padding 1 to 4 doubles its time); else it ends in torch's product.
        self.needs_padding = not packed.fused
        self._bias = None if bias is None else own(bias).to(device)
        self._size_bytes = tensor_bytes(self._weight, self._state.absmax, self._bias)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = self._multiply(rows.to(torch.bfloat16), self._weight, quant_state=self._state)
        if self._padded:
            product = product[:, : self._out_features]
        out = as_fp32(product, out)
        return out if self._bias is None else out.add_(self._bias)


class _Packed:
    """Quantizes and packs some rows at a time: for a whole matrix the library's own copies take 20 times its result."""

    def __init__(self, library: Any, weight: Weight, device: torch.device) -> None:
        self.weight: torch.Tensor
        self.state: Any
        self.fused = False
        self._library = library
        self._device = device
        self._shape = (weight.shape[0] + -weight.shape[0] % _OUT_MULTIPLE, weight.shape[1])
        weight.groups(_OUT_MULTIPLE, self._add)

    def _add(self, first: int, rows: torch.Tensor) -> None:
        part, state = self._quantized(rows)
        last = first + rows.shape[0]
        if first == 0:
            self._start(part, state, bool(getattr(state, "packing_format_for_cpu", False)))
        if self.fused:  # [out, in / 2], and scales [in / BLOCK, out]
            self.weight[first:last] = part
            self.state.absmax[:, first:last] = state.absmax
        else:  # both row after row
            self.weight.view(self._shape[0], -1)[first:last] = part.view(last - first, -1)
            self.state.absmax.view(self._shape[0], -1)[first:last] = state.absmax.view(last - first, -1)

    def _start(self, part: torch.Tensor, state: Any, fused: bool) -> None:
        """Room for all, and what the library keeps about a weight."""
        rows, width = self._shape
        size = (rows, width // 2) if fused else (rows * width // 2, 1)
        scales = (width // BLOCK, rows) if fused else (rows * width // BLOCK,)
        self.fused = fused
        self.weight = torch.empty(size, dtype=part.dtype, device=part.device)
        self.state = copy.copy(state)
        self.state.shape = torch.Size(self._shape)
        self.state.absmax = torch.empty(scales, dtype=state.absmax.dtype, device=part.device)

    def _quantized(self, rows: torch.Tensor) -> tuple[torch.Tensor, Any]:
        count, width = rows.shape
        module = self._library.nn.Linear4bit(
            width,
            count,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        module.weight = self._library.nn.Params4bit(
            rows,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
            blocksize=BLOCK,
            module=module,
        )
        module.to(self._device).eval()
        # The first product moves the weight into the layout of the fused kernel, where there is one.
        module(torch.zeros(1, width, dtype=torch.bfloat16, device=self._device))
        module.weight.module = None  # a cycle that would keep both until somebody collects garbage
        return module.weight.data, module.weight.quant_state


def make_nf4(weight: Weight, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """Quantize a float weight; int8 where rows are no whole number of 4-bit blocks."""
    width = weight.shape[1]
    if width % BLOCK:
        _log.info("a weight with rows of %d values is held in int8: nf4 needs a multiple of %d", width, BLOCK)
        return make_int8(weight, bias, device)
    if device.type == "cpu" and is_small(weight):
        return PlainLinear(dequantized(weight), bias, torch.float32)
    return NF4Linear(weight, bias, device)


def dequantized(weight: Weight) -> torch.Tensor:
    """What NF4 makes of a small weight, in fp32."""
    functions = load_bitsandbytes().functional
    packed, state = functions.quantize_4bit(
        weight.joined(torch.float32).contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
    )
    values: torch.Tensor = functions.dequantize_4bit(packed, state)
    return values


def load_bitsandbytes() -> Any:
    """Import bitsandbytes without letting it reach for anything outside.

    When imported it runs `import kernels` to fetch a kernel from the Hub. In a checkout of ours that name is this very
    package, and with Hugging Face's library installed it is a download. Either way it does without, so the name is
    blocked while it loads. Raises ConfigError when it is not installed.
    """
    try:
        with _no_kernels_package():
            import bitsandbytes
    except ImportError as exc:
        raise ConfigError(f"nf4 weights need bitsandbytes: pip install bitsandbytes, or use int8 ({exc})") from exc
    return bitsandbytes


@contextmanager
def _no_kernels_package() -> Iterator[None]:
    if "bitsandbytes" in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    absent = object()
    before, offline = modules.get("kernels", absent), os.environ.get("HF_HUB_OFFLINE")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    modules["kernels"] = None  # makes `import kernels` raise ImportError
    os.environ["HF_HUB_OFFLINE"] = "1"
    logger.setLevel(logging.ERROR)  # it warns about the missing kernel, which is what we want
    try:
        yield
    finally:
        logger.setLevel(level)
        if offline is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = offline
        if before is absent:
            del modules["kernels"]
        else:
            modules["kernels"] = before
