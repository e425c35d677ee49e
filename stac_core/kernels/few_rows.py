"""Contract of a linear map of few rows, with what stands around it in a transformer block.

`few_rows_torch.few_rows` is the specification in code.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stac_core.kernels.checks import check_tensor
from stac_core.kernels.to_heads import Norm

FEW = 8  # rows at most


class Residual(NamedTuple):
    """What the result is added to, and how much of it: a factor per channel."""

    x: Tensor  # [..., N] float32
    gamma: Tensor  # [N] float32


class FewRows(Protocol):
    """One implementation of the contract."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: Norm | None = None,
        gelu: bool = False,
        residual: Residual | None = None,
    ) -> Tensor:
        """y = x weightᵀ + bias, of few rows, whose weights take longer to read than to multiply.

        x [..., K] of 1 to FEW rows, weight [N, K], bias [N], all float32 without gaps.
        norm: of x over K, first. gelu: of y, exact. residual: → residual.x + residual.gamma · y, last.
        → [..., N], a new tensor, computed in float32. ValueError naming the argument that does not fit.
        """


def check_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor, norm: Norm | None, residual: Residual | None
) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if x.ndim == 0 or x.shape[-1] == 0 or not 1 <= math.prod(x.shape[:-1]) <= FEW:
        raise ValueError(f"x: expected [..., K] of 1 to {FEW} rows, got shape {list(x.shape)}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [N, K], got shape {list(weight.shape)}")
    (*rows, width), outputs = x.shape, weight.shape[0]
    wanted = [("x", x, [*rows, width]), ("weight", weight, [outputs, width]), ("bias", bias, [outputs])]
    if norm is not None:
        wanted += [("norm.weight", norm.weight, [width]), ("norm.bias", norm.bias, [width])]
    if residual is not None:
        wanted += [("residual.x", residual.x, [*rows, outputs])]
        wanted += [("residual.gamma", residual.gamma, [outputs])]
    for name, tensor, shape in wanted:
        check_tensor(name, tensor, shape, torch.float32, x.device, "x")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, got strides {tensor.stride()}")
