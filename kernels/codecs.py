"""Activations <-> bytes, as protocol/tensors.py lays them out and docs/spec/tensors.md explains.

The arithmetic is numpy on purpose. A decode step moves one row, where each torch call costs more than the
work in it; and every operation used here (divide, square root, multiply, round to even) is correctly rounded
by IEEE 754, so the bits depend on the row alone: not on the other rows, the thread count, the vector width
or the machine. Cut points rely on that: a server that decodes what it just encoded gets what its neighbour
would have got.

int8s, per row: the 4 values of largest magnitude (first index on a tie) travel exactly; the rest is divided
by the block's maximum s (bf16) and square-root companded: q = round(127 * sign(y) * sqrt|y|), decoded as
s * q|q| / 127^2.

What is not finite: fp32 and bf16 carry NaN and infinity bit for bit. int8s sends up to four of them in a row
exactly and zeros the others, so a poisoned row stays poisoned (whatever norm reads it makes it NaN) and no
other row can be: encoding never fails, because in a shared batch it would fail for everybody. Scales are
always finite; a scale that is not can only come from a broken or hostile peer and is refused.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..protocol.errors import LocalProtocolError, RemoteProtocolError
from ..protocol.tensors import BLOCK, OUTLIERS, Codec, payload_size

Buffer = bytes | bytearray | memoryview
Floats = NDArray[np.float32]

LEVELS: Final = 127
MAX_HIDDEN: Final = 65_536
"""Outlier indices are u16."""
_SMALLEST_SCALE: Final = np.float32(2.0**-126)
"""Smallest normal number: a block of zeros gets it, so nothing is ever divided by zero."""
_LARGEST_SCALE: Final = np.float32(2.0**127 * (2 - 2.0**-7))
"""Largest finite bf16: a maximum above it may not round up to infinity."""
_BF16_INFINITY_BITS: Final = 0x7F80
"""As u16, every bf16 below this is finite and not negative."""


class _Companded(NamedTuple):
    """The four parts of int8s rows, in wire order."""

    levels: NDArray[np.int8]  # [rows, hidden]
    scales: NDArray[np.uint16]  # [rows, blocks], bf16 bits
    indices: NDArray[np.uint16]  # [rows, OUTLIERS]
    outliers: Floats  # [rows, OUTLIERS]


def encode(hidden: torch.Tensor, codec: Codec) -> bytes:
    """Turn hidden states [rows, hidden] of any float dtype into exactly payload_size() bytes."""
    rows = hidden.detach().cpu()
    match codec:
        case Codec.FP32:
            return rows.float().contiguous().numpy().tobytes()
        case Codec.BF16:
            return rows.bfloat16().contiguous().view(torch.int16).numpy().tobytes()
        case Codec.INT8S:
            return _join(_compand(rows))


def decode(buffer: Buffer, codec: Codec, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Turn a peer's bytes into a fresh tensor [rows, hidden].

    Raises RemoteProtocolError on a wrong size or content that no encoder writes.
    """
    expected = payload_size(codec, rows, hidden)
    size = memoryview(buffer).nbytes
    if size != expected:
        raise RemoteProtocolError(
            f"{codec.label} tensor of {rows} x {hidden} must be {expected} bytes, peer sent {size}"
        )
    match codec:
        case Codec.FP32:
            return _copy(buffer, torch.float32, rows, hidden).to(dtype)
        case Codec.BF16:
            return _copy(buffer, torch.bfloat16, rows, hidden).to(dtype)
        case Codec.INT8S:
            return torch.from_numpy(_expand(_split(buffer, rows, hidden))).to(dtype)


def round_trip(hidden: torch.Tensor, codec: Codec) -> torch.Tensor:
    """What the next server would see of `hidden` [rows, hidden]: decode(encode(x)), same dtype and device."""
    match codec:
        case Codec.FP32:
            return hidden.float().to(hidden.dtype)
        case Codec.BF16:
            return hidden.bfloat16().to(hidden.dtype)
        case Codec.INT8S:
            expanded = _expand(_compand(hidden.detach().cpu()))
            return torch.from_numpy(expanded).to(device=hidden.device, dtype=hidden.dtype)


def _copy(buffer: Buffer, dtype: torch.dtype, rows: int, hidden: int) -> torch.Tensor:
    """A tensor of its own: the receive buffer is reused, and torch refuses read-only memory."""
    out = torch.empty((rows, hidden), dtype=dtype)
    out.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(buffer, np.uint8)
    return out


