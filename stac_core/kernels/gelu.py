"""Contract of the activation in the MLP of a transformer block.

`gelu_torch.gelu_` is the specification in code.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Gelu(Protocol):
    """One implementation of the contract."""

    def __call__(self, x: Tensor) -> Tensor:
        """x · Φ(x) in the place of x, Φ the normal distribution (exact GELU, arXiv 1606.08415).

        x: any shape in 16 bits, without gaps. → x. ValueError where it does not fit.
        """


def check_gelu(x: Tensor) -> None:
    """Raise ValueError before anything is launched."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x: expected 16 bits per number, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"x: must be contiguous, got strides {x.stride()}")
