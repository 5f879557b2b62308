"""Pages of the KV cache: 64 positions of one block, as floats or in 8 bits.

In 8 bits every position of every head has a scale of its own: codes = round(127 * x / largest |x|). The scale, fp32,
stands behind the codes of its position, so that a position is one run of bytes. A position's bytes depend on its own
values only, by operations that are rounded correctly wherever they stand (maximum, division, rounding to even), and
attention reads new rows back from the page like old ones. So rows stay exact (attention.py), in a compute class of
their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from .kvcache import LaneCache

LEVELS: Final = 127
SCALE_BYTES: Final = 4
"""One fp32 scale for each position and head of keys, and one of values."""
_SMALLEST: Final = 2.0**-126
"""Smallest normal fp32: zeros have this scale, so nothing is ever divided by zero."""


def slot_width(width: int, dtype: torch.dtype) -> int:
    """Values of `dtype` that a head of `width` takes in a page, its scale among them."""
    return width + SCALE_BYTES if dtype is torch.int8 else width


def pack(fresh: torch.Tensor) -> torch.Tensor:
    """Floats [..., width] -> int8 [..., width + 4]: codes, then the scale's bytes. What is not finite stays so."""
    fresh = fresh.float()
    width = fresh.shape[-1]
    scales = fresh.abs().amax(-1, keepdim=True).div_(LEVELS).clamp_min_(_SMALLEST)
    packed = torch.empty(*fresh.shape[:-1], width + SCALE_BYTES, dtype=torch.int8, device=fresh.device)
    packed[..., :width].copy_(torch.div(fresh, scales).round_())
    packed[..., width:].view(torch.float32).copy_(scales)
    return packed


class Page:
    """64 positions (attention.TILE) of one block, held by one or more lanes."""

    __slots__ = ("cached", "codes", "holders", "key_scales", "keys", "scales", "slots", "value_scales", "values")

    def __init__(self, slots: torch.Tensor, payer: LaneCache) -> None:
        self.slots = slots
        """[2, kv_heads, 64, slot width]"""
        self.codes = slots
        """[2, kv_heads, 64, head_dim]: floats, or codes to be multiplied by the scales."""
        self.scales: torch.Tensor | None = None
        """fp32 [2, kv_heads, 64, 1], None for floats."""
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if slots.dtype is torch.int8:
            self.codes = slots[..., :-SCALE_BYTES]
            self.scales = slots[..., -SCALE_BYTES:].view(torch.float32)
            self.key_scales, self.value_scales = self.scales.unbind(0)
        self.keys, self.values = self.codes.unbind(0)
        self.holders = [payer]
        """Lanes that read it; the first one pays for it."""
        self.cached = False
        """Kept for sessions that begin the same way (prefixes.py), also when no lane holds it."""

    @property
    def shared(self) -> bool:
        """Whether writing into it would change what others read."""
        return self.cached or len(self.holders) > 1

    def clear_from(self, slot: int) -> bool:
        """Zero the slots from here on, if nobody else reads them; whether that was done."""
        if not self.shared:
            self.slots[:, :, slot:].zero_()
        return not self.shared


def read(pages: list[Page], out: torch.Tensor) -> None:
    """Copy whole pages into `out` [2, kv_heads, positions, head_dim], as floats of its dtype."""
    if len(pages) == 1:
        out.copy_(pages[0].codes)
    else:
        torch.cat([page.codes for page in pages], 2, out=out)
    scales = [page.scales for page in pages if page.scales is not None]
    if scales:
        out.mul_(scales[0] if len(scales) == 1 else torch.cat(scales, 2))