def _compand(rows: torch.Tensor) -> _Companded:
    """Encode [rows, hidden] into the four parts of int8s."""
    count, hidden = rows.shape
    if not OUTLIERS <= hidden <= MAX_HIDDEN:
        raise LocalProtocolError(
            f"int8s needs {OUTLIERS} <= hidden <= {MAX_HIDDEN}, got {hidden}: use bf16 for this model"
        )
    blocks = -(-hidden // BLOCK)
    values = np.zeros((count, blocks * BLOCK), np.float32)
    values[:, :hidden] = rows.float().numpy()
    magnitudes = np.abs(values)  # [rows, padded]
    indices = _largest(magnitudes)
    every = np.arange(count)[:, None]
    outliers = values[every, indices]
    if not np.isfinite(outliers).all():  # only then can anything else be infinite or NaN
        magnitudes[~np.isfinite(magnitudes)] = 0
    grouped = magnitudes.reshape(count, blocks, BLOCK)
    scale_bits = _bfloat16_bits(np.clip(grouped.max(axis=2), _SMALLEST_SCALE, _LARGEST_SCALE))
    np.divide(grouped, _bfloat16_values(scale_bits)[:, :, None], out=grouped)
    np.sqrt(magnitudes, out=magnitudes)
    np.multiply(magnitudes, np.float32(LEVELS), out=magnitudes)
    np.rint(magnitudes, out=magnitudes)
    np.minimum(magnitudes, np.float32(LEVELS), out=magnitudes)
    np.copysign(magnitudes, values, out=magnitudes)
    levels = magnitudes[:, :hidden].astype(np.int8)
    return _Companded(levels, scale_bits, indices.astype(np.uint16), outliers)


def _largest(magnitudes: Floats) -> NDArray[np.intp]:
    """Indices [rows, OUTLIERS] of each row's largest values, which are zeroed in place.

    Repeated argmax instead of a partition: on a tie it always takes the first index, and a partition's choice
    depends on the vector width of the machine. NaN counts as largest.
    """
    rows = np.arange(len(magnitudes))
    indices = np.empty((len(magnitudes), OUTLIERS), np.intp)
    for place in range(OUTLIERS):
        found = magnitudes.argmax(axis=1)
        magnitudes[rows, found] = -1  # below every magnitude, so that no index is taken twice
        indices[:, place] = found
    magnitudes[rows[:, None], indices] = 0
    return indices


def _join(parts: _Companded) -> bytes:
    """Lay the four parts of each row side by side."""
    columns = [part.astype(part.dtype.newbyteorder("<"), copy=False).view(np.uint8) for part in parts]
    return np.concatenate(columns, axis=1).tobytes()


def _split(buffer: Buffer, rows: int, hidden: int) -> _Companded:
    """Check a peer's int8s payload, whose size is right already, and take its rows apart."""
    if not OUTLIERS <= hidden <= MAX_HIDDEN:
        raise RemoteProtocolError(f"int8s cannot carry rows of {hidden} values")
    wire = np.frombuffer(buffer, np.uint8).reshape(rows, payload_size(Codec.INT8S, 1, hidden))
    scales_end = hidden + 2 * -(-hidden // BLOCK)
    indices_end = scales_end + 2 * OUTLIERS
    # tobytes: these columns are neither contiguous nor aligned, and small.
    scales = np.frombuffer(wire[:, hidden:scales_end].tobytes(), "<u2").reshape(rows, -(-hidden // BLOCK))
    indices = np.frombuffer(wire[:, scales_end:indices_end].tobytes(), "<u2").reshape(rows, OUTLIERS)
    outliers = np.frombuffer(wire[:, indices_end:].tobytes(), "<f4").reshape(rows, OUTLIERS)
    if rows and scales.max() >= _BF16_INFINITY_BITS:
        raise RemoteProtocolError("int8s scale is negative or not finite: the peer's encoder is broken")
    if rows and indices.max() >= hidden:
        raise RemoteProtocolError(f"int8s outlier index {indices.max()} is outside a row of {hidden} values")
    return _Companded(wire[:, :hidden].view(np.int8), scales, indices, outliers)


def _expand(parts: _Companded) -> Floats:
    """Decode the four parts of int8s to float32 [rows, hidden]."""
    count, hidden = parts.levels.shape
    blocks = parts.scales.shape[1]
    values = np.zeros((count, blocks * BLOCK), np.float32)
    values[:, :hidden] = parts.levels
    np.multiply(values, np.abs(values), out=values)  # q|q|: exact, at most 2^14
    steps = _bfloat16_values(parts.scales) / np.float32(LEVELS * LEVELS)
    grouped = values.reshape(count, blocks, BLOCK)
    np.multiply(grouped, steps[:, :, None], out=grouped)
    values[np.arange(count)[:, None], parts.indices] = parts.outliers
    return values[:, :hidden]


def _bfloat16_bits(values: Floats) -> NDArray[np.uint16]:
    """Round finite float32 to bf16 (to nearest, ties to even), as bits."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _bfloat16_values(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
