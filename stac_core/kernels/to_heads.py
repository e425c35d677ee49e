"""Contract of what stands between the linear map to all heads and their attention.

`to_heads_torch.to_heads` is the specification in code.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stac_core.kernels.checks import check_tensor

LIKE = "qkv"  # whose device all arguments share


class Norm(NamedTuple):
    """A layer norm over channels: D of a head, or all of a token; both without gaps."""

    weight: Tensor  # [D] float32
    bias: Tensor  # [D] float32
    eps: float


class ToHeads(Protocol):
    """One implementation of the contract."""

    def __call__(
        self, qkv: Tensor, heads: int, q_norm: Norm, k_norm: Norm, rotary: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split a product into heads, norm queries and keys, rotate them by the token's place.

        qkv [B, T, 3 · heads · D] in 16 bits, queries first, without gaps; D a multiple of four.
        rotary [2, T, D] float32, without gaps: cosines and sines, see network/rope.py.
        → q, k, v [B, heads, T, D] like qkv, each without gaps; norm and rotation are computed in float32
        and rounded once. ValueError naming the argument that does not fit.
        """


def check_to_heads(qkv: Tensor, heads: int, q_norm: Norm, k_norm: Norm, rotary: Tensor) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if heads < 1:
        raise ValueError(f"heads = {heads}: expected at least 1")
    if qkv.ndim != 3 or qkv.shape[2] % (12 * heads):
        raise ValueError(
            f"qkv: expected [B, T, 3 · {heads} · D], D a multiple of 4, got shape {list(qkv.shape)}"
        )
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"qkv: expected 16 bits per number, got {qkv.dtype}")
    (_, tokens, width), device = qkv.shape, qkv.device
    dim = width // (3 * heads)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        for part in ("weight", "bias"):
            _check_packed(f"{name}.{part}", getattr(norm, part), [dim], torch.float32, device)
    _check_packed("rotary", rotary, [2, tokens, dim], torch.float32, device)
    _check_packed("qkv", qkv, list(qkv.shape), qkv.dtype, device)


def _check_packed(name: str, x: Tensor, shape: list[int], dtype: torch.dtype, device: torch.device) -> None:
    check_tensor(name, x, shape, dtype, device, LIKE)
    if not x.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got strides {x.stride()}")
