"""What has left the live cache, merged by voxel, layer and head; and what of it comes back.

Source: STAC (arXiv 2603.20284), voxel memory. Merging and fetching are kernels (`kernels/voxel_merge.py`,
`kernels/gather.py`); making room under a byte limit is in `making_room.py`.
"""

from __future__ import annotations

from collections.abc import Callable
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
from stac_core.cache.voxel_keys import NOWHERE, REACH, places, unpack
from stac_core.cache.voxel_rows import Content, VoxelRows
from stac_core.config import CacheConfig
from stac_core.device import total_bytes
from stac_core.kernels.gather import Gathered, Wanted
from stac_core.kernels.select import Kernels
from stac_core.kernels.voxel_merge import MergeRules, RowState, RowTokens

ROWS_AT_ONCE = 3 << 17  # merged together at most
WORKING_SHARE = 16  # the dense working state of one merge takes at most this part of a device's memory
DIFFERENCES = "donot_use_mm_for_euclid_dist"  # how `torch.cdist` is to compute


class Evicted(NamedTuple):
    """Tokens that leave the live cache, per lane = (layer, head)."""

    keys: Tensor  # [lanes, n, D]
    values: Tensor  # [lanes, n, D]
    score: Tensor  # [lanes, n]
    voxel: Tensor  # [lanes, n] voxel key, NOWHERE = none


class Sought(NamedTuple):
    """Voxels around the places in view."""

    near: Tensor  # [capacity] which they are
    number: Later  # how many

    @property
    def voxels(self) -> Tensor:
        """Their numbers, ascending."""
        return torch.nonzero_static(self.near, size=int(self.number))[:, 0]


class Retrieved(NamedTuple):
    """Tokens to attend to, the same number of slots in every lane."""

    keys: Tensor  # [lanes, n, D], 0 where padded
    values: Tensor  # [lanes, n, D]
    bias: Tensor  # [lanes, n] float32: log of the number of tokens merged, −inf where padded
    length: Tensor  # [lanes] slots that are not padding
    pivots: Tensor | None = None  # [lanes, ≤ n] where each came from, −1 where it is no pivot


