"""The cells of space that hold something, found by key.

A cell at level n is 2ⁿ times as wide as the finest ones; where a wide cell exists, it stands for all finer
ones inside it. Voxel numbers are recycled, keys never change; so whoever must remember a place for longer
than a call remembers the key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.cache.saved_state import State
from stac_core.cache.voxel_keys import NOWHERE, pack, parents, runs_around, unpack

BEYOND = (1 << 63) - 1  # above all keys of cells


class Frustum(NamedTuple):
    """What a camera sees up to some depth."""

    world_from_camera: Tensor  # [4, 4]
    reach: Tensor  # [2] half width and half height at depth 1
    depth: Tensor  # [] the farthest that counts

    def contains(self, points: Tensor) -> Tensor:
        """points [n, 3] in world → bool [n]."""
        pose = self.world_from_camera.to(points)
        x, y, z = ((points - pose[:3, 3]) @ pose[:3, :3]).unbind(-1)
        width, height = (self.reach.to(points) * z[:, None]).unbind(-1)
        return (z > 0) & (z <= self.depth.to(points)) & (x.abs() <= width) & (y.abs() <= height)


class VoxelGrid:
    """Table of voxels; all tensors are indexed by voxel number and replaced, never written into."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.key = torch.empty(0, dtype=torch.int64, device=device)  # NOWHERE where the number is free
        self.level = torch.empty(0, dtype=torch.int64, device=device)
        self.visited = torch.zeros(1, dtype=torch.int64, device=device)  # pass that last touched it; of none
        self.place = torch.empty(0, 3, device=device)  # mean of the points of the pass that last saw it
        self.frame = torch.empty(0, dtype=torch.int64, device=device)  # its newest frame; −1 = not known
        self._held: dict[int, int] = {}  # level → how many voxels it has, known to the host
        self._index: dict[int, Tensor] = {}  # level → sorted keys, and their voxel numbers [2, n]
        self._beyond = torch.tensor([BEYOND], device=device)  # the last of these, so that every search ends

    @property
    def capacity(self) -> int:
        return len(self.key)

    @property
    def count(self) -> int:
        """Voxels in use."""
        return sum(self._held.values())

    @property
    def spare(self) -> int:
        """Numbers that are free."""
        return self.capacity - self.count

    @property
    def voxels(self) -> Tensor:
        """Numbers in use, ascending."""
        return torch.nonzero_static(self.key != NOWHERE, size=self.count)[:, 0]

    @property
    def bytes(self) -> int:
        index = sum(pair.nbytes for pair in self._index.values())
        columns = (self.key, self.level, self.visited, self.place, self.frame, self._beyond)
        return sum(column.nbytes for column in columns) + index

    @property
    def most_bytes(self) -> int:
        """Allocated once all numbers are in use."""
        entries = self.spare if self._index else self.spare + 1
        return self.bytes + 2 * self.key.itemsize * entries

    def grow(self, voxels: int) -> None:
        """Make room for more voxels; existing numbers stay."""
        self.key = torch.cat([self.key, self.key.new_full((voxels,), NOWHERE)])
        self.level = torch.cat([self.level, self.level.new_zeros(voxels)])
        self.visited = torch.cat([self.visited[:-1], self.visited.new_zeros(voxels + 1)])
        self.place = torch.cat([self.place, self.place.new_zeros(voxels, 3)])
        self.frame = torch.cat([self.frame, self.frame.new_full((voxels,), -1)])

    def add(self, keys: Tensor, level: Tensor | int, moment: Tensor | int) -> Tensor:
        """Enter new keys [n], for which there must be room; → their numbers."""
        voxels = torch.nonzero_static(self.key == NOWHERE, size=len(keys))[:, 0]
        self.key = _changed(self.key, voxels, keys)
        self.visited = _changed(self.visited, voxels, moment)
        if isinstance(level, Tensor) or level:
            self.level = _changed(self.level, voxels, level)
        self._count(self.level[voxels] if isinstance(level, Tensor) else level, voxels, 1)
        self._rebuild()
        return voxels

    def copy(self, other: VoxelGrid, voxels: Tensor, moment: int) -> Tensor:
        """Enter voxels [n] of another grid, for which there must be room; → their numbers here."""
        columns = (
            column[voxels.to(column.device)] for column in (other.key, other.level, other.place, other.frame)
        )
        key, level, place, frame = (column.to(self._device) for column in columns)
        numbers = self.add(key, level, moment)
        self.see(numbers, place, frame)
        return numbers

    def see(self, voxels: Tensor, places: Tensor, frames: Tensor) -> None:
        """Note where the content of voxels [n] was last seen [n, 3], and in which frame [n]."""
        self.place = _changed(self.place, voxels, places)
        self.frame = _changed(self.frame, voxels, frames)

    def rename(self, voxels: Tensor, keys: Tensor) -> None:
        """Give voxels [n] other cells of their levels."""
        self.key = _changed(self.key, voxels, keys)
        self._rebuild()

    def visit(self, voxels: Tensor, moment: int) -> None:
        """Note the newest pass that touched them; −1 = none."""
        self.visited = self.visited.index_fill(0, voxels.flatten(), moment)

    def visit_where(self, touched: Tensor, moment: int) -> None:
        """The same for all voxels that are touched [capacity + 1]; the last is none."""
        self.visited = self.visited.masked_fill(touched, moment)

    def remove(self, voxels: Tensor) -> None:
        self._count(self.level[voxels], voxels, -1)
        self.key = _changed(self.key, voxels, NOWHERE)
        self.level, self.frame = _changed(self.level, voxels, 0), _changed(self.frame, voxels, -1)
        self._rebuild()

    def find(self, keys: Tensor) -> Tensor:
        """Finest-level keys → numbers of the voxels that hold those places, alike in shape; −1 = none."""
        found = None
        for level in sorted(self._index, reverse=True):
            hit = self.find_at(parents(keys, level) if level else keys, level)
            hit = hit.masked_fill(keys == NOWHERE, -1) if level else hit
            found = hit if found is None else torch.where(found < 0, hit, found)
        return torch.full_like(keys, -1) if found is None else found

    def find_at(self, keys: Tensor, level: int) -> Tensor:
        """Keys of one level [n] → numbers [n]; −1 = none."""
        if level not in self._index:
            return torch.full_like(keys, -1)
        index = self._index[level]
        known, numbers = index[:, torch.searchsorted(index[0], keys.contiguous())]
        return numbers.masked_fill_(known != keys, -1)

    def finer(self, voxels: Tensor, level: int) -> Tensor:
        """Those of the voxels [n] whose cells are finer than the cells of a level."""
        return voxels[self.level[voxels] < level]

    def wider(self, voxels: Tensor, level: int) -> Tensor:
        """Keys of the cells of a level that hold the finer ones among the voxels [n]."""
        finer = self.finer(voxels, level)
        return parents(self.key[finer], level - self.level[finer][:, None])

    def near(self, keys: Tensor, radius: int) -> Tensor:
        """Which voxels lie within ±radius finest cells of the given finest-level keys.

        → [capacity + 1]; the last stands for no voxel, and what it says means nothing.
        """
        near = torch.zeros(self.capacity + 1, dtype=torch.bool, device=self._device)  # the last: of none
        for level, (known, numbers) in self._index.items():
            reach = max(1, -(-radius >> level)) if level else radius
            own = parents(keys, level).masked_fill_(keys == NOWHERE, NOWHERE) if level else keys
            first, behind = torch.searchsorted(known, runs_around(own, reach)).flatten(1)
            begun = torch.zeros_like(known).scatter_(0, first, 1, reduce="add")
            begun.scatter_(0, behind, -1, reduce="add")
            near.index_copy_(0, numbers, begun.cumsum(0) > 0)
        return near

    def inside(self, frustum: Frustum, edge: float) -> Tensor:
        """Finest-level keys of the middles of all voxels inside; edge: of the finest cells."""
        voxels = self.voxels
        wide = 2 ** self.level[voxels][:, None]
        cells = unpack(self.key[voxels]) * wide + wide // 2
        centres = unpack(self.key[voxels]) * (wide * edge) + wide * edge / 2
        return pack(cells[frustum.contains(centres.float())])

    def state(self) -> State:
        seen = {"place": self.place, "frame": self.frame}
        return {"key": self.key, "level": self.level, "visited": self.visited[:-1], **seen}

    def restore(self, state: State) -> None:
        self.key, self.place, free = state["key"], state["place"], state["key"] == NOWHERE
        self.level, self.frame = state["level"].masked_fill(free, 0), state["frame"].masked_fill(free, -1)
        self.visited = torch.nn.functional.pad(state["visited"], (0, 1))
        self._held = {}
        used = (~free).nonzero()[:, 0]
        self._count(self.level[used], used, 1)
        self._rebuild()

    def _count(self, level: Tensor | int, voxels: Tensor, sign: int) -> None:
        """Account for voxels that come (1) or go (−1)."""
        levels = (
            {level: len(voxels)}
            if isinstance(level, int)
            else dict(enumerate(torch.bincount(level).tolist()))
        )
        for number, voxels_there in levels.items():
            self._held[number] = self._held.get(number, 0) + sign * voxels_there

    def _rebuild(self) -> None:
        self._index = {}
        levels = [level for level, count in self._held.items() if count]
        for level in levels:
            keys = self.key if len(levels) == 1 else self.key.masked_fill(self.level != level, NOWHERE)
            sorted_keys, numbers = torch.cat([keys, self._beyond]).sort()
            first = self.capacity - self._held[level]  # NOWHERE comes before
            self._index[level] = torch.stack([sorted_keys[first:], numbers[first:]])


def _changed(column: Tensor, voxels: Tensor, values: Tensor | int) -> Tensor:
    """A copy with some entries replaced; whoever holds the old column still has the old state."""
    if not isinstance(values, Tensor):
        return column.index_fill(0, voxels, values)
    column = column.clone()
    column[voxels] = values
    return column
