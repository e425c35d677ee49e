"""Contract of finding the highest scores of every lane, and where they are.

`highest_torch.highest` is the specification in code.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stac_core.kernels.checks import check_tensor


class Highest(NamedTuple):
    """Places in the rows of scores [lanes, n], ascending."""

    places: Tensor  # [lanes, m] int64, m = min(budget, n): of the highest scores, among equal ones the first
    rest: Tensor | None  # [lanes, n − m] int64: all others, where they were asked for


class FindHighest(Protocol):
    """One implementation of the contract."""

    def __call__(self, score: Tensor, budget: int, rest: bool = False) -> Highest:
        """score [lanes, n] float32; NaN counts as higher than +∞, −0 as 0.

        ValueError naming the argument that does not fit.
        """


def check_highest(score: Tensor, budget: int) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if score.ndim != 2:
        raise ValueError(f"score: expected [lanes, n], got shape {list(score.shape)}")
    check_tensor("score", score, list(score.shape), torch.float32, score.device, "score")
    if budget < 0:
        raise ValueError(f"budget = {budget}: expected a number of places, at least 0")
