"""A linear map of few rows in plain PyTorch: the specification, and a path for any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.kernels.few_rows import Residual, check_few_rows
from stac_core.kernels.to_heads import Norm


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Residual | None = None,
) -> Tensor:
    """The contract of `few_rows.py`."""
    check_few_rows(x, weight, bias, norm, residual)
    return explicit(x, weight, bias, norm, gelu, residual, torch.float32)


def explicit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm | None,
    gelu: bool,
    residual: Residual | None,
    dtype: torch.dtype,
) -> Tensor:
    """The same in any precision."""
    x = x.to(dtype)
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    y = F.linear(x, weight.to(dtype), bias.to(dtype))
    if gelu:
        y = F.gelu(y)
    return y if residual is None else residual.x.to(dtype) + y * residual.gamma.to(dtype)
