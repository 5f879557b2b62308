"""Stored GGUF tensors -> torch tensors of a compute dtype.

The arithmetic of the K-quants is the gguf package's; its values are float32 and equal to the ones Hugging Face
computes. It is called on chunks that stay in the cache (130,000 values): 170 to 450 million values a second on one
core, where its own grouping by 16 rows gets 30 million.
"""

from __future__ import annotations

from typing import Final

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from ...protocol.errors import UnsupportedModel

CHUNK_VALUES: Final = 131_072
Q8_BLOCK: Final = 32
"""Values that share one scale in Q8_0."""
_Q8_BYTES: Final = 2 + Q8_BLOCK
_PLAIN: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SUPPORTED: Final = (
    *_PLAIN,
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
"""Storage types that can be read."""


def dequantize(raw: NDArray[np.uint8], kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A fresh tensor of `shape` from stored bytes. Raises UnsupportedModel on a storage type we do not read."""
    if kind in _PLAIN:
        plain = torch.from_numpy(raw.copy()).view(_PLAIN[kind])
        return plain.reshape(shape).to(dtype)
    if kind not in SUPPORTED:
        raise UnsupportedModel(f"GGUF tensor type {kind} is not supported: {', '.join(SUPPORTED)} are")
    quantization = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    step = CHUNK_VALUES // block
    blocks = raw.reshape(-1, block_bytes)
    out = torch.empty(len(blocks) * block, dtype=dtype)
    for first in range(0, len(blocks), step):
        chunk = blocks[first : first + step].reshape(1, -1)  # one row: the package then works on it in one go
        values = torch.from_numpy(gguf.dequantize(chunk, quantization)).reshape(-1)
        out[first * block : first * block + len(values)] = values
    return out.reshape(shape)


def split_q8(raw: NDArray[np.uint8], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Q8_0 bytes as int8 values of `shape` and float16 scales [..., columns / 32]: the exact stored numbers."""
    blocks = raw.reshape(-1, _Q8_BYTES)
    values = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).reshape(shape)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").reshape(*shape[:-1], shape[-1] // Q8_BLOCK)
    return torch.from_numpy(values), torch.from_numpy(scales)
