"""Random numbers by counter: a world's draws depend on its seed and on their order, nothing else.

A stateful generator would make a world depend on its neighbours in the batch and on the device.
Here every number is a hash of (seed, draw, position), so one world alone equals the same world in
a batch, on the CPU as on a GPU. Mixing function: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The low 64 bits as a signed integer, which is what tensors hold."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word


_STEP = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical right shift; the sign must not smear into the high bits."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def mix(word: Tensor) -> Tensor:
    """Scramble 64-bit integers so that neighbours share nothing."""
    word = word + _STEP
    word = (word ^ _shift(word, 30)) * _MIX_1
    word = (word ^ _shift(word, 27)) * _MIX_2
    return word ^ _shift(word, 31)


def world_seeds(seed: int, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Seeds [batch] of the worlds of one batch; world 0 of batch `seed` is `World(seed)`."""
    first = torch.full((batch,), _signed(seed), dtype=torch.int64, device=device)
    index = torch.arange(batch, dtype=torch.int64, device=device)
    return mix(first) + index * _MIX_1


class Draws:
    """A stream of random tensors, one row per world."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds = seeds  # [B] int64
        self._count = 0

    @property
    def batch(self) -> int:
        return self.seeds.shape[0]

    def uniform(self, *shape: int, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """Uniform floats [B, *shape] in [low, high); bounds may be tensors that broadcast."""
        self._count += 1
        position = torch.arange(math.prod(shape), dtype=torch.int64, device=self.seeds.device)
        keys = mix(self.seeds + _signed(self._count * _MIX_2))[:, None]
        bits = _shift(mix(keys + position * _STEP), 40)  # 24 bits fill a float32 exactly
        unit = (bits.float() * 2.0**-24).view(self.batch, *shape)
        return low + unit * (high - low)

    def log_uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """Floats [B, *shape] whose logarithm is uniform between two positive bounds."""
        return self.uniform(*shape, low=math.log(low), high=math.log(high)).exp()

    def chance(self, share: float | Tensor, *shape: int) -> Tensor:
        """Booleans [B, *shape], true with the given probability."""
        return self.uniform(*shape) < share

    def choice(self, weights: list[float], *shape: int) -> Tensor:
        """Indices [B, *shape] into `weights`, drawn in their proportion."""
        edges = torch.tensor(weights, device=self.seeds.device).cumsum(0)
        below = self.uniform(*shape)[..., None] * edges[-1] >= edges[:-1]
        return below.sum(-1)
