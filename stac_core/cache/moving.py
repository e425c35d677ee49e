"""Where voxels belong after the poses of the frames that saw them have been corrected.

A token's voxel is fixed by the pose believed then. Under drift a place seen again falls into other voxels;
once the poses are known better, each voxel moves along with the frame that saw it last. Keys and values
stay: they know nothing of the world's frame. Ours; the published method does nothing about drift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.fusing import ordinals
from stac_core.cache.making_room import RoomMaker
from stac_core.cache.voxel_grid import VoxelGrid
from stac_core.cache.voxel_keys import FARTHEST, pack, unpack


class VoxelMover:
    """Knows where the content of voxels was seen, and moves them."""

    def __init__(self, grid: VoxelGrid, room: RoomMaker) -> None:
        self._grid, self._room = grid, room

    def see(self, keys: Tensor, points: Tensor, frames: Tensor) -> None:
        """Note where the content of voxels was seen: finest-level keys [n], points [n, 3], frames [n]."""
        voxel = self._grid.find(keys)
        here = voxel >= 0
        voxels, index, count = voxel[here].unique(return_inverse=True, return_counts=True)
        places = points.new_zeros(len(voxels), 3).index_add_(0, index, points[here]) / count[:, None]
        newest = torch.zeros_like(voxels).scatter_reduce_(0, index, frames[here], "amax")
        self._grid.see(voxels, places, newest)

    def move(self, frames: Tensor, new_from_old: Tensor, edge: float, keys: list[Tensor]) -> list[Tensor]:
        """Move every voxel with the frame that last saw it, and fuse those that meet.

        frames [m], new_from_old [m, 4, 4]: see `moved_cells`. keys: finest-level keys of tokens → the same
        after the move. What finds no room, and a spilled voxel whose new cell is taken, is forgotten.
        """
        grid, held = self._grid, [self._grid.find(part) for part in keys]
        voxels = grid.voxels
        cells, level = within_wider(moved_cells(grid, voxels, frames, new_from_old, edge), grid.level[voxels])
        middle = grid.key.index_copy(0, voxels, middles(cells, level))
        self._settle_cells(voxels, cells, level)
        self._move_spilled(frames, new_from_old, edge)
        return [torch.where(at >= 0, middle[at], part) for at, part in zip(held, keys, strict=True)]

    def _settle_cells(self, voxels: Tensor, cells: Tensor, level: Tensor) -> None:
        """Give voxels [n] their new cells; several in one cell become one voxel."""
        places, family, size = torch.stack([level, cells], -1).unique(
            dim=0, return_inverse=True, return_counts=True
        )
        alone = size[family] == 1
        self._grid.rename(voxels[alone], cells[alone])
        crowded = (size > 1).nonzero()[:, 0]
        for some in crowded.split(self._room.families_at_once):
            member = torch.isin(family, some)
            rank = torch.searchsorted(some, family[member])
            if not self._room.fuse(voxels[member], rank, places[some, 1], places[some, 0]):
                self._room.forget(voxels[member])

    def _move_spilled(self, frames: Tensor, new_from_old: Tensor, edge: float) -> None:
        host, counts = self._room.host, self._room.counts
        voxels, level = host.grid.voxels, host.grid.level[host.grid.voxels]
        cells = moved_cells(host.grid, voxels, frames.cpu(), new_from_old.cpu(), edge)
        taken = self._grid.find(middles(cells, level).to(self._grid.key.device)).cpu() >= 0
        _, family = torch.stack([level, cells], -1).unique(dim=0, return_inverse=True)
        lost = taken | (ordinals(family) > 0)
        records = host.take(voxels[lost].tolist())
        counts.forgotten += len(records)
        counts.forgotten_tokens += sum(record.tokens for record in records)
        host.grid.rename(voxels[~lost], cells[~lost])


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
    known = (seen >= 0) & (cell.abs() <= FARTHEST).all(-1)
    return torch.where(known, pack(cell.nan_to_num().clamp(-FARTHEST, FARTHEST).long()), grid.key[voxels])


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
