"""Elementwise activations whose bits do not depend on where in a batch a value stands.

torch's silu and gelu use other code for the last few values of a run than for the rest, and threads cut runs anywhere:
with 3 threads some rows change bits (measured). exp and erf run on the vector math library, which is position-proof,
and add, multiply, divide are correctly rounded; silu and tanh-gelu are both x / (1 + exp(-z)), so they are built so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

Activation = Callable[[torch.Tensor], torch.Tensor]

_TANH_LINEAR: Final = -2 * math.sqrt(2 / math.pi)
_TANH_CUBIC: Final = _TANH_LINEAR * 0.044715


class _Silu:
    """x * sigmoid(x)."""

    def __init__(self, device: torch.device) -> None:
        self._one = torch.ones((), device=device)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return values / torch.neg(values).exp_().add_(self._one)


class _GeluTanh:
    """0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + exp(-2u))."""

    def __init__(self, device: torch.device) -> None:
        # 0-dim tensors: a Python number costs over 1 us more in every call
        self._one = torch.ones((), device=device)
        self._linear = torch.tensor(_TANH_LINEAR, device=device)
        self._cubic = torch.tensor(_TANH_CUBIC, device=device)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        exponent = values * values
        exponent.mul_(self._cubic).add_(self._linear).mul_(values)
        return values / exponent.exp_().add_(self._one)


class _Gelu:
    """0.5 x (1 + erf(x / sqrt 2))."""

    def __init__(self, device: torch.device) -> None:
        self._one = torch.ones((), device=device)
        self._half = torch.tensor(0.5, device=device)
        self._root = torch.tensor(math.sqrt(0.5), device=device)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return (values * self._root).erf_().add_(self._one).mul_(self._half).mul_(values)


class _Sigmoid:
    """1 / (1 + exp(-x))."""

    def __init__(self, device: torch.device) -> None:
        self._one = torch.ones((), device=device)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return torch.div(self._one, torch.neg(values).exp_().add_(self._one))


_ACTIVATIONS: Final[dict[str, Callable[[torch.device], Activation]]] = {
    "silu": _Silu,
    "gelu_tanh": _GeluTanh,
    "gelu": _Gelu,
}


def make_activation(name: str, device: torch.device) -> Activation:
    """The activation of a ModelConfig: fp32 in, a new fp32 tensor out."""
    return _ACTIVATIONS[name](device)


def make_sigmoid(device: torch.device) -> Activation:
    """The logistic function, for gates."""
    return _Sigmoid(device)
