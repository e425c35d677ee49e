"""Which tokens stay when there is room for fewer: pure functions, listed in a table.

Tokens lie in temporal order, oldest first. Of equal ranks the first stays: the older token, and the same one
in every run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor, int], Tensor]  # (score [..., T], moment of the stream) → rank [..., T] float32


def by_score(score: Tensor, moment: int) -> Tensor:
    """Heavy hitters: the highest scores stay."""
    return score


def by_recency(score: Tensor, moment: int) -> Tensor:
    """The newest stay."""
    return torch.arange(score.shape[-1], dtype=torch.float32, device=score.device).expand_as(score)


def by_chance(score: Tensor, moment: int) -> Tensor:
    """Any stay; the same ones in every run at the same moment of the stream."""
    generator = torch.Generator().manual_seed(moment)
    return torch.rand(score.shape, generator=generator).to(score.device)


RULES: dict[str, Rule] = {"score": by_score, "recent": by_recency, "random": by_chance}
