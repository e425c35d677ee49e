"""What the compiled backends of `voxel_merge` share: argument checks, and the tokens of each row together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.kernels.voxel_merge import RowState, RowTokens


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
    _check(state, tokens)
    row, order = tokens.row.sort(stable=True)
    start = torch.searchsorted(row, torch.arange(len(state.weight) + 1, device=row.device))
    state = RowState(*(part.contiguous() for part in state))
    return Grouped(state, RowTokens(*(part.contiguous() for part in tokens)), order, start)


def _check(state: RowState, tokens: RowTokens) -> None:
    rows, pivots, dim = state.pivot_keys.shape
    buffer, count = state.buffer_score.shape[-1], len(tokens.row)
    expected = [[rows, pivots, dim]] * 2 + [[rows, pivots]] * 3 + [[rows, buffer, dim]] * 2 + [[rows, buffer]]
    for name, part, shape in zip(state._fields, state, expected, strict=True):
        _check_one(f"state.{name}", part, shape, torch.float32, tokens.row.device)
    expected = [[count], [count, dim], [count, dim], [count]]
    for name, part, shape in zip(tokens._fields, tokens, expected, strict=True):
        dtype = torch.int64 if name == "row" else torch.float32
        _check_one(f"tokens.{name}", part, shape, dtype, tokens.row.device)
    if pivots < 2 or buffer < 2:
        raise ValueError(
            f"state: a row needs at least 2 pivots and 2 buffered tokens, got {pivots} and {buffer}"
        )


def _check_one(name: str, x: Tensor, shape: list[int], dtype: torch.dtype, device: torch.device) -> None:
    if list(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: is on {x.device}, tokens.row on {device}; move them to one device")
