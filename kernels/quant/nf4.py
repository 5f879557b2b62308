"""4-bit NormalFloat weights by bitsandbytes, in blocks of 64 with one scale each.

bitsandbytes is imported only when a model is loaded in NF4: it costs 100 MiB. Its fused kernel for CPUs with
AVX512-BF16 passes the row-identity test of tests/kernels/test_exactness.py; on other CPUs it dequantizes for every
product, which is right but slow.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from ...protocol.errors import ConfigError
from ..linear import Linear, PlainLinear, is_small, tensor_bytes
from .int8 import make_int8

BLOCK: Final = 64
"""Values that share a scale."""
_OUT_MULTIPLE: Final = 32
"""The fused kernel handles outputs in groups of this many; weights are padded with zero rows."""

_log = logging.getLogger(__name__)


class NF4Linear:
    """A weight in bitsandbytes' 4-bit layout; activations in bf16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> None:
        library = load_bitsandbytes()
        self._out_features, in_features = weight.shape
        padding = -self._out_features % _OUT_MULTIPLE
        padded = torch.cat((weight, weight.new_zeros(padding, in_features))) if padding else weight
        module = library.nn.Linear4bit(
            in_features,
            padded.shape[0],
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        module.weight = library.nn.Params4bit(
            padded.float().clone(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=False,
            blocksize=BLOCK,
            module=module,
        )
        module.to(device).eval()
        # The first product moves the weight into the layout of the fused kernel, where there is one.
        module(torch.zeros(1, in_features, dtype=torch.bfloat16, device=device))
        self._multiply: Any = library.matmul_4bit
        self._weight: torch.Tensor = module.weight.data
        self._state: Any = module.weight.quant_state
        # The fused kernel takes rows one by one (padding 1 to 4 doubles its time); else it ends in torch's product.
        self.needs_padding = not getattr(self._state, "packing_format_for_cpu", False)
        self._bias = None if bias is None else bias.float().to(device)
        self._size_bytes = tensor_bytes(self._weight, self._state.absmax, self._bias)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._multiply(rows.to(torch.bfloat16), self._weight, quant_state=self._state)
        out = out[:, : self._out_features].float()
        return out if self._bias is None else out.add_(self._bias)


def make_nf4(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> Linear:
    """Quantize a float weight [out, in]; int8 where rows are no whole number of 4-bit blocks."""
    if weight.shape[1] % BLOCK:
        _log.info("a weight with rows of %d values is held in int8: nf4 needs a multiple of %d", weight.shape[1], BLOCK)
        return make_int8(weight, bias, device)
    if device.type == "cpu" and is_small(weight):
        return PlainLinear(dequantized(weight), bias, torch.float32)
    return NF4Linear(weight, bias, device)


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 makes of a weight, in fp32."""
    functions = load_bitsandbytes().functional
    packed, state = functions.quantize_4bit(
        weight.float().contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
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
