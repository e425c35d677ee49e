"""Keeps a voxel memory under its byte limit: grow while there is room, then spill, coarsen or forget.

Voxels visited in the running pass are never touched. Nothing here changes what a voxel holds, except
coarsening, which trades resolution far from the camera for room, and forgetting, which is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.cache.fusing import fused_content
from stac_core.cache.saved_state import ON_HOST, State, tally, untally
from stac_core.cache.slots import SlotPool
from stac_core.cache.spilled import SpilledVoxels
from stac_core.cache.voxel_grid import VoxelGrid
from stac_core.cache.voxel_keys import NOWHERE, places, unpack, within_wider
from stac_core.cache.voxel_rows import VoxelRows
from stac_core.config import CacheConfig
from stac_core.kernels.voxel_merge import MergeRules, RowState, VoxelMerge

SHARE = 16  # one step makes room by this part of all voxels
GRID_BYTES = 60  # per voxel: key, level, visit, place, frame, and its entry in the sorted index
ROWS_AT_ONCE = 1 << 15  # bounds the dense working state


@dataclass
class RoomCounts:
    """Voxels so far, except where noted."""

    spilled: int = 0
    reloaded: int = 0
    coarsened: int = 0  # voxels that became part of a wider one
    forgotten: int = 0
    forgotten_tokens: int = 0  # tokens in forgotten voxels
    refused: int = 0  # places for which no voxel could be had


class RoomMaker:
    """Decides about space for one `VoxelMemory`."""

    def __init__(self, config: CacheConfig, grid: VoxelGrid, rows: VoxelRows, merge: VoxelMerge) -> None:
        self.counts = RoomCounts()
        self.host = SpilledVoxels(rows)
        self._config, self._grid, self._rows, self._merge = config, grid, rows, merge
        self._rules = MergeRules(config.merge_threshold, 0.0, config.pivot_inertia)
        self._limit: int | None = None
        self._camera_cell: Tensor | None = None
        self._moment = 0
        self._steps = [getattr(self, f"_{name}") for name in config.when_full.split(",")]

    @property
    def families_at_once(self) -> int:
        """Most voxels that may be made by one call of `fuse`."""
        return max(1, ROWS_AT_ONCE // self._rows.lanes)

    def state(self) -> State:
        return {"counts": tally(self.counts), ON_HOST: self.host.state()}

    def restore(self, state: State) -> None:
        untally(self.counts, state["counts"])
        self.host.restore_all(state[ON_HOST])

    def check(self) -> None:
        """RuntimeError where a voxel, spilled or not, lies within another one."""
        grids = (self._grid, self.host.grid)
        keys, level = (
            torch.cat([column.cpu() for column in columns])
            for columns in zip(*((g.key[g.voxels], g.level[g.voxels]) for g in grids), strict=True)
        )
        keys, level = within_wider(keys, level)
        cells = torch.stack([level, keys], -1).unique(dim=0)
        if len(cells) < len(keys):
            raise RuntimeError(f"{len(keys) - len(cells)} of {len(keys)} voxels lie within another one")

    def begin(self, moment: int, camera_cell: Tensor | None, limit: int | None) -> None:
        """A new pass, or a move after it: what the pass visits is safe until the next.

        camera_cell [3] finest cells, None = not known or of no use.
        """
        self._moment, self._camera_cell, self._limit = moment, camera_cell, limit

    def enter(self, keys: Tensor) -> None:
        """Have a voxel for each finest-level key, as far as there is room."""
        new = self._visit(keys)
        if len(new) > self._grid.spare:
            self._voxels_for(len(new))
            new = self._visit(keys)  # what lies around some of them may have become a wider voxel
        if len(new):
            added = new[: self._grid.spare]
            self._grid.add(added, 0, self._moment)
            self.counts.refused += len(new) - len(added)

    def _visit(self, keys: Tensor) -> Tensor:
        """Visit the voxels of finest-level keys, spilled ones brought back; → the places that have none."""
        found = self._grid.find(keys)
        self._grid.visit(found, self._moment)  # before anything is spilled to make room for others
        if self.host.records:
            self.recall(self.host.grid.find(keys.to("cpu")))
            away = self.host.grid.find(keys.to("cpu")).to(keys.device)  # spilled, without room to come back
            found = torch.maximum(self._grid.find(keys), away)
        return places(keys.masked_fill(found >= 0, NOWHERE).flatten())

    def recall(self, numbers: Tensor) -> None:
        """Bring spilled voxels back, by their numbers in the host's grid (−1 = none), while there is room."""
        for number in numbers[numbers >= 0].unique().tolist():
            if not self._voxels_for(1) or not self.reserve(self.host.records[number].blocks):
                return
            voxel = self._grid.copy(self.host.grid, torch.tensor([number]), self._moment)
            self.host.restore(number, voxel)
            self.counts.reloaded += 1

    def reserve(self, blocks: dict[str, int]) -> bool:
        """Have so many free blocks of each kind; False where that is impossible."""
        while short := {
            n: m for n, wanted in blocks.items() if (m := self._rows.kinds[n].pool.missing(wanted))
        }:
            name, missing = next(iter(short.items()))
            if not self._grow_slots(self._rows.kinds[name].pool, missing) and not self._make_room():
                return False
        return True

    def _grow_slots(self, pool: SlotPool, missing: int) -> bool:
        """Allocate, but leave most of a limited room to whoever needs it next."""
        room = self._room()
        most = None if room is None else room // pool.block_bytes
        if most is not None and most < missing:
            return False
        pool.grow(missing, None if most is None else max(missing, most // 4, min(most, pool.blocks // SHARE)))
        return True

    def _voxels_for(self, wanted: int) -> int:
        """Free voxel numbers, at most `wanted`, after growing or making room."""
        while (short := wanted - self._grid.spare) > 0:
            if not self._grow_voxels(short) and not self._make_room():
                break
        return min(wanted, self._grid.spare)

    def _grow_voxels(self, short: int) -> bool:
        voxels = max(short, self._grid.capacity // 4, self._config.voxel_num)
        room = self._room()
        if room is not None:
            voxels = max(short, min(voxels, room // 4 // self._voxel_bytes))
            if voxels * self._voxel_bytes > room:
                return False
        self._grid.grow(voxels)
        self._rows.grow(voxels)
        return True

    @property
    def _voxel_bytes(self) -> int:
        return GRID_BYTES + self._rows.voxel_bytes

    def _room(self) -> int | None:
        """Bytes that may still be allocated, so that the limit also holds when all blocks come back."""
        if self._limit is None:
            return None
        return max(0, self._limit - self._rows.most_bytes - self._grid.most_bytes)

    def _make_room(self) -> bool:
        """One step of the first means that still helps."""
        return any(step() for step in self._steps)

    def _unvisited(self) -> Tensor:
        """Voxels that may go, the longest unvisited first."""
        voxels = self._grid.voxels
        voxels = voxels[self._grid.visited[voxels] < self._moment]
        return voxels[self._grid.visited[voxels].sort(stable=True).indices]

    def _batch(self) -> int:
        return max(1, self._grid.count // SHARE)

    def _forget(self) -> bool:
        voxels = self._unvisited()[: self._batch()]
        self.forget(voxels)
        return len(voxels) > 0

    def forget(self, voxels: Tensor) -> None:
        """Lose the content of voxels [n], and count it."""
        rows = self._rows.of_voxels(voxels).flatten()
        self.counts.forgotten += len(voxels)
        self.counts.forgotten_tokens += self._rows.tokens(rows)
        self._drop(voxels, rows)

    def _spill(self) -> bool:
        room, records = self._config.host_budget - self.host.bytes, []
        voxels = self._unvisited()[: self._batch()] if room > 0 else self._unvisited()[:0]
        for voxel in voxels[:, None]:
            record = self.host.record(voxel)
            room -= record.bytes
            if room < 0:
                break
            records.append(record)
        spilled = voxels[: len(records)]
        self.host.keep(records, self._grid, spilled)
        self._drop(spilled, self._rows.of_voxels(spilled).flatten())
        self.counts.spilled += len(records)
        return len(records) > 0

    def _coarsen(self) -> bool:
        """Fuse voxels into wider ones, those far from the camera first."""
        for level in range(1, self._config.coarsen_levels + 1):
            families = self._families(level)
            if families is not None and self.fuse(*families, level):
                self.counts.coarsened += len(families[0])
                return True
        return False

    def _families(self, level: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Voxels [n] that share wider cells, their family [n] and the keys of the families.

        A wider cell that also holds a voxel that has been visited or spilled stays as it is.
        """
        grid, away = self._grid, self.host.grid
        voxels = grid.finer(self._unvisited(), level)
        wide, visited = grid.wider(voxels, level), grid.voxels
        visited = visited[grid.visited[visited] >= self._moment]
        spilled = away.wider(away.voxels, level).to(wide.device)
        mixed = torch.isin(wide, torch.cat([grid.wider(visited, level), spilled]))
        voxels, wide = voxels[~mixed], wide[~mixed]
        keys, family, size = wide.unique(return_inverse=True, return_counts=True)
        order = (
            self._distance(keys, level).masked_fill(size < 2, -1.0).sort(descending=True, stable=True).indices
        )
        most = min(self._batch(), self.families_at_once)
        chosen = order[:most]
        chosen = chosen[size[chosen] >= 2]
        if not len(chosen):
            return None
        rank = torch.full_like(keys, -1)
        rank[chosen] = torch.arange(len(chosen), device=keys.device)
        family = rank[family]
        return voxels[family >= 0], family[family >= 0], keys[chosen]

    def _distance(self, keys: Tensor, level: int) -> Tensor:
        """From the camera to the cells, in finest cells; the same for all where no camera is known."""
        if self._camera_cell is None or not bool(self._camera_cell.isfinite().all()):
            return torch.ones(len(keys), device=keys.device)
        centre = (unpack(keys).double() + 0.5) * 2**level
        return (centre - self._camera_cell.to(centre)).norm(dim=-1)

    def fuse(self, voxels: Tensor, family: Tensor, keys: Tensor, level: Tensor | int) -> bool:
        """Make one voxel of each family: voxels [n], their family [n]; keys and level of the families.

        False, and nothing has changed, where pivots made from buffered tokens would find no slots.
        """
        state, fused, merge = fused_content(self._rows, voxels, family, len(keys), self._merge, self._rules)
        source = self._rows.of_voxels(voxels).flatten()
        if not self._fits(source, fused):
            return False
        newest = _newest(family, self._grid.frame[voxels], len(keys))
        visited = _newest(family, self._grid.visited[voxels], len(keys))
        places, frames = self._grid.place[voxels[newest]], self._grid.frame[voxels[newest]]
        moments = self._grid.visited[voxels[visited]]
        self._drop(voxels, source)
        wide = self._grid.add(keys, level, moments)
        self._grid.see(wide, places, frames)
        # Every slot is fresh; under `stale_after`, pivots that nobody joins just now are stale from here on.
        fresh = self._rows.fresh(self._rows.of_voxels(wide).flatten(), state)
        self._rows.write(self._rows.update(fresh, fused, merge, self._moment))
        return True

    def _fits(self, source: Tensor, state: RowState) -> bool:
        """Whether `state` fits in what the rows `source` would free, after growing if there is room."""
        for name, kind in self._rows.kinds.items():
            short = kind.pool.missing(self._rows.blocks(name, state) - kind.held(source))
            room = self._room()
            if short and room is not None and short * kind.pool.block_bytes > room:
                return False
            if short:
                kind.pool.grow(short, short)
        return True

    def _drop(self, voxels: Tensor, rows: Tensor) -> None:
        self._rows.clear(rows)
        self._grid.remove(voxels)


def _newest(family: Tensor, moments: Tensor, families: int) -> Tensor:
    """Which member [families] of each family has the highest moment."""
    order = moments.sort(stable=True).indices
    return torch.zeros(families, dtype=torch.int64, device=family.device).scatter_(0, family[order], order)
