"""How much a token has mattered so far: decayed sums of the attention it received.

Source: STAC (arXiv 2603.20284), decayed attention scores; XStreamVGGT (arXiv 2601.01204), importance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

POOL = 16  # patch queries averaged into one, XStreamVGGT
FRAMES = 4  # that make one decay where frames count, as many as a published pass has


@dataclass(frozen=True)
class Decay:
    """How old scores fade: by `temperature` in every pass as published, or in four frames however they come.

    Scores live in a time of their own: passes where the unit is "chunk", frames where it is "frames".
    """

    temperature: float
    unit: str

    def time(self, passes: int, frames: int) -> int:
        """How long so many passes over so many frames in all take."""
        return passes if self.unit == "chunk" else frames

    def left(self, time: int) -> float:
        """What is left of a score after that time."""
        return float(self.temperature ** self._times(time))

    def gathered(self, time: int | Tensor) -> float | Tensor:
        """What a token that always receives 1 has come to after that time; after one decay it is 1."""
        times = self._times(time)
        if self.temperature == 1:
            return times
        if isinstance(times, Tensor):  # of decays near 1, float32 would see nothing gathered
            return ((1 - self.temperature ** times.double()) / (1 - self.temperature)).float()
        return (1 - self.temperature**times) / (1 - self.temperature)

    def _times(self, time: int | Tensor) -> float | Tensor:
        """How often scores decay meanwhile."""
        return time if self.unit == "chunk" else time / FRAMES


def received(key_mass: Tensor, queries: int) -> Tensor:
    """Column sums [..., T] of the softmax over M queries → contribution to the score, 1 on average.

    The factor T/M keeps scores comparable while the stream grows.
    """
    return key_mass * (key_mass.shape[-1] / queries)


def update(score: Tensor, contribution: Tensor, decay: float) -> Tensor:
    """Scores [..., old] of known tokens and the contributions [..., T ≥ old] → scores [..., T]."""
    new = contribution.clone()
    new[..., : score.shape[-1]].add_(decay * score)
    return new


def pooled_queries(q: Tensor, special: int) -> Tensor:
    """One frame's queries [heads, P, D] → special ones, then means of 16 patches [heads, pooled, D]."""
    patches = q[:, special:].split(POOL, dim=1)
    return torch.cat([q[:, :special], *(group.mean(1, keepdim=True) for group in patches)], dim=1)


def importance_pooled(q: Tensor, keys: Tensor, special: int) -> Tensor:
    """Queries of the newest frame [heads, P, D], keys [heads, T, D] → [heads, T], equal in all heads.

    The published rule: queries and keys averaged over heads, mean of their plain products.
    """
    query = pooled_queries(q.float(), special).mean((0, 1))
    return (keys.float().mean(0) @ query).expand(keys.shape[0], -1)


def importance_per_head(q: Tensor, keys: Tensor, special: int) -> Tensor:
    """The same in each head, where products mean something: softmax of every pooled query, averaged."""
    logits = pooled_queries(q.float(), special) @ keys.float().mT * q.shape[-1] ** -0.5
    return logits.softmax(-1).mean(1)
