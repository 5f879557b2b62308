"""Pages of the KV cache: 64 positions of one block, as floats or in 8 bits.

In 8 bits every run of up to 64 values of a head has a scale of its own: codes = round(127 * x / largest |x|). The
scales, bf16, stand behind the codes of their position, so that a position is one run of bytes. A position's bytes
depend on its own values only, by operations that are rounded correctly wherever they stand (maximum, division, rounding
to even), and attention reads new rows back from the page like old ones. So rows stay exact (attention.py), in a compute
class of their own. Why not one scale per head: keys have outliers at fixed places, and wide heads then lose four times
as much (docs/engine.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from .kvcache import LaneCache

GROUP: Final = 64
"""Most values that share a scale."""
_LEAST_GROUP: Final = 16
"""A head that cannot be cut evenly into groups of at least this many has one scale."""
LEVELS: Final = 127
_SMALLEST: Final = 2.0**-126
"""Smallest normal number: zeros have this scale, so nothing is ever divided by zero."""


def groups(width: int) -> int:
    """Scales that a head of `width` has per position."""
    size = max(size for size in range(1, GROUP + 1) if width % size == 0)
    return width // size if size >= _LEAST_GROUP else 1


def slot_width(width: int, dtype: torch.dtype) -> int:
    """Values of `dtype` that a head of `width` takes in a page, its scales among them."""
    return width + 2 * groups(width) if dtype is torch.int8 else width


def pack(fresh: torch.Tensor) -> torch.Tensor:
    """Floats [..., width] -> int8 [..., slot width]: codes, then the scales' bytes. What is not finite stays so."""
    width = fresh.shape[-1]
    grouped = fresh.float().view(*fresh.shape[:-1], groups(width), -1)
    scales = grouped.abs().amax(-1, keepdim=True).div_(LEVELS).clamp_min_(_SMALLEST).bfloat16()
    packed = torch.empty(*fresh.shape[:-1], slot_width(width, torch.int8), dtype=torch.int8, device=fresh.device)
    codes = torch.div(grouped, scales.float()).round_().clamp_(-LEVELS, LEVELS)
    packed[..., :width].copy_(codes.flatten(-2))
    packed[..., width:].view(torch.bfloat16).copy_(scales.squeeze(-1))
    return packed


def scale_(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Multiply codes [..., width], as floats, by their scales [..., groups], in place."""
    codes.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))


class Page:
    """64 positions (attention.TILE) of one block, held by one or more lanes."""

    __slots__ = ("cached", "codes", "holders", "key_scales", "keys", "scales", "slots", "value_scales", "values")

    def __init__(self, slots: torch.Tensor, width: int, payer: LaneCache) -> None:
        self.slots = slots
        """[2, kv_heads, 64, slot width]"""
        self.codes = slots
        """[2, kv_heads, 64, width]: floats, or codes to be multiplied by the scales."""
        self.scales: torch.Tensor | None = None
        """bf16 [2, kv_heads, 64, groups], None for floats."""
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if slots.dtype is torch.int8:
            self.codes = slots[..., :width]
            self.scales = slots[..., width:].view(torch.bfloat16)
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
    if pages[0].codes.dtype is out.dtype and len(pages) > 1:
        torch.cat([page.codes for page in pages], 2, out=out)
    else:  # a cat that converts takes six times as long
        for page, part in zip(pages, torch.split(out, pages[0].codes.shape[2], 2), strict=True):
            part.copy_(page.codes)
    scales = [page.scales for page in pages if page.scales is not None]
    if scales:
        scale_(out, scales[0] if len(scales) == 1 else torch.cat(scales, 2))
