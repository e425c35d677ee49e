"""Fetching retrieved tokens in plain PyTorch: the specification, and a path for any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stac_core.kernels.attend import Codes
from stac_core.kernels.gather import Gathered, Wanted, check_gather, shares


def gather(
    kinds: Sequence[Wanted], budget: int, dim: int, dtype: torch.dtype, factor: Tensor | None = None
) -> Gathered:
    """The contract of `gather.py`."""
    check_gather(kinds, budget, dim, dtype, factor)
    lanes, device = kinds[0].slots.shape[0], kinds[0].slots.device
    keys, values = torch.zeros(2, lanes, budget, dim, dtype=dtype, device=device)
    bias = torch.full((lanes, budget), -math.inf, device=device)
    found, total = shares(kinds)
    for kind, share in zip(kinds, found, strict=True):
        token = torch.arange(kind.slots.shape[1], device=device)
        place = share.before[:, None] + token
        comes = (token < share.wanted[:, None]) & (place < budget)
        lane, token = comes.nonzero().unbind(-1)
        place, slot = place[lane, token], kind.slots[lane, token]
        bias[lane, place] = kind.members[lane, token].log()
        first = 0
        for page in kind.pages:
            here = (slot >= first) & (slot < first + len(page.keys))
            local, at = slot[here] - first, (lane[here], place[here])
            scale = None if factor is None else factor[lane[here]]
            keys[at] = _decode(page.keys, page.key_grid, local, kind.bits, dim, dtype, scale)
            values[at] = _decode(page.values, page.value_grid, local, kind.bits, dim, dtype, None)
            first += len(page.keys)
    return Gathered(keys, values, bias, total.clamp_max(budget))


def _decode(
    stored: Tensor, grid: Tensor | None, rows: Tensor, bits: int, dim: int, dtype: torch.dtype,
    factor: Tensor | None,
) -> Tensor:  # fmt: skip
    """Some tokens of a page [n, D]; factor [n, D]."""
    numbers = stored[rows]
    if grid is not None and bits != 16:
        numbers = Codes(numbers, grid[rows], bits, dim).decode(torch.float32)
    return (numbers if factor is None else numbers.float() * factor).to(dtype)
