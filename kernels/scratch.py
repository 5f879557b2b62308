"""Buffers that the blocks of one pass share, with the views into them that every block would make again.

A block of a small model is mostly calls: at one row a view costs as much as an addition. And the result of a wide
product is so large that the C library takes fresh pages for it in every block.
"""

from __future__ import annotations

import torch

from .models.config import ModelConfig


class Scratch:
    """Queries, keys and values of a pass, and gate and up; what is in them is valid until the next block."""

    def __init__(self, config: ModelConfig, rows: int, device: torch.device) -> None:
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = torch.empty(rows, (heads + 2 * kv_heads) * width, device=device)
        """fp32, as the product gives them."""
        by_head = self.qkv.view(rows, heads + 2 * kv_heads, width)
        self.rotated = by_head.narrow(1, 0, heads + kv_heads)
        """Queries and keys [rows, heads, d]."""
        self.pairs = torch.view_as_complex(self.rotated.view(rows, heads + kv_heads, width // 2, 2))
        """The same as complex numbers."""
        self.queries = by_head.narrow(1, 0, heads)
        kept = by_head.narrow(1, heads, 2 * kv_heads)
        self.fresh = kept.view(rows, 2, kv_heads, width).permute(1, 2, 0, 3)
        """What goes into the cache [2, kv_heads, rows, d]."""
        self._config = config
        self._gate_up: torch.Tensor | None = None

    def gate_up(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Room for gate and up side by side [rows, 2 * intermediate]; gate; up."""
        if self._gate_up is None:
            self._gate_up = self.qkv.new_empty(self.qkv.shape[0], 2 * self._config.intermediate_size)
            self._halves = self._gate_up.chunk(2, -1)
        return (self._gate_up, self._halves[0], self._halves[1])
