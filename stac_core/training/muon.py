"""Muon: matrices step along the orthogonal factor of their momentum (K. Jordan et al. 2024).

Every direction of a matrix learns at one rate, where AdamW lets the few strong ones lead. Steps are scaled
to the length of AdamW's (arXiv 2502.16982, section 2.2), so both share one learning rate. PyTorch's own
takes one matrix at a time, some 25 small operations each, for which a GPU waits; here all of one shape go
together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stac_core.device import computes_in_bfloat16

MOMENTUM = 0.95
ITERATIONS = 5
POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of odd powers: brings singular values of 0 to 1 near 1 in 5 rounds
ADAMW_LENGTH = 0.2  # root mean square of AdamW's steps beside its learning rate


class Muon(Optimizer):
    """For parameters [m, n]."""

    found_inf: Tensor | None = None  # 1 = take no step, as fused optimizers of PyTorch know it

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for _, alike in groupby(sorted(with_gradient, key=_shape), key=_shape):
                self._step_alike(list(alike), group["lr"], group["weight_decay"])

    def _step_alike(self, parameters: list[Tensor], rate: float, decay: float) -> None:
        """Step parameters of one shape."""
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        usable = torch.ones((), device=gradients.device)
        if self.found_inf is not None:
            usable = usable - self.found_inf.to(gradients.device)
            gradients = gradients.where(usable > 0, 0.0)
        stored = [self._momentum(p) for p in parameters]
        momenta = torch.stack(stored).lerp(gradients, (1 - MOMENTUM) * usable)
        torch._foreach_copy_(stored, list(momenta.unbind()))
        length = ADAMW_LENGTH * math.sqrt(max(momenta.shape[1:]))
        steps = orthogonal_factor(gradients.lerp(momenta, MOMENTUM)) * (rate * length * usable)
        torch._foreach_mul_(parameters, 1 - rate * decay * usable)
        torch._foreach_sub_(parameters, list(steps.unbind()))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonal_factor(matrices: Tensor) -> Tensor:
    """About U Vᵀ of matrices U S Vᵀ [k, m, n], float32: singular values come out between 0.7 and 1.2.

    Newton-Schulz iterations, where the device can in bfloat16, which the matrices' directions bear.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(
        torch.bfloat16 if computes_in_bfloat16(matrices.device) else torch.float32
    )
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    first, third, fifth = POLYNOMIAL
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first)
    return (x.mT if tall else x).float()


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)
