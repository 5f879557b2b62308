"""Rotary position embedding from tables indexed by absolute position, applied as one complex multiplication.

A query or key head of width d is d/2 pairs, and rotating pair i at position p multiplies it, as a complex number, by
exp(i p f_i). Checkpoints in Hugging Face layout put the two halves of a pair d/2 apart; `interleave` brings them
together by permuting the rows of q_proj and k_proj once, at load time. Scores do not change (queries and keys are
permuted alike), and six elementwise calls per layer become one.

A table row depends on its position only, so a key has the same bits whether it came in a prompt or as one token.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch.nn import functional

from .models.config import RopeConfig

_TABLE_STEP: Final = 1_024
"""Positions added to a table at a time, at least."""
SERIAL_ELEMENTS: Final = 32_767
"""torch splits elementwise work over threads from 32,768 elements on, anywhere in a row; the complex product
rounds differently in vector code and at such ragged ends, so bigger work is cut into whole rows below that."""


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair, fp32 [head_dim / 2], as transformers computes them.

    Where only a part of a head is rotated, `head_dim` is the width of that part.
    """
    frequencies = _series(rope.theta, head_dim)
    match rope.kind:
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(rope, frequencies)
        case "yarn":
            return _yarn(rope, head_dim)
        case "longrope":
            return _longrope(rope, head_dim)
    return frequencies


def _series(theta: float, head_dim: int) -> torch.Tensor:
    return torch.reciprocal(theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths stretched, short ones kept, a smooth passage between."""
    wavelengths = 2 * math.pi / frequencies
    longest = rope.original_positions / rope.low_freq_factor
    shortest = rope.original_positions / rope.high_freq_factor
    smooth = (rope.original_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(wavelengths > longest, frequencies / rope.factor, blended)
    return torch.where(wavelengths < shortest, frequencies, stretched)


def _yarn(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): interpolation and extrapolation blended by dimension."""

    def border(rotations: float) -> float:
        return head_dim * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = border(rope.beta_fast), border(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (1.0 / (rope.factor * wavelengths)) * ramp + (1.0 / wavelengths) * (1 - ramp)


def _longrope(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """LongRoPE: every pair has its own stretch."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (torch.tensor(rope.factors, dtype=torch.float32) * rope.theta**exponents)


def interleave(rows: torch.Tensor, heads: int, rotated: int | None = None) -> torch.Tensor:
    """Bring the halves of every pair together: [heads * d, ...] in Hugging Face order -> pair order.

    The pairs are in the first `rotated` values of a head (by default all); the others stay in place.
    """
    by_head = rows.reshape(heads, -1, *rows.shape[1:])
    rotated = by_head.shape[1] if rotated is None else rotated
    pairs = by_head[:, :rotated].reshape(heads, 2, rotated // 2, *rows.shape[1:]).transpose(1, 2)
    pairs = pairs.reshape(heads, rotated, *rows.shape[1:])
    return torch.cat((pairs, by_head[:, rotated:]), 1).reshape(rows.shape)


class RopeTable:
    """exp(i p f) for every position asked for so far, 1 for pairs that are not rotated; grows on demand."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device, rotated: int | None = None) -> None:
        self._rope = rope
        self._rotated = head_dim if rotated is None else rotated
        self._still = (head_dim - self._rotated) // 2
        self._frequencies = inverse_frequencies(rope, self._rotated)
        self._table = torch.empty(0, 1, head_dim // 2, dtype=torch.complex64, device=device)

    def rows(self, positions: torch.Tensor, end: int) -> torch.Tensor:
        """complex64 [count, 1, head_dim / 2] for int64 positions, all below `end`."""
        if end > self._table.shape[0]:
            self._grow(end)
        return self._table.index_select(0, positions)

    def _grow(self, end: int) -> None:
        old = self._table.shape[0]
        new = max(end, old + max(_TABLE_STEP, old // 2))
        positions = torch.arange(old, new, dtype=torch.int64)
        angles = positions.float()[:, None] * self._frequencies_at(positions)  # [count, rotated / 2]
        scale = self._rope.attention_factor
        fresh = torch.complex(angles.cos() * scale, angles.sin() * scale)
        fresh = functional.pad(fresh, (0, self._still), value=1.0).unsqueeze(1)
        self._table = torch.cat((self._table, fresh.to(self._table.device)))

    def _frequencies_at(self, positions: torch.Tensor) -> torch.Tensor:
        """The same for all positions, except for dynamic scaling beyond the pretrained context.

        There transformers derives the base from the length of the sequence at hand, so that one key has several
        rotations depending on chunking. We take, for every position, the rotation it gets when tokens come one by
        one: equal to transformers' decoding, and a function of the position alone.
        """
        rope = self._rope
        if rope.kind != "dynamic" or int(positions[-1]) < rope.original_positions:
            return self._frequencies
        lengths = (positions + 1).clamp(min=rope.original_positions).double()
        growth = rope.factor * lengths / rope.original_positions - (rope.factor - 1)
        bases = rope.theta * growth ** (self._rotated / (self._rotated - 2))  # [count]
        exponents = torch.arange(0, self._rotated, 2, dtype=torch.int64).float() / self._rotated
        return torch.reciprocal(bases[:, None].float() ** exponents)


def rotate_(pairs: torch.Tensor, rotations: torch.Tensor) -> None:
    """Rotate heads in pair order, complex64 [rows, n, d / 2], in place, by complex64 [rows, 1, d / 2]."""
    rows, count, width = pairs.shape
    step = max(1, SERIAL_ELEMENTS // (count * width))
    if rows <= step or torch.get_num_threads() == 1:
        pairs.mul_(rotations)
        return
    for first in range(0, rows, step):
        pairs[first : first + step].mul_(rotations[first : first + step])
