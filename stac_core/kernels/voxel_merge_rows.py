"""Tokens by row, as the contract of `voxel_merge` wants them, from rows by token, and back; their cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.kernels.voxel_merge import RowState, RowTokens


def group_by_row(row: Tensor, rows: int, keys: Tensor, values: Tensor, score: Tensor) -> RowTokens:
    """Tokens [N, …] of which `row` [N] says to which of so many rows each belongs."""
    row, order = row.sort(stable=True)
    return RowTokens(_starts(row, rows), order, keys, values, score)


def rows_of(tokens: RowTokens) -> Tensor:
    """The row of each token [N], by `order`; all of `order` must be in use."""
    rows = torch.arange(len(tokens.start) - 1, device=tokens.start.device)
    return rows.repeat_interleave(tokens.start.diff(), output_size=len(tokens.order))


def only(tokens: RowTokens, which: Tensor) -> RowTokens:
    """Those of the tokens where `which` [N], by `order`, is true."""
    start = _starts(rows_of(tokens)[which], len(tokens.start) - 1)
    return tokens._replace(start=start, order=tokens.order[which])


def in_use(tokens: RowTokens) -> RowTokens:
    """The same with an `order` in which every place belongs to a row."""
    first, last = torch.stack([tokens.start[0], tokens.start[-1]]).tolist()
    return tokens._replace(start=tokens.start - first, order=tokens.order[first:last])


def cosines(state: RowState, row: Tensor, keys: Tensor) -> Tensor:
    """Of token keys [N, D] with the pivots of the row [N] of each, [N, G]; −∞ where there is no pivot."""
    unit = F.normalize(state.pivot_keys, dim=-1)[row]
    cosine = (unit @ F.normalize(keys, dim=-1)[..., None])[..., 0]
    return cosine.masked_fill(state.members[row] == 0, -torch.inf)


def _starts(row: Tensor, rows: int) -> Tensor:
    """Where each row begins among ascending ones [N], and the end [rows + 1]."""
    return torch.searchsorted(row, torch.arange(rows + 1, dtype=row.dtype, device=row.device))
