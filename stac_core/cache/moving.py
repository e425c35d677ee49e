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
from stac_core.cache.voxel_keys import FARTHEST, middles, pack, within_wider


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
        after the move. What finds no room, and a spilled voxel whose new cell overlaps a taken one, is lost.
        """
        if not self._grid.capacity:  # nothing has been seen yet
            return keys
        grid, held = self._grid, [self._grid.find(part) for part in keys]
        voxels = grid.voxels
        cells = moved_cells(grid, voxels, frames, new_from_old, edge)
        cells, level = within_wider(cells, grid.level[voxels])
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
        _, family = torch.stack([level, cells], -1).unique(dim=0, return_inverse=True)
        overlapping = (within_wider(cells, level)[1] > level) | (ordinals(family) > 0)
        lost = overlapping | self._taken(cells, level)
        records = host.take(voxels[lost].tolist())
        counts.forgotten += len(records)
        counts.forgotten_tokens += sum(record.tokens for record in records)
        host.grid.rename(voxels[~lost], cells[~lost])

    def _taken(self, cells: Tensor, level: Tensor) -> Tensor:
        """Which cells [n] on the host, each of its level, lie within a voxel on the device or around one."""
        grid = self._grid
        taken = grid.find(middles(cells, level).to(grid.key.device)).cpu() >= 0
        for wide in level.unique().tolist():
            taken |= (level == wide) & torch.isin(cells, grid.wider(grid.voxels, wide).cpu())
        return taken


def moved_cells(grid: VoxelGrid, voxels: Tensor, frames: Tensor, new_from_old: Tensor, edge: float) -> Tensor:
    """New keys [n] of voxels [n], each at its own level; the grid notes where their content lies from now on.

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
    grid.see(voxels, place.where(known[:, None], grid.place[voxels]), seen)
    return torch.where(known, pack(cell.nan_to_num().clamp(-FARTHEST, FARTHEST).long()), grid.key[voxels])
