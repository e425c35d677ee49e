"""Queries, keys and values of all heads in plain PyTorch: the specification, and a path for any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.kernels.to_heads import Norm, check_to_heads


def to_heads(
    qkv: Tensor, heads: int, q_norm: Norm, k_norm: Norm, rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `to_heads.py`."""
    check_to_heads(qkv, heads, q_norm, k_norm, rotary)
    q, k, v = explicit(qkv, heads, q_norm, k_norm, rotary, torch.float32)
    return q.to(qkv.dtype), k.to(qkv.dtype), v.to(qkv.dtype)


def explicit(
    qkv: Tensor, heads: int, q_norm: Norm, k_norm: Norm, rotary: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in any precision, not yet rounded."""
    q, k, v = qkv.to(dtype).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
    rotary = rotary.to(dtype)
    return _rotated(_normed(q, q_norm), rotary), _rotated(_normed(k, k_norm), rotary), v


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """Within each half of a head, element i pairs with element i + D / 4."""
    cosines, sines = rotary
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return x * cosines + turned * sines
