"""The content of several voxels as that of one: what coarsening and moving of voxels have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.voxel_rows import VoxelRows
from stac_core.kernels.voxel_merge import MergeRules, RowState, VoxelMerge
from stac_core.kernels.voxel_merge_rows import group_by_row
from stac_core.kernels.voxel_merge_torch import fold_in


def fused_content(
    rows: VoxelRows, voxels: Tensor, family: Tensor, families: int, merge: VoxelMerge, rules: MergeRules
) -> tuple[RowState, RowState, Tensor]:
    """Pivots join by the re-merge rule, buffered tokens by an ordinary insertion.

    voxels [n]; family [n]: which belong together. → one voxel's rows per family, with pivots only, and then
    with all, and what this insertion counted.
    """
    lanes = rows.lanes
    target = (family[:, None] * lanes + torch.arange(lanes, device=family.device)).flatten()
    content = rows.read(rows.of_voxels(voxels).flatten()).state
    state = RowState(*(part.new_zeros(families * lanes, *part.shape[1:]) for part in content))
    state = state._replace(buffer_score=torch.full_like(state.buffer_score, -torch.inf))
    _fold_pivots(state, content, target, ordinals(family).repeat_interleave(lanes))
    row, place = (content.buffer_score > -torch.inf).nonzero().unbind(-1)
    waiting = group_by_row(
        target[row], families * lanes, content.buffer_keys[row, place], content.buffer_values[row, place],
        content.buffer_score[row, place],
    )  # fmt: skip
    return state, *merge(state, waiting, rules)


def _fold_pivots(state: RowState, content: RowState, target: Tensor, turn: Tensor) -> None:
    """Fold the pivots of `content` into the rows `target` [n] of `state`, voxel by voxel.

    turn [n]: whose pivots come first where several voxels meet.
    """
    row, slot = (content.members > 0).nonzero().unbind(-1)
    order = (turn[row] * content.members.shape[1] + slot).sort(stable=True).indices
    row, slot = row[order], slot[order]
    alone = (part[row, slot, None] for part in content[:5])
    pivots = RowState(*alone, *(part[row, :0] for part in content[5:]))
    turn = ordinals(target[row])
    for now in range(int(turn.max()) + 1 if len(turn) else 0):
        here = (turn == now).nonzero()[:, 0]
        fold_in(state, target[row[here]], RowState(*(part[here] for part in pivots)))


def ordinals(family: Tensor) -> Tensor:
    """Place of each member within its family [n]."""
    order = family.sort(stable=True).indices
    _, index, size = family[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(family), device=family.device) - (size.cumsum(0) - size)[index]
    return torch.empty_like(place).scatter_(0, order, place)
