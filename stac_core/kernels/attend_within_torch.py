"""Attention of tokens to each other in plain PyTorch: the specification, and a path for any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stac_core.kernels.attend_within import check_attend_within


def attend_within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The contract of `attend_within.py`."""
    check_attend_within(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).contiguous().transpose(1, 2)
