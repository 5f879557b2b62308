"""One decoder block, assembled from parts: norm, attention, norm, gated MLP, with what a family adds or leaves out.

Hidden states at block borders are in the span's compute dtype; inside a block everything but the matrix products is
fp32. The parts come from models/<family>.py; which kernel multiplies is the business of the Linear objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..protocol.errors import CorruptCheckpoint
from .activation import Activation, make_activation
from .attention import QueryBlock, attend, attend_fused
from .kvcache import BlockCache
from .linear import Linear
from .models.config import ModelConfig
from .norms import RMSNorm
from .rope import interleave, rotate_

Tensors = Mapping[str, torch.Tensor]
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]
"""Weight [out, in] and bias -> a Linear of the chosen precision."""


class PieceView(Protocol):
    """What a block needs of one session's share of a pass."""

    first: int
    """Its rows are [first, last) of the pass."""
    last: int
    position: int
    """Absolute position of its first row."""
    queries: list[QueryBlock]
    """How its rows are cut for attention in this kind of block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """Names of a family's norms inside a block."""

    attention: str
    """Before attention."""
    mlp: str
    """Before the MLP."""
    after_attention: str | None = None
    """On attention's result, before the residual sum."""
    after_mlp: str | None = None
    """On the MLP's result, before the residual sum."""


