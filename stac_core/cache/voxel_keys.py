"""Cells of space packed into one integer, 21 bits per axis. Source: STAC (arXiv 2603.20284)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from stac_core.device import send

NOWHERE = -1  # key of a token without a place
BITS = 21
HALF = 1 << (BITS - 1)
MASK = (1 << BITS) - 1
ORIGIN = HALF | HALF << BITS | HALF << 2 * BITS  # key of the cell 0, 0, 0
REACH = 2  # retrieval looks this many cells around what is in view
FARTHEST = HALF - REACH - 2  # along an axis: what is around keeps to its bits, and out of what is at −1


def keys_from_points(points: Tensor, valid: Tensor, edge: float) -> Tensor:
    """points [..., 3], valid [...] bool → int64 keys [...]; NOWHERE where not valid or out of range."""
    cell = (points / edge).floor()
    inside = valid & (torch.linalg.vector_norm(cell, math.inf, -1) <= FARTHEST)  # not so for NaN
    return torch.where(inside, pack(cell.long()), NOWHERE)


def pack(cell: Tensor) -> Tensor:
    """Cells [..., 3] int64, each in ±2²⁰ → keys [...]."""
    return (cell * _axes(cell.device)).sum(-1) + ORIGIN


def unpack(keys: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([keys & MASK, keys >> BITS & MASK, keys >> 2 * BITS & MASK], -1) - HALF


def parents(keys: Tensor, levels: int | Tensor) -> Tensor:
    """Keys of the cells 2^levels times as wide that hold the given ones; levels: a number, or [..., 1]."""
    return pack(unpack(keys) >> levels)


def places(keys: Tensor) -> Tensor:
    """The different ones among the keys [n], ascending, without NOWHERE, which is below all others."""
    return torch.cat([_nowhere(keys.device), keys]).unique()[1:]


def within_wider(keys: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Cells that lie in a wider one of the others → keys and levels [n] of the widest that holds each."""
    for wide in level.unique(sorted=True).flip(0).tolist()[:-1]:
        around = pack(unpack(keys) >> (wide - level).clamp_min(0)[:, None])
        inside = (level < wide) & torch.isin(around, keys[level == wide])
        keys, level = torch.where(inside, around, keys), level.masked_fill(inside, wide)
    return keys, level


def middles(keys: Tensor, level: Tensor) -> Tensor:
    """Finest-level keys of the middles of cells [n]."""
    wide = 2 ** level[:, None]
    return pack(unpack(keys) * wide + wide // 2)


def runs_around(keys: Tensor, radius: int) -> Tensor:
    """Cells within ±radius of the given ones [n], as runs of consecutive keys.

    → the first key of each run, and the one behind it [2, n, (2·radius + 1)²]. Around NOWHERE lies no cell.
    """
    return keys[:, None] + _steps(radius, keys.device)


@functools.cache
def _axes(device: torch.device) -> Tensor:
    """By how much keys grow along each axis [3]."""
    return send(torch.tensor([1, 1 << BITS, 1 << 2 * BITS]), device)


@functools.cache
def _nowhere(device: torch.device) -> Tensor:
    """[1]."""
    return send(torch.tensor([NOWHERE]), device)


@functools.cache
def _steps(radius: int, device: torch.device) -> Tensor:
    """What leads from a key to the ends of the runs, as long as no axis leaves its bits."""
    if radius > REACH:
        raise ValueError(f"radius = {radius}: at most {REACH}")
    span = torch.arange(-radius, radius + 1)
    j, k = torch.cartesian_prod(span, span).unbind(-1)
    row = (j << BITS) + (k << 2 * BITS)
    return send(torch.stack([row - radius, row + radius + 1])[:, None], device)
