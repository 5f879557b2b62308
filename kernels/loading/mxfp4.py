"""MXFP4, the 4-bit floats GPT-OSS is published in: 32 values share a power of two (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from typing import Final

import torch

MX_BLOCK: Final = 32
"""Values that share a scale; two to a byte, the first one in the low half."""
_BIAS: Final = 127
_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_rows(number: int, rows: slice, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows of one expert, fp32 [out, in], exactly.

    packed uint8 [experts, out, in / 32, 16]; scales uint8 [experts, out, in / 32].
    """
    packed, scales = packed[number, rows], scales[number, rows]
    table = torch.tensor((*_VALUES, *(-value for value in _VALUES)), dtype=torch.float32)
    halves = torch.stack((packed & 15, packed >> 4), -1)  # [out, blocks, 16, 2]
    values = table[halves.int()].flatten(-2)  # [out, blocks, 32]
    return torch.ldexp(values, scales.int().sub_(_BIAS).unsqueeze(-1)).flatten(-2)
