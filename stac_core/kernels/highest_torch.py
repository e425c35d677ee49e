"""Finding the highest scores in plain PyTorch: the specification, and a path for any device."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.kernels.highest import Highest, check_highest


def highest(score: Tensor, budget: int, rest: bool = False) -> Highest:
    """The contract of `highest.py`."""
    check_highest(score, budget)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    places = order[:, :budget].sort(dim=-1).values
    if not rest:
        return Highest(places, None)
    lanes, n = score.shape
    left = torch.ones(lanes, n, dtype=torch.bool, device=score.device).scatter_(1, places, False)
    others = torch.arange(n, device=score.device).expand(lanes, n)[left]
    return Highest(places, others.view(lanes, n - places.shape[1]))
