"""Takes a block's tensors by name, checks their shapes and fuses what is multiplied together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from ..protocol.errors import CorruptCheckpoint
from .linear import Linear
from .models.config import ModelConfig
from .norms import LayerNorm, Norm, RMSNorm
from .rope import interleave
from .weight import Weight

Tensors = Mapping[str, torch.Tensor]
MakeLinear = Callable[[Weight, torch.Tensor | None], Linear]
"""Weight [out, in] and bias -> a Linear of the chosen precision."""


class Parts:
    """One block's tensors."""

    def __init__(self, config: ModelConfig, tensors: Tensors, make: MakeLinear, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._tensors = tensors
        self._make = make

    def norm(self, name: str) -> Norm:
        """A norm over the residual stream."""
        return make_norm(self.config, self._tensors, name, self.device)

    def linear(self, name: str, out_features: int, in_features: int, bias: bool) -> Linear:
        """One matrix as it is stored."""
        return self.stacked((name,), out_features, in_features, bias)

    def stacked(self, names: tuple[str, ...], out_features: int, in_features: int, bias: bool) -> Linear:
        """Several matrices of one shape, multiplied as one: results side by side."""
        shape = (out_features, in_features)
        parts = [partial(self.take, f"{name}.weight", shape) for name in names]
        biases = [self.take(f"{name}.bias", (out_features,)) for name in names] if bias else None
        return self._make(
            Weight((len(names) * out_features, in_features), parts), torch.cat(biases) if biases else None
        )

    def qkv(self) -> Linear:
        """Queries, keys, values in one product; queries and keys in pair order (rope.py)."""
        config = self.config
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        parts = [partial(self._heads, part, "weight", (config.hidden_size,)) for part in "qkv"]
        biases = [self._heads(part, "bias", ()) for part in "qkv"] if config.qkv_bias else None
        return self._make(Weight((rows, config.hidden_size), parts), torch.cat(biases) if biases else None)

    def _heads(self, part: str, kind: str, in_features: tuple[int, ...]) -> torch.Tensor:
        config = self.config
        heads = config.num_heads if part == "q" else config.num_kv_heads
        tensor = self.take(f"self_attn.{part}_proj.{kind}", (heads * config.head_dim, *in_features))
        return tensor if part == "v" else interleave(tensor, heads, config.rotated)

    def qk_norm(self) -> RMSNorm | None:
        """One weight row per query and key head, the query scale folded in."""
        config = self.config
        if not config.qk_norm:
            return None
        query = self.take("self_attn.q_norm.weight", (config.head_dim,)).float() + config.norm_offset
        key = self.take("self_attn.k_norm.weight", (config.head_dim,)).float() + config.norm_offset
        queries = [interleave(query, 1, config.rotated) * config.query_scale] * config.num_heads
        keys = [interleave(key, 1, config.rotated)] * config.num_kv_heads
        return RMSNorm(torch.stack(queries + keys), config.norm_eps, self.device)

    def sinks(self) -> torch.Tensor | None:
        """Scores of the attention sinks, one per query head."""
        return self.take("self_attn.sinks", (self.config.num_heads,)) if self.config.sinks else None

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor by name. Raises CorruptCheckpoint when it is missing or has another shape."""
        return take(self._tensors, name, shape)


def make_norm(config: ModelConfig, tensors: Tensors, name: str, device: torch.device) -> Norm:
    """A norm of the config's kind, over the residual stream."""
    shape = (config.hidden_size,)
    weight = take(tensors, f"{name}.weight", shape)
    if config.norm == "layer":
        return LayerNorm(weight, take(tensors, f"{name}.bias", shape), config.norm_eps, device)
    return RMSNorm(weight.float() + config.norm_offset, config.norm_eps, device)


def take(tensors: Tensors, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor by name. Raises CorruptCheckpoint when it is missing or has another shape."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CorruptCheckpoint(f"the checkpoint has no tensor {name!r}: its config promises one")
    if tuple(tensor.shape) != shape:
        raise CorruptCheckpoint(f"tensor {name!r} has shape {tuple(tensor.shape)}, its config says {shape}")
    return tensor
