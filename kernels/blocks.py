"""One decoder block, assembled from a config: norms, attention form, MLP form, residual form.

Hidden states at block borders are in the span's compute dtype; inside a block everything but the matrix products is
fp32. Which kernel multiplies is the business of the Linear objects. The names of tensors are the same for every family
(loading/shapes.py lists them, loading/layouts.py translates).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .experts import Experts
from .kvcache import BlockCache
from .linear import Linear
from .mlp import GatedMlp, Mlp, PlainMlp
from .models.config import ModelConfig
from .norms import Norm
from .parts import MakeLinear, Parts, Tensors
from .ragged import Attention
from .rope import rotate_
from .scores import make_form
from .scratch import Scratch


class Block:
    """Weights of one block and the order in which they are applied."""

    def __init__(
        self, config: ModelConfig, index: int, tensors: Tensors, make: MakeLinear, device: torch.device
    ) -> None:
        parts = Parts(config, tensors, make, device)
        self.window = config.window(index)
        self.rope = config.rope_of(index)
        self._rotated = config.rotated > 0 and index not in config.unrotated_blocks
        self._norm = parts.norm("input_layernorm")
        self._qkv = parts.qkv()
        self._qk_norm = parts.qk_norm()
        self._output = parts.linear(
            "self_attn.o_proj", config.hidden_size, config.num_heads * config.head_dim, config.output_bias
        )
        self._side_by_side = config.residual != "sequential"
        self._after_attention = parts.norm("post_attention_layernorm") if config.post_norms else None
        self._mlp_norm = _mlp_norm(config, parts)
        self._mlp = _mlp(config, index, parts)
        self._after_mlp = parts.norm("post_feedforward_layernorm") if config.post_norms else None
        self._added = None if config.residual_scale == 1.0 else torch.tensor(config.residual_scale, device=device)
        self._scale = None if config.qk_norm else torch.tensor(config.query_scale, device=device)
        self._form = make_form(config, parts.sinks(), device)
        self._fused = device.type != "cpu" and self._form is None
        self.batched = device.type == "cpu" and (self._form is None or not self._form.by_position)
        """Whether single rows of many sessions may attend together (ragged.py)."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices."""
        return (self._qkv, self._output, *self._mlp.linears)

    def forward(
        self,
        hidden: torch.Tensor,
        rotations: torch.Tensor,
        attention: Attention,
        caches: Sequence[BlockCache],
        scratch: Scratch,
    ) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden], same dtype; every piece's keys and values go into its cache."""
        residual, count = hidden.float(), attention.rows
        rows = self._norm(residual)
        mixed = self._attention(rows, rotations, attention, caches, scratch)
        if self._side_by_side:
            rows = rows if self._mlp_norm is None else self._mlp_norm(residual)
            return self._mlp(rows, count, scratch).add_(mixed).add_(residual).to(hidden.dtype)
        if self._after_attention is not None:
            mixed = self._after_attention(mixed)
        if self._added is not None:
            mixed.mul_(self._added)
        residual = mixed.add_(residual)
        inner = self._mlp(residual if self._mlp_norm is None else self._mlp_norm(residual), count, scratch)
        if self._after_mlp is not None:
            inner = self._after_mlp(inner)
        if self._added is not None:
            inner.mul_(self._added)
        return inner.add_(residual).to(hidden.dtype)

    def _attention(
        self,
        rows: torch.Tensor,
        rotations: torch.Tensor,
        attention: Attention,
        caches: Sequence[BlockCache],
        scratch: Scratch,
    ) -> torch.Tensor:
        self._qkv(rows, scratch.qkv)
        if self._qk_norm is not None:
            self._qk_norm.apply_(scratch.rotated)
        if self._rotated:
            rotate_(scratch.pairs, rotations)
        if self._scale is not None:
            scratch.queries.mul_(self._scale)
        return self._output(attention.run(scratch.queries, scratch.fresh, caches, self._form, fused=self._fused))


def _mlp_norm(config: ModelConfig, parts: Parts) -> Norm | None:
    """Before the MLP; None where it reads what attention reads."""
    if config.residual == "shared":
        return None
    return parts.norm("pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm")


def _mlp(config: ModelConfig, index: int, parts: Parts) -> Mlp:
    experts = config.experts_of(index)
    if experts is not None:
        return Experts(parts, experts)
    if config.gated:
        return GatedMlp(parts, "mlp", config.intermediate_size, config.mlp_bias)
    return PlainMlp(parts, "mlp")
