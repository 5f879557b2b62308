"""Mixtures of experts: a router picks a few MLPs per token.

A row's result depends on that row alone: routing is done row by row in fp32, every expert multiplies its rows with the
row-exact kernels of the span's precision, and a row adds up its experts in the order of their numbers, whatever else is
in the pass. Padding rows are not routed. Experts are held one by one, as two matrices each, so that quantization and
padding are the same as everywhere.
"""

from __future__ import annotations

import torch

from .activation import make_sigmoid
from .linear import Linear, make_linear, pad_rows
from .mlp import GatedMlp
from .models.config import ExpertsConfig
from .parts import Parts
from .scratch import Scratch
from .weight import Weight


class Experts:
    """The experts of one block, their router, and the shared expert where there is one."""

    def __init__(self, parts: Parts, experts: ExpertsConfig) -> None:
        self._router = _Router(parts, experts)
        self._experts = [
            GatedMlp(parts, f"mlp.experts.{index}", experts.intermediate_size, experts.bias)
            for index in range(experts.count)
        ]
        self._shared = _SharedExpert(parts, experts.shared_size) if experts.shared_size else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices, the router's too."""
        found = [self._router.linear, *(linear for expert in self._experts for linear in expert.linears)]
        return (*found, *(self._shared.linears if self._shared is not None else ()))

    def __call__(self, rows: torch.Tensor, count: int, scratch: Scratch | None = None) -> torch.Tensor:
        chosen, weights = self._router(rows, count)  # [count, active] each
        out = torch.zeros_like(rows)
        for index in torch.unique(chosen).tolist():
            places = (chosen == index).nonzero()  # [found, 2]: row, rank
            found, ranks = places.unbind(1)
            mixed = _run(self._experts[index], rows.index_select(0, found))
            mixed.mul_(weights[found, ranks].unsqueeze(1))
            out.index_add_(0, found, mixed)  # no row twice: an expert is chosen once per row
        return out if self._shared is None else out.add_(self._shared(rows, count))


def _run(expert: GatedMlp, rows: torch.Tensor) -> torch.Tensor:
    count = rows.shape[0]
    if any(linear.needs_padding for linear in expert.linears):
        rows = pad_rows(rows)
    return expert(rows, count)[:count]


class _Padded:
    """A Linear that pads for itself: the span need not pad everything for a matrix of a few numbers."""

    needs_padding = False

    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    @property
    def size_bytes(self) -> int:
        return self._linear.size_bytes

    def __call__(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        found = self._linear(pad_rows(rows))[: rows.shape[0]]
        return found if out is None else out.copy_(found)


class _Router:
    """Which experts a row goes through and how much of each it takes."""

    def __init__(self, parts: Parts, experts: ExpertsConfig) -> None:
        shape = (experts.count, parts.config.hidden_size)
        weight = Weight.of(parts.take("mlp.router.weight", shape).float())
        bias = parts.take("mlp.router.bias", shape[:1]).float() if experts.bias else None
        # never quantized, and fp32: a rounded score would pick another expert
        self.linear = _Padded(make_linear(weight, bias, torch.float32, parts.device))
        self._active = experts.active
        self._chosen_only = experts.router == "chosen"
        self._normalize = experts.normalize

    def __call__(self, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert numbers and weights, both [count, active]."""
        scores = self.linear(rows[:count])
        if self._chosen_only:
            values, chosen = torch.topk(scores, self._active, dim=-1)
            return chosen, _softmax(values)
        weights, chosen = torch.topk(_softmax(scores), self._active, dim=-1)
        return chosen, weights / weights.sum(-1, keepdim=True) if self._normalize else weights


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """By row, from operations whose bits do not depend on other rows."""
    raised = torch.sub(scores, scores.amax(-1, keepdim=True)).exp_()
    return raised.div_(raised.sum(-1, keepdim=True))


class _SharedExpert:
    """An MLP for every token behind a gate of one number (Qwen2-MoE)."""

    def __init__(self, parts: Parts, inner: int) -> None:
        self._mlp = GatedMlp(parts, "mlp.shared_expert", inner, bias=False)
        weight = Weight.of(parts.take("mlp.shared_expert_gate.weight", (1, parts.config.hidden_size)).float())
        self._gate = _Padded(make_linear(weight, None, torch.float32, parts.device))
        self._sigmoid = make_sigmoid(parts.device)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its matrices."""
        return (*self._mlp.linears, self._gate)

    def __call__(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        gate = self._sigmoid(self._gate(rows))  # [rows, 1]
        return self._mlp(rows, count).mul_(gate)
