"""Fetching retrieved tokens by the kernel of `cuda_ext/`: one warp per place, one launch per kind.

A launch knows `PAGES_AT_ONCE` pages at most; a store of more takes further launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stac_core.kernels.cuda_library import check_on_cuda
from stac_core.kernels.gather import Gathered, Wanted, check_begin, check_gather, shares

PAGES_AT_ONCE = 32  # MOST_PAGES of cuda_ext/gather.h
MOST_LANES = 65535  # of a grid of blocks


def gather(
    kinds: Sequence[Wanted], budget: int, dim: int, dtype: torch.dtype, factor: Tensor | None = None
) -> Gathered:
    """The contract of `gather.py`."""
    check_gather(kinds, budget, dim, dtype, factor)
    lanes, device = kinds[0].slots.shape[0], kinds[0].slots.device
    if lanes > MOST_LANES:
        raise ValueError(f"kinds[0].slots: {lanes} lanes, at most {MOST_LANES}; gather in several calls")
    check_on_cuda("kinds[0].slots", kinds[0].slots)
    for i, kind in enumerate(kinds):
        for j, page in enumerate(kind.pages if kind.bits == 16 else ()):  # read two numbers at a time
            check_begin(f"kinds[{i}].pages[{j}].keys", page.keys)
            check_begin(f"kinds[{i}].pages[{j}].values", page.values)
    keys, values = (torch.empty(lanes, budget, dim, dtype=dtype, device=device) for _ in range(2))
    bias = torch.empty(lanes, budget, device=device)
    found, total = shares(kinds)
    factor = None if factor is None else factor.contiguous()
    for i, (kind, share) in enumerate(zip(kinds, found, strict=True)):
        first, slots, members = 0, kind.slots.contiguous(), kind.members.contiguous()
        for start in range(0, max(1, len(kind.pages)), PAGES_AT_ONCE):
            pages = kind.pages[start : start + PAGES_AT_ONCE]
            torch.ops.stac.gather(
                keys, values, bias, [p.keys for p in pages], [p.key_grid for p in pages],
                [p.values for p in pages], [p.value_grid for p in pages], first, kind.bits,
                slots, members, *share, total, factor, i == 0 and start == 0,
            )  # fmt: skip
            first += sum(len(p.keys) for p in pages)
    return Gathered(keys, values, bias, total.clamp_max(budget))
