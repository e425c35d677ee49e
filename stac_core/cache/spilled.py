"""Voxels moved to host memory as they are stored, and back, without decoding them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.cache.saved_state import State
from stac_core.cache.voxel_grid import VoxelGrid
from stac_core.cache.voxel_rows import VoxelRows

HOST = torch.device("cpu")


@dataclass(frozen=True)
class SpilledVoxel:
    """One voxel on the host: per kind of slot, which are occupied [lanes, slots] and what they hold."""

    occupied: dict[str, Tensor]
    fields: dict[str, dict[str, Tensor]]
    blocks: dict[str, int]  # what it needs to come back

    @property
    def tokens(self) -> int:
        """Merged and buffered."""
        members = self.fields["pivots"]["figures"][:, -1]
        return int(members.sum(dtype=torch.float64)) + int(self.occupied["buffers"].sum())

    @property
    def bytes(self) -> int:
        tensors = [*self.occupied.values(), *(f for kind in self.fields.values() for f in kind.values())]
        return sum(t.nbytes for t in tensors)


class SpilledVoxels:
    """All spilled voxels of one memory; found by place like those on the device."""

    def __init__(self, rows: VoxelRows) -> None:
        self.grid = VoxelGrid(HOST)
        self.records: dict[int, SpilledVoxel] = {}  # by number in the grid
        self.bytes = 0  # of all records
        self._rows = rows

    @property
    def tokens(self) -> int:
        """Tokens that the spilled voxels stand for."""
        return sum(record.tokens for record in self.records.values())

    def state(self) -> State:
        records = {
            str(number): {
                "occupied": r.occupied,
                "fields": r.fields,
                "blocks": {name: torch.tensor(n) for name, n in r.blocks.items()},
            }
            for number, r in self.records.items()
        }
        return {"grid": self.grid.state(), "records": records}

    def restore_all(self, state: State) -> None:
        self.grid.restore(state["grid"])
        self.records = {
            int(number): SpilledVoxel(
                r["occupied"],
                r["fields"],
                {name: int(n) for name, n in r["blocks"].items()},
            )
            for number, r in state.get("records", {}).items()
        }
        self.bytes = sum(record.bytes for record in self.records.values())

    def record(self, voxel: Tensor) -> SpilledVoxel:
        """A copy of one voxel [1]; it stays where it is."""
        rows = self._rows.of_voxels(voxel).flatten()
        occupied, fields, blocks = {}, {}, {}
        for name, kind in self._rows.kinds.items():
            slots, figures = self._rows.figures(kind, rows)
            held = figures[..., -1] > 0
            occupied[name] = held.to(HOST)
            fields[name] = {
                k: v.to(HOST) for k, v in kind.pool.read_raw(kind.pool.locate(slots[held])).items()
            }
            blocks[name] = int(kind.used(held).sum())
        return SpilledVoxel(occupied, fields, blocks)

    def keep(self, records: list[SpilledVoxel], grid: VoxelGrid, voxels: Tensor) -> None:
        """Hold the records of voxels [n] of another grid, found by the same places here."""
        if self.grid.spare < len(records):
            self.grid.grow(max(16, len(records), self.grid.capacity // 2))
        numbers = self.grid.copy(grid, voxels, moment=0).tolist()
        self.records |= dict(zip(numbers, records, strict=True))
        self.bytes += sum(record.bytes for record in records)

    def take(self, numbers: list[int]) -> list[SpilledVoxel]:
        """Give up some records."""
        records = [self.records.pop(number) for number in numbers]
        self.bytes -= sum(record.bytes for record in records)
        self.grid.remove(torch.tensor(numbers, dtype=torch.int64))
        return records

    def restore(self, number: int, voxel: Tensor) -> None:
        """Move a record into an empty voxel [1]; its slots must have been reserved."""
        (record,) = self.take([number])
        rows = self._rows.of_voxels(voxel).flatten()
        for name, kind in self._rows.kinds.items():
            held = record.occupied[name].to(rows.device)
            slots = kind.fit(rows, held)
            pool, fields = kind.pool, {k: v.to(rows.device) for k, v in record.fields[name].items()}
            pool.write_figures(pool.locate(slots[(slots >= 0) & ~held]), 0.0)
            pool.write_raw(pool.locate(slots[held]), fields)
