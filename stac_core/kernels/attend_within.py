"""Contract of attention where all tokens see each other and nothing else.

`attend_within_torch.attend_within` is the specification in code.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from stac_core.kernels.checks import check_tensor


class AttendWithin(Protocol):
    """One implementation of the contract."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / √D) v of every head.

        q, k, v [B, heads, T, D] in 16 bits, rows without gaps, otherwise any strides.
        → like q, in the order of its use: [B, T, heads, D] without gaps, transposed. ValueError naming
        the argument that does not fit.
        """


def check_attend_within(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if q.ndim != 4:
        raise ValueError(f"q: expected [B, heads, T, D], got shape {list(q.shape)}")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q: expected 16 bits per number, got {q.dtype}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, list(q.shape), q.dtype, q.device, "q")
        if q.shape[3] > 1 and tensor.stride(3) != 1:
            raise ValueError(f"{name}: rows must be contiguous, got strides {tensor.stride()}")
