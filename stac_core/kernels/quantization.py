"""Keys and values as codes: eight or four bits per number, with a scale and an offset per group.

Every token is coded on its own and only once, so tokens can be dropped or moved without touching their
neighbours. Outliers of keys sit in fixed channels; an optional factor per channel, fixed at the start of
the stream, takes them out first. Source: XStreamVGGT (arXiv 2601.01204), with the zero kept as an offset,
because a zero clamped to the code range is wrong for groups far from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.kernels.attend import CODE_GROUP, Codes

SMALLEST_SCALE = 6e-8  # of float16


class Column(NamedTuple):
    """One stored field of a token: trailing width and dtype."""

    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Codec:
    """How vectors of `dim` numbers are stored; 16 bits keep them as they are, in `dtype`.

    ValueError where the bits cannot hold the width.
    """

    bits: int
    dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.bits == 4 and self.dim % 2:
            raise ValueError(f"4-bit storage needs an even head width, got {self.dim}: use 8 bits")

    @property
    def exact(self) -> bool:
        return self.bits == 16

    @property
    def columns(self) -> tuple[Column, ...]:
        """The stored fields of one vector."""
        if self.exact:
            return (Column(self.dim, self.dtype),)
        codes = Column(self.dim * self.bits // 8, torch.uint8)
        return codes, Column(2 * self._groups, torch.float16)

    def encode(self, x: Tensor, chance: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """[..., dim] → its stored fields, rounded to the nearest code, or up and down by `chance`."""
        if self.exact:
            return (x.to(self.dtype),)
        groups = _in_groups(x.float(), self._groups)
        offset = groups.amin(-1, keepdim=True).half()
        levels = 2**self.bits - 1
        scale = ((groups.amax(-1, keepdim=True) - offset.float()) / levels).clamp_min(SMALLEST_SCALE).half()
        steps = (groups - offset.float()) / scale.float()
        if chance is not None:
            rounding = torch.rand(steps.shape, generator=chance, device=steps.device)
            steps = steps + rounding - 0.5
        codes = steps.round().clamp(0, levels).to(torch.uint8)
        return self._pack(codes.flatten(-2)[..., : self.dim]), torch.cat([scale, offset], -1).flatten(-2)

    def decode(self, fields: tuple[Tensor, ...]) -> Tensor:
        """The stored fields → [..., dim] in `dtype`."""
        if self.exact:
            return fields[0]
        return Codes(fields[0], fields[1], self.bits, self.dim).decode(self.dtype)

    @property
    def _groups(self) -> int:
        return -(-self.dim // CODE_GROUP)

    def _pack(self, codes: Tensor) -> Tensor:
        return codes if self.bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4


def _in_groups(x: Tensor, groups: int) -> Tensor:
    """[..., dim] → [..., groups, width]; the last group repeats its end, which changes no minimum."""
    width = min(x.shape[-1], CODE_GROUP)
    missing = groups * width - x.shape[-1]
    if missing:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    return x.unflatten(-1, (groups, width))
