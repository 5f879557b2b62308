"""The plain halves of a block that follow attention: gated or not. Mixtures of experts are in experts.py."""

from __future__ import annotations

from typing import Protocol

import torch

from .activation import Activation, make_activation, make_sigmoid
from .linear import Linear
from .models.config import ModelConfig
from .parts import Parts
from .scratch import Scratch


class Mlp(Protocol):
    """Rows to rows."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices."""

    def __call__(self, rows: torch.Tensor, count: int, scratch: Scratch | None = None) -> torch.Tensor:
        """fp32 [rows, hidden] -> fp32 [rows, hidden], a tensor of its own; rows from `count` on are padding.

        `scratch` is the pass's, where its MLP is a block's whole one.
        """


class GatedMlp:
    """down(activation(gate) * up)."""

    def __init__(self, parts: Parts, name: str, inner: int, bias: bool) -> None:
        hidden = parts.config.hidden_size
        self._gate_up = parts.stacked((f"{name}.gate_proj", f"{name}.up_proj"), inner, hidden, bias)
        self._down = parts.linear(f"{name}.down_proj", hidden, inner, bias)
        self._combine = make_gate(parts.config, parts.device)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices."""
        return (self._gate_up, self._down)

    def __call__(self, rows: torch.Tensor, count: int, scratch: Scratch | None = None) -> torch.Tensor:
        if scratch is None:
            gate, up = self._gate_up(rows).chunk(2, -1)  # [rows, intermediate] each
        else:
            both, gate, up = scratch.gate_up()
            self._gate_up(rows, both)
        return self._down(self._combine(gate, up))


class PlainMlp:
    """down(activation(up))."""

    def __init__(self, parts: Parts, name: str) -> None:
        config = parts.config
        hidden, inner = config.hidden_size, config.intermediate_size
        self._up = parts.linear(f"{name}.up_proj", inner, hidden, config.mlp_bias)
        self._down = parts.linear(f"{name}.down_proj", hidden, inner, config.mlp_bias)
        self._activation: Activation = make_activation(config.activation, parts.device)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices."""
        return (self._up, self._down)

    def __call__(self, rows: torch.Tensor, count: int, scratch: Scratch | None = None) -> torch.Tensor:
        return self._down(self._activation(self._up(rows)))


class Gate(Protocol):
    """How gate and up become one."""

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, inner] twice -> fp32 [rows, inner]; both may be overwritten."""


class _Gated:
    """activation(gate) * up."""

    def __init__(self, activation: Activation) -> None:
        self._activation = activation

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._activation(gate).mul_(up)


class _Clamped:
    """GPT-OSS: gate * sigmoid(alpha * gate) * (up + 1), gate and up clamped before."""

    def __init__(self, limit: float, alpha: float, device: torch.device) -> None:
        self._limit, self._alpha = limit, alpha
        self._sigmoid = make_sigmoid(device)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=self._limit)
        up = up.clamp(-self._limit, self._limit).add_(1.0)
        return self._sigmoid(gate * self._alpha).mul_(gate).mul_(up)


def make_gate(config: ModelConfig, device: torch.device) -> Gate:
    """The gate of a config's MLPs and experts."""
    if config.swiglu_limit is not None:
        return _Clamped(config.swiglu_limit, config.swiglu_alpha, device)
    return _Gated(make_activation(config.activation, device))