class Block:
    """Weights of one block and the order in which they are applied."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        tensors: Tensors,
        names: NormNames,
        make: MakeLinear,
        device: torch.device,
    ) -> None:
        reader = _Parts(config, tensors, make, device)
        self.window = config.window(index)
        self.rope = config.rope_of(index)
        self._heads = config.num_heads
        self._kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._norm = reader.norm(names.attention)
        self._qkv = reader.qkv()
        self._qk_norm = reader.qk_norm()
        self._output = reader.linear("self_attn.o_proj", config.hidden_size, config.output_bias)
        self._after_attention = reader.norm(names.after_attention) if names.after_attention else None
        self._mlp_norm = reader.norm(names.mlp)
        self._gate_up = reader.gate_up()
        self._down = reader.linear("mlp.down_proj", config.hidden_size, config.mlp_bias)
        self._after_mlp = reader.norm(names.after_mlp) if names.after_mlp else None
        self._activation: Activation = make_activation(config.activation, device)
        self._scale = None if config.qk_norm else torch.tensor(config.query_scale, device=device)
        self._attend = attend if device.type == "cpu" else attend_fused

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices."""
        return (self._qkv, self._output, self._gate_up, self._down)

    def forward(
        self,
        hidden: torch.Tensor,
        rotations: torch.Tensor,
        pieces: Sequence[tuple[PieceView, BlockCache]],
        scratch: Scratch,
    ) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden], same dtype; every piece's keys and values go into its cache."""
        residual = hidden.float()
        mixed = self._attention(self._norm(residual), rotations, pieces, scratch)
        if self._after_attention is not None:
            mixed = self._after_attention(mixed)
        residual = mixed.add_(residual)
        inner = self._mlp(self._mlp_norm(residual))
        if self._after_mlp is not None:
            inner = self._after_mlp(inner)
        return inner.add_(residual).to(hidden.dtype)

    def _attention(
        self,
        rows: torch.Tensor,
        rotations: torch.Tensor,
        pieces: Sequence[tuple[PieceView, BlockCache]],
        scratch: Scratch,
    ) -> torch.Tensor:
        count, heads, kv_heads, width = rows.shape[0], self._heads, self._kv_heads, self._head_dim
        qkv = self._qkv(rows).view(count, heads + 2 * kv_heads, width)
        rotated = qkv.narrow(1, 0, heads + kv_heads)
        if self._qk_norm is not None:
            self._qk_norm.apply_(rotated)
        rotate_(rotated, rotations)
        queries = qkv.narrow(1, 0, heads)
        if self._scale is not None:
            queries.mul_(self._scale)
        fresh = (
            qkv.narrow(1, heads, 2 * kv_heads).view(count, 2, kv_heads, width).permute(1, 2, 0, 3)
        )  # [2, kv_heads, rows, d]
        for piece, cache in pieces:
            count = piece.last - piece.first  # narrow() is half the price of slicing
            cache.slab.narrow(2, piece.position - cache.base, count).copy_(fresh.narrow(2, piece.first, count))
            for block in piece.queries:
                cached = cache.slab.narrow(2, block.key_start - cache.base, block.key_end - block.key_start)
                keys, values = scratch.floats(cached).unbind(0)  # [kv_heads, keys, d] each
                first, rows_in_block = piece.first + block.first, block.last - block.first
                self._attend(
                    queries.narrow(0, first, rows_in_block),
                    keys,
                    values,
                    block,
                    scratch.mixed.narrow(0, first, rows_in_block),
                )
        return self._output(scratch.mixed)

    def _mlp(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(rows).chunk(2, -1)  # [rows, intermediate] each
        return self._down(self._activation(gate).mul_(up))


class Scratch:
    """Memory that the blocks of one pass share, so that none of it is allocated per layer."""

    def __init__(self, rows: int, width: int, cache_values: int, dtype: torch.dtype, device: torch.device) -> None:
        self.mixed = torch.zeros(rows, width, dtype=torch.float32, device=device)
        """Attention's result; padding rows stay zero."""
        self._convert = dtype != torch.float32 and device.type == "cpu"
        self._buffer = torch.empty(cache_values if self._convert else 0, dtype=torch.float32, device=device)

    def floats(self, slab: torch.Tensor) -> torch.Tensor:
        """A part of a cache slab in fp32 (elsewhere than on a CPU: as it is), valid until the next call."""
        if not self._convert:
            return slab
        return self._buffer[: slab.numel()].view(slab.shape).copy_(slab)


class _Parts:
    """Takes a block's tensors by name, checks their shapes and fuses what is multiplied together."""

    def __init__(self, config: ModelConfig, tensors: Tensors, make: MakeLinear, device: torch.device) -> None:
        self._config = config
        self._tensors = tensors
        self._make = make
        self._device = device

    def norm(self, name: str) -> RMSNorm:
        return self._norm(self._take(f"{name}.weight", (self._config.hidden_size,)))

    def linear(self, name: str, out_features: int, bias: bool) -> Linear:
        weight = self._take(f"{name}.weight", (out_features, None))
        return self._make(weight, self._take(f"{name}.bias", (out_features,)) if bias else None)

    def qkv(self) -> Linear:
        """Queries, keys, values in one product; queries and keys in pair order (rope.py)."""
        config = self._config
        weights = [self._heads(part, "weight", config.hidden_size) for part in "qkv"]
        biases = [self._heads(part, "bias", None) for part in "qkv"] if config.qkv_bias else None
        return self._make(torch.cat(weights), torch.cat(biases) if biases else None)

    def _heads(self, part: str, kind: str, in_features: int | None) -> torch.Tensor:
        config = self._config
        heads = config.num_heads if part == "q" else config.num_kv_heads
        shape = (heads * config.head_dim,) if in_features is None else (heads * config.head_dim, in_features)
        tensor = self._take(f"self_attn.{part}_proj.{kind}", shape)
        return tensor if part == "v" else interleave(tensor, heads)

    def qk_norm(self) -> RMSNorm | None:
        """One weight row per query and key head, the query scale folded in."""
        config = self._config
        if not config.qk_norm:
            return None
        query = self._take("self_attn.q_norm.weight", (config.head_dim,)).float() + config.norm_offset
        key = self._take("self_attn.k_norm.weight", (config.head_dim,)).float() + config.norm_offset
        rows = [interleave(query, 1) * config.query_scale] * config.num_heads + [
            interleave(key, 1)
        ] * config.num_kv_heads
        return RMSNorm(torch.stack(rows), config.norm_eps, self._device)

    def gate_up(self) -> Linear:
        config = self._config
        names = ("mlp.gate_proj", "mlp.up_proj")
        weights = [self._take(f"{name}.weight", (config.intermediate_size, config.hidden_size)) for name in names]
        biases = (
            [self._take(f"{name}.bias", (config.intermediate_size,)) for name in names] if config.mlp_bias else None
        )
        return self._make(torch.cat(weights), torch.cat(biases) if biases else None)

    def _norm(self, weight: torch.Tensor) -> RMSNorm:
        return RMSNorm(weight.float() + self._config.norm_offset, self._config.norm_eps, self._device)

    def _take(self, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CorruptCheckpoint(f"the checkpoint has no tensor {name!r} in a block: its config promises one")
        if len(tensor.shape) != len(shape) or any(
            want is not None and want != have for want, have in zip(shape, tensor.shape, strict=True)
        ):
            raise CorruptCheckpoint(f"tensor {name!r} has shape {tuple(tensor.shape)}, its config says {shape}")
        return tensor
