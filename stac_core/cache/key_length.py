"""Merged keys as long as their members: a mean of different directions is shorter, and attended to less.

The length of a key travels as one more channel of its value, so merging averages it like the rest. Ours;
the published method keeps the plain mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 1e-12


def widen(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] each → [..., D + 1]: beside the key a 0, which changes no cosine; its length by the value."""
    return F.pad(keys, (0, 1)), torch.cat([values, keys.norm(dim=-1, keepdim=True)], -1)


def stretch(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Widened pivots → keys and values to store [..., D], and how much shorter the plain means are [...]."""
    length = values[..., -1].clamp_min(SHORTEST)
    shrink = (keys.norm(dim=-1) / length).clamp_min(SHORTEST)
    return keys[..., :-1] / shrink[..., None], values[..., :-1], shrink


def relax(keys: Tensor, values: Tensor, shrink: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `stretch`."""
    keys, values = widen(keys, values)
    return keys * shrink[..., None], values
