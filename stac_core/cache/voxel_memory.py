"""What has left the live cache, merged by voxel, layer and head.

Source: STAC (arXiv 2603.20284), voxel memory. Merging is a kernel (`kernels/voxel_merge.py`); making room
under a byte limit is in `making_room.py`, what comes back in `voxel_retrieval.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.cache import key_length
from stac_core.cache.later import Later
from stac_core.cache.making_room import RoomMaker
from stac_core.cache.moving import VoxelMover
from stac_core.cache.saved_state import State, tally, untally
from stac_core.cache.stale_pivots import merge_guarded
from stac_core.cache.voxel_grid import Frustum, VoxelGrid
from stac_core.cache.voxel_keys import NOWHERE, REACH, places
from stac_core.cache.voxel_retrieval import VoxelRetrieval
from stac_core.cache.voxel_rows import Content, VoxelRows
from stac_core.config import CacheConfig
from stac_core.device import total_bytes
from stac_core.kernels.select import Kernels
from stac_core.kernels.voxel_merge import MergeRules, RowState, RowTokens

ROWS_AT_ONCE = 3 << 17  # merged together at most
WORKING_SHARE = 16  # the dense working state of one merge takes at most this part of a device's memory


class Evicted(NamedTuple):
    """Tokens that leave the live cache, per lane = (layer, head)."""

    keys: Tensor  # [lanes, n, D]
    values: Tensor  # [lanes, n, D]
    score: Tensor  # [lanes, n]
    voxel: Tensor  # [lanes, n] voxel key, NOWHERE = none

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(part.nbytes for part in self)


class Sought(NamedTuple):
    """Voxels around the places in view."""

    near: Tensor  # [capacity] which they are
    number: Later  # how many

    @property
    def voxels(self) -> Tensor:
        """Their numbers, ascending."""
        return torch.nonzero_static(self.near, size=int(self.number))[:, 0]


@dataclass
class VoxelCounts:
    """Tokens so far, over all lanes: inserted = merged + buffered + gated + forgotten."""

    inserted: int = 0
    merged: int = 0  # joined a pivot
    buffered: int = 0  # entered a buffer
    gated: int = 0
    forgotten: int = 0  # lost on entry for want of room
    aggregated: int = 0  # buffers turned into a pivot
    remerged: int = 0  # pivots folded into a neighbour


class VoxelMemory:
    """All rows of one stream. Lanes are layers × heads, layer by layer."""

    def __init__(
        self,
        config: CacheConfig,
        lanes: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        key_scale: Tensor | None = None,
    ) -> None:
        """key_scale [lanes, D]: factor per channel taken out of keys before they are coded."""
        self.counts = VoxelCounts()
        self.grid = VoxelGrid(device)
        self.rows = VoxelRows(config, lanes, dim, dtype, device, kernels.slots, key_scale)
        self.room = RoomMaker(config, self.grid, self.rows, kernels.voxel_merge)
        self.mover = VoxelMover(self.grid, self.room)
        self._config, self._kernels = config, kernels
        self._rules = MergeRules(config.merge_threshold, config.gate, config.pivot_inertia)
        self.retrieval = VoxelRetrieval(config, self.grid, self.rows, dim, dtype, kernels)
        self._rows_at_once = rows_at_once(config.voxel_piv_cap + config.voxel_buf_cap, dim, device)
        self.moment = 0  # passes so far

    @property
    def bytes(self) -> int:
        """Allocated on the device."""
        return self.grid.bytes + self.rows.bytes

    @property
    def pivots(self) -> int:
        """Slots that hold or are set aside for merged tokens."""
        return self.rows.kinds["pivots"].pool.slots_used

    @property
    def buffered(self) -> int:
        return self.rows.kinds["buffers"].pool.slots_used

    def begin(self, keys: Tensor, camera_cell: Tensor | None = None, limit: int | None = None) -> None:
        """Begin a pass: every place seen gets a voxel.

        keys [n]: finest-level voxel keys, NOWHERE allowed. camera_cell [3]: the camera in finest cells, of
        use only under a limit: bytes the memory may allocate.
        """
        self.moment += 1
        self._prepare(camera_cell, limit)
        self.room.enter(keys)

    def move(
        self, frames: Tensor, new_from_old: Tensor, edge: float, keys: list[Tensor], limit: int | None
    ) -> list[Tensor]:
        """Between two passes: see `VoxelMover.move`; limit: as in `begin`."""
        self._prepare(None, limit)
        return self.mover.move(frames, new_from_old, edge, keys)

    def insert(self, evicted: Evicted) -> None:
        """Merge tokens into their voxels; those without a place are not for this memory."""
        by_row = self._by_row(evicted.voxel)
        if by_row.placed < by_row.inserted:  # some voxels have made room for others since
            self.room.enter(evicted.voxel)
            by_row = self._by_row(evicted.voxel)
        self.counts.inserted += by_row.inserted
        self.counts.forgotten += by_row.inserted - by_row.placed
        keys, values, score = (part.flatten(0, 1) for part in evicted[:3])
        if self._config.norm_keep:
            keys, values = key_length.widen(keys.float(), values.float())
        most = self._rows_at_once
        for first in range(0, len(by_row.rows), most):
            rows, start = by_row.rows[first:], by_row.start[first : first + most + 1]
            tokens = RowTokens(start, by_row.order, keys, values, score)
            self._insert_rows(rows[:most], tokens)

    def seek(self, keys: Tensor) -> Sought:
        """Voxels around the places in view, spilled ones brought back."""
        near = self.grid.near(keys, REACH)
        self.grid.visit_where(near, self.moment)  # before anything is spilled to make room for others
        host = self.room.host
        if host.records:
            self.room.recall(host.grid.near(places(keys.to("cpu")), REACH)[:-1].nonzero()[:, 0])
            near = self.grid.near(keys, REACH)
        return Sought(near[:-1], Later(near[:-1].sum()))

    def inside(self, frustum: Frustum, edge: float) -> Tensor:
        """Places of voxels that a camera sees, spilled ones too, as finest-level keys."""
        found = self.grid.inside(frustum, edge)
        if not self.room.host.records:
            return found
        return torch.cat([found, self.room.host.grid.inside(frustum, edge).to(found.device)])

    def add_weight(self, slots: Tensor, weight: Tensor) -> None:
        """Make pivots heavier; slots, −1 = none, and weight alike in shape."""
        pool, here = self.rows.kinds["pivots"].pool, slots >= 0
        places = pool.locate(slots[here])
        figures = pool.read_figures(places)
        figures[:, 0] += weight[here]
        pool.write_figures(places, figures)

    def histogram(self) -> dict[int, int]:
        """How many pivots stand for how many tokens, in powers of two: {lower bound: pivots}."""
        rows = self.rows.of_voxels(self.grid.voxels).flatten()
        _, figures = self.rows.figures(self.rows.kinds["pivots"], rows)
        members = figures[..., -1]
        power = members[members > 0].log2().floor().long()
        return {2**i: n for i, n in enumerate(torch.bincount(power).tolist()) if n}

    def state(self) -> State:
        numbers = {"moment": torch.tensor(self.moment), "counts": tally(self.counts)}
        return {**numbers, "grid": self.grid.state(), "rows": self.rows.state(), "room": self.room.state()}

    def restore(self, state: State) -> None:
        self.moment = int(state["moment"])
        untally(self.counts, state["counts"])
        self.grid.restore(state["grid"])
        self.rows.restore(state["rows"])
        self.room.restore(state["room"])

    def check(self) -> None:
        """RuntimeError where a token is unaccounted for, a slot belongs to two rows, or voxels overlap."""
        counts, held = self.counts, self.rows.tokens(self.rows.of_voxels(self.grid.voxels).flatten())
        spilled = self.room.host.tokens
        entered = counts.merged + counts.buffered
        if counts.inserted != entered + counts.gated + counts.forgotten:
            raise RuntimeError(f"tokens inserted do not add up: {counts}")
        if held + spilled != entered - self.room.counts.forgotten_tokens:
            raise RuntimeError(f"{held} tokens held and {spilled} spilled, {counts}, {self.room.counts}")
        self.rows.check(self.grid.voxels)
        self.room.check()

    def _prepare(self, camera_cell: Tensor | None, limit: int | None) -> None:
        """What rows and room know of a pass; set by whoever changes them, so that none of it is saved."""
        self.rows.begin(self.moment)
        self.room.begin(self.moment, camera_cell, limit)

    def _by_row(self, keys: Tensor) -> ByRow:
        """Tokens with finest-level voxel keys [lanes, n] by the rows of the voxels that there are."""
        voxel = self.grid.find(keys)
        self.grid.visit(voxel, self.moment)  # before anything makes room for others
        row = self.rows.by_lane(voxel).clamp_min_(-1)  # −1 = none
        row, order = row.int().flatten().sort(stable=True)  # half the passes, and rows are never so many
        begins = torch.ones(len(row) + 1, dtype=torch.bool, device=keys.device)
        torch.ne(row[1:], row[:-1], out=begins[1:-1])
        counted = torch.stack([keys.flatten() != NOWHERE, row >= 0, begins[1:]])
        inserted, placed, ends = counted.sum(1).tolist()
        start = torch.nonzero_static(begins, size=1 + ends)[int(placed < len(row)) :, 0]
        return ByRow(row[start[:-1]].long(), start, order, inserted, placed)

    def _insert_rows(self, rows: Tensor, tokens: RowTokens) -> None:
        before = self.rows.read(rows)
        after, counts = self._merged(before, tokens)
        update = self.rows.update(before, after, counts, self.moment)
        if not self.room.reserve(update.needed):
            self.counts.forgotten += update.merge.tokens
            return
        self.rows.write(update)
        for name, n in update.merge._asdict().items():
            setattr(self.counts, name, getattr(self.counts, name) + n)

    def _merged(self, before: Content, tokens: RowTokens) -> tuple[RowState, Tensor]:
        config, merge, state = self._config, self._kernels.voxel_merge, before.state
        if before.touched is None:
            return merge(state, tokens, self._rules)
        stale = self.moment - before.touched > config.stale_after
        return merge_guarded(merge, state, tokens, self._rules, stale, config.stale_threshold)


def rows_at_once(slots: int, dim: int, device: torch.device) -> int:
    """How many rows of so many slots may be merged together, by the memory of the device."""
    total = total_bytes(device)
    if total is None:
        return ROWS_AT_ONCE
    before_and_after = 2 * slots * 2 * dim * torch.float32.itemsize  # keys and values
    return max(1, min(ROWS_AT_ONCE, total // WORKING_SHARE // before_and_after))


class ByRow(NamedTuple):
    """Tokens by the rows that take them: `order[start[r]]` and on go to `rows[r]`."""

    rows: Tensor  # [R]
    start: Tensor  # [R + 1]
    order: Tensor  # [all tokens]
    inserted: int  # tokens that have a place
    placed: int  # tokens that have a row
