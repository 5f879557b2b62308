"""What some families do to attention scores between the product and the softmax: soft caps, ALiBi, sinks.

Everything is by absolute key position and by head, from operations whose bits do not depend on where in a batch a value
stands (see activation.py), so rows stay exact.
"""

from __future__ import annotations

import math

import torch

from .models.config import ModelConfig


class ScoreForm:
    """The treatment of one block's scores."""

    def __init__(self, config: ModelConfig, sinks: torch.Tensor | None, device: torch.device) -> None:
        kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
        self._group = group
        self._cap = config.score_softcap
        self._falcon = config.alibi == "falcon"
        self._scale = config.query_scale
        self._slopes: torch.Tensor | None = None
        if config.alibi != "none":
            self._slopes = alibi_slopes(config.num_heads).view(kv_heads, 1, group, 1).to(device)
        self._sinks = None if sinks is None else sinks.float().view(kv_heads, group).to(device)

    @property
    def has_sinks(self) -> bool:
        """Whether every query also attends to a sink without a value."""
        return self._sinks is not None

    @property
    def by_position(self) -> bool:
        """Whether scores depend on where the key stands."""
        return self._slopes is not None

    def shape_(self, scores: torch.Tensor, rows: int, key_start: int) -> None:
        """Cap and tilt fp32 scores [kv_heads, rows * group padded, keys] in place; keys start at `key_start`."""
        if self._cap is not None:  # cap * tanh(x / cap), by an exponential (activation.py says why)
            scores.mul_(2 / self._cap).exp_().add_(1.0).reciprocal_().mul_(-2 * self._cap).add_(self._cap)
        if self._slopes is not None:
            bias = self._tilt(torch.arange(key_start, key_start + scores.shape[-1], device=scores.device))
            kv_heads, _, width = scores.shape
            scores[:, : rows * self._group].view(kv_heads, rows, self._group, width).add_(bias)

    def _tilt(self, keys: torch.Tensor) -> torch.Tensor:
        """[kv_heads, 1, group, keys] added to the scores."""
        assert self._slopes is not None
        if not self._falcon:
            return self._slopes * keys
        # Falcon adds it before the scores are scaled, and transformers computes it in bf16
        return (self._slopes.bfloat16() * keys).float().mul_(self._scale)

    def sinks(self, rows: int) -> torch.Tensor:
        """Scores of the sinks for so many rows (position, head of group), padded ones too: [kv_heads, rows, 1]."""
        assert self._sinks is not None
        return self._sinks.repeat(1, -(-rows // self._group))[:, :rows, None]


def make_form(config: ModelConfig, sinks: torch.Tensor | None, device: torch.device) -> ScoreForm | None:
    """The form of a config's scores; None where they go into the softmax as they are."""
    if config.score_softcap is None and config.alibi == "none" and sinks is None:
        return None
    return ScoreForm(config, sinks, device)


def alibi_slopes(heads: int) -> torch.Tensor:
    """One slope per head, fp32 (arXiv 2108.12409): a geometric series, and every second of a finer one for the rest."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = _series(power, torch.arange(1, power + 1))
    if power == heads:
        return slopes
    rest = min(power, heads - power)
    return torch.cat((slopes, _series(2 * power, torch.arange(1, 1 + 2 * rest, 2))))


def _series(heads: int, exponents: torch.Tensor) -> torch.Tensor:
    base = torch.tensor(2 ** (-(2 ** -(math.log2(heads) - 3))), dtype=torch.float32)
    return torch.pow(base, exponents.int())
