"""What the compiled backends of `voxel_merge` share: the tokens of each row together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.kernels.voxel_merge import RowState, RowTokens, check_merge


class Grouped(NamedTuple):
    """A merge as the kernels take it: without gaps in memory, tokens by row."""

    state: RowState
    tokens: RowTokens
    order: Tensor  # [N] int64, token numbers by row, in their old order within it
    start: Tensor  # [R + 1] int64, first place of each row in `order`


def group_by_row(state: RowState, tokens: RowTokens) -> Grouped:
    """Check the arguments, close gaps, sort the tokens by row, stably.

    ValueError naming the argument and its value where a shape, dtype or device does not fit.
    """
    check_merge(state, tokens)
    row, order = tokens.row.int().sort(stable=True)  # half the passes of int64, and rows are never so many
    start = torch.searchsorted(row, torch.arange(len(state.weight) + 1, dtype=row.dtype, device=row.device))
    state = RowState(*(part.contiguous() for part in state))
    return Grouped(state, RowTokens(*(part.contiguous() for part in tokens)), order, start)
