"""Where voxels belong after the poses of the frames that saw them have been corrected.

A token's voxel is fixed by the pose believed then. Under drift a place seen again falls into other voxels;
once the poses are known better, each voxel moves along with the frame that saw it last. Keys and values
stay: they know nothing of the world's frame. Ours; the published method does nothing about drift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.voxel_grid import VoxelGrid
from stac_core.cache.voxel_keys import HALF, pack, unpack


def moved_cells(grid: VoxelGrid, voxels: Tensor, frames: Tensor, new_from_old: Tensor, edge: float) -> Tensor:
    """New keys [n] of voxels [n], each at its own level.

    frames [m], ascending, and their corrections [m, 4, 4]: a voxel takes that of the last frame not after
    the one that saw it. One whose place is not known, or would lie out of range, stays.
    """
    seen = grid.frame[voxels]
    at = (torch.searchsorted(frames.to(seen.device), seen, right=True) - 1).clamp_min(0)
    correction = new_from_old.to(grid.place)[at]
    place = (correction[:, :3, :3] @ grid.place[voxels, :, None])[..., 0] + correction[:, :3, 3]
    level = grid.level[voxels]
    cell = (place / (edge * 2.0 ** level[:, None])).floor()
    known = (seen >= 0) & (cell.abs() < HALF).all(-1)
    return torch.where(known, pack(cell.nan_to_num().clamp(-HALF, HALF - 1).long()), grid.key[voxels])


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
