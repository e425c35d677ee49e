"""One wording for tensors that do not fit a contract."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(
    name: str, x: Tensor, shape: list[int], dtype: torch.dtype, device: torch.device, like: str
) -> None:
    """Raise ValueError naming the argument unless it has this shape, dtype and device, that of `like`."""
    if list(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: is on {x.device}, {like} on {device}; move them to one device")