def nothing() -> None:
    """What there is to do meanwhile."""


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
        self._config, self._kernels, self._dtype, self._dim = config, kernels, dtype, dim
        self._rules = MergeRules(config.merge_threshold, config.gate, config.pivot_inertia)
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

        keys [n]: finest-level voxel keys, NOWHERE allowed. camera_cell [3]: the camera in finest cells.
        limit: bytes the memory may allocate.
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

    def insert(self, evicted: Evicted, meanwhile: Callable[[], None] = nothing) -> None:
        """Merge tokens into their voxels; those without a place are not for this memory.

        meanwhile: looks at the memory as it was before, which the device does while the host waits to hear
        what merging takes.
        """
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
            self._insert_rows(rows[:most], tokens, meanwhile)
            meanwhile = nothing
        meanwhile()

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

    def retrieve(
        self,
        voxels: Tensor,
        budget: int,
        *,
        with_buffer: bool,
        query: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Retrieved:
        """Pivots of the voxels [n], then buffered tokens where asked for, at most `budget` per lane.

        Lanes with fewer are padded up to the budget; −1 = no limit. query [lanes, D] orders pivots by
        similarity, seeds (keys of the places in view) by distance; otherwise by weight.
        """
        rows = self.rows.by_lane(voxels)
        pivots, order = self._candidates("pivots", rows)
        if query is not None:
            pivots = self._best(pivots, order, -1)
            order = self._by_query(pivots, query)
        elif seeds is not None:
            order = self._by_distance(pivots, order, voxels, seeds)
        chosen = [self._best(pivots, order, budget)]
        if with_buffer:
            chosen.append(self._best(*self._candidates("buffers", rows), budget))
        if budget < 0:
            budget = int(torch.cat([kind.members for kind in chosen], 1).count_nonzero(1).amax())
        found = None
        if self._config.feedback:
            found = chosen[0].slots.masked_fill(chosen[0].members == 0, -1)
        return Retrieved(*self._gather(chosen, budget), found)

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
        sizes = torch.stack([(keys != NOWHERE).sum(), (row >= 0).sum(), begins.sum()])
        inserted, placed, borders = sizes.tolist()
        start = torch.nonzero_static(begins, size=borders)[int(placed < len(row)) :, 0]
        return ByRow(row[start[:-1]].long(), start, order, inserted, placed)

    def _insert_rows(self, rows: Tensor, tokens: RowTokens, meanwhile: Callable[[], None]) -> None:
        before = self.rows.read(rows)
        after, counts = self._merged(before, tokens)
        update = self.rows.update(before, after, counts, self.moment)
        meanwhile()
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

    def _candidates(self, kind: str, rows: Tensor) -> tuple[Candidates, Tensor]:
        """Everything of one kind in rows [lanes, n]; and its weight or score, 0 only where nothing is."""
        slots, figures = self.rows.figures(self.rows.kinds[kind], rows.flatten())
        by_lane = (x.reshape(len(rows), -1) for x in (slots, figures[..., -1], figures[..., 0]))
        slots, members, weight = by_lane
        return Candidates(kind, slots, members), weight

    def _best(self, candidates: Candidates, order: Tensor, budget: int) -> Candidates:
        """The `budget` highest in each lane, highest first, −1 = all; where nothing is, order is lowest."""
        chosen = self._kernels.highest(order, order.shape[1] if budget < 0 else budget).places
        first = order.gather(1, chosen).sort(dim=-1, descending=True, stable=True).indices
        chosen = chosen.gather(1, first)
        kind, slots, members = candidates
        return Candidates(kind, slots.gather(1, chosen), members.gather(1, chosen))

    def _by_query(self, pivots: Candidates, query: Tensor) -> Tensor:
        """Scaled product of the lane's query with each pivot, plus the logarithm of its members.

        pivots: those that are present first.
        """
        found = self._gather([pivots], -1)
        logits = (found.keys.float() @ query.float()[..., None])[..., 0] / self._dim**0.5
        return logits + found.bias

    def _by_distance(self, pivots: Candidates, weight: Tensor, voxels: Tensor, seeds: Tensor) -> Tensor:
        """Nearest voxel to any seed first, where weight makes up for less than one finest cell.

        By weight alone where there are no voxels or no seeds.
        """
        seen = unpack(places(seeds)) + 0.5
        if not len(voxels) or not len(seen):
            return weight
        centres = (unpack(self.grid.key[voxels]) + 0.5) * 2.0 ** self.grid.level[voxels][:, None]
        # By differences: sums of squares would lose the nearest ones far from the origin.
        distance = torch.cdist(centres.float(), seen, compute_mode=DIFFERENCES).amin(-1)
        per_voxel = pivots.slots.shape[1] // len(voxels)
        order = weight / (1 + weight) - distance.repeat_interleave(per_voxel)
        return order.masked_fill(pivots.members == 0, -torch.inf)

    def _gather(self, chosen: list[Candidates], budget: int) -> Gathered:
        """The candidates of all kinds one after the other, without gaps."""
        kinds = []
        for candidates in chosen:
            members = candidates.members
            if candidates.kind == "buffers":
                members = members.sign()
            pool = self.rows.kinds[candidates.kind].pool
            kinds.append(Wanted(pool.pages, pool.bits, candidates.slots, members))
        width = budget if budget >= 0 else sum(kind.slots.shape[1] for kind in kinds)
        return self._kernels.gather(kinds, width, self._dim, self._dtype, self.rows.key_scale)


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


class Candidates(NamedTuple):
    """Slots of one kind that could be retrieved."""

    kind: str
    slots: Tensor  # [lanes, n]; negative = none
    members: Tensor  # [lanes, n] tokens merged, or the score of a single one; 0 where nothing is
