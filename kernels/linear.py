"""Multiplying rows by a weight matrix so that a row's bits do not depend on the rows beside it.

Measured (CPU, 1-3 threads, 1 to 1,024 rows): a matrix times one row takes another kernel than times many and rounds
differently; from two rows on, oneDNN's packed kernels and MKL's fp32 kernels from four rows on give every row the same
bits. So all rows come padded to a multiple of ROWS. Packing weights ahead into oneDNN's own layout is also what makes
decode fast: 24 GB/s against 10-12 for F.linear on the same bf16 or fp32 matrix of 4096 x 4096 and 4 rows.

A processor that cannot multiply bf16 emulates it: 4 rows take twice, 128 rows three times as long as the same numbers
in fp32, and without AVX-512 oneDNN does not pack bf16 at all. There weights are held and multiplied in fp32.

Between matrices everything is fp32: a Linear takes fp32 rows and gives fp32 rows, and rounds inside to what it
multiplies in. The classes for quantized weights are in quant/.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Any, Final, Protocol, overload

import torch

from .weight import Weight

ROWS: Final = 4
"""Rows are padded to a multiple of this."""
SMALL_WEIGHT: Final = 65_536
"""Weights with fewer values are kept in fp32 and multiplied by MKL: a oneDNN call costs 13 us, one of bitsandbytes 40,
more than the work."""


class Linear(Protocol):
    """y = x W^T + b for fp32 rows."""

    needs_padding: bool
    """Whether the row count must be a multiple of ROWS for rows to be exact."""

    @property
    def size_bytes(self) -> int:
        """Memory the weights hold."""

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 [rows, in] -> fp32 [rows, out]: `out`, or a tensor of its own."""


class PlainLinear:
    """torch's own matrix product in `dtype`: small weights on the CPU, any weight on other devices."""

    needs_padding = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._transposed = weight.to(dtype).contiguous().t()  # a view made once: functional.linear costs 2 us more
        self._bias = own(bias)

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self._transposed, self._bias)

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._dtype is torch.float32:
            out = torch.mm(rows, self._transposed, out=out)
        else:
            out = as_fp32(torch.mm(rows.to(self._dtype), self._transposed), out)
        return out if self._bias is None else out.add_(self._bias)


class PackedLinear:
    """A weight in oneDNN's blocked layout, multiplied in bf16 or fp32 with fp32 sums."""

    needs_padding = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        operators: Any = torch.ops.mkldnn
        self._dtype = dtype
        self._weight = operators._reorder_linear_weight(weight.to(dtype).contiguous(), ROWS)
        self._bias = own(bias)
        self._size_bytes = weight.numel() * dtype.itemsize + tensor_bytes(self._bias)
        self._multiply = operators._linear_pointwise.default

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = self._multiply(rows.to(self._dtype), self._weight, None, "none", [], "")
        out = as_fp32(product, out)
        return out if self._bias is None else out.add_(self._bias)


def as_fp32(product: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """A product in fp32, in `out` if that is given."""
    return product.float() if out is None else out.copy_(product)


def make_linear(weight: Weight, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device) -> Linear:
    """An unquantized Linear. The kernel depends on the weight's size and the machine, never on the rows."""
    if device.type != "cpu":
        return PlainLinear(weight.joined(dtype).to(device), None if bias is None else bias.to(device), dtype)
    if is_small(weight):
        return PlainLinear(own(weight.joined(dtype)), bias, torch.float32)
    held = held_dtype(dtype)
    if can_pack():
        return PackedLinear(weight.joined(dtype), bias, held)
    return PlainLinear(weight.joined(dtype), bias, held)


@overload
def own(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def own(tensor: torch.Tensor | None) -> torch.Tensor | None: ...
def own(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy in fp32: a view of a mapped file would keep all that was ever read of the file in memory."""
    return None if tensor is None else tensor.to(torch.float32, copy=True)


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what an unquantized weight of so many bits is kept and multiplied on this CPU."""
    return torch.float32 if dtype is torch.bfloat16 and not multiplies_bf16() else dtype


@lru_cache(maxsize=1)
def multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products: AVX512-BF16 or AMX. On other than x86, where torch cannot tell: yes."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return cpu_has("_is_avx512_bf16_supported") or cpu_has("_is_amx_tile_supported")


def cpu_has(probe_name: str) -> bool:
    """Ask torch.cpu for a capability. The probes are private, but the only way torch tells."""
    probe: Any = getattr(torch.cpu, probe_name, None)
    return bool(probe is not None and probe())


def is_small(weight: Weight) -> bool:
    """Whether a weight is too small for anything but plain fp32 on the CPU (quantized ones: with rounded values)."""
    return weight.values < SMALL_WEIGHT


def can_pack() -> bool:
    """Whether this torch has oneDNN and its packing operators (used by torch's own compiler, but not public)."""
    backend: Any = torch.backends.mkldnn
    operators: Any = torch.ops.mkldnn
    return (
        bool(backend.is_available())
        and hasattr(operators, "_reorder_linear_weight")
        and hasattr(operators, "_linear_pointwise")
    )


def pad_rows(rows: torch.Tensor) -> torch.Tensor:
    """Append zero rows up to a multiple of ROWS."""
    missing = -rows.shape[0] % ROWS
    if not missing:
        return rows
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1])))


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Memory of some tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
