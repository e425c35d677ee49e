"""What has left the live cache, merged by voxel, layer and head; and what of it comes back.

Source: STAC (arXiv 2603.20284), voxel memory. Merging and fetching are kernels (`kernels/voxel_merge.py`,
`kernels/gather.py`); making room under a byte limit is in `making_room.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.cache import key_length
from stac_core.cache.making_room import RoomMaker
from stac_core.cache.moving import VoxelMover
from stac_core.cache.saved_state import State, tally, untally
from stac_core.cache.stale_pivots import merge_guarded
from stac_core.cache.voxel_grid import Frustum, VoxelGrid
from stac_core.cache.voxel_keys import NOWHERE, places, unpack
from stac_core.cache.voxel_rows import Content, VoxelRows
from stac_core.config import CacheConfig
from stac_core.kernels.gather import Gathered, Wanted
from stac_core.kernels.select import Kernels
from stac_core.kernels.voxel_merge import MergeCounts, MergeRules, RowState, RowTokens

ROWS_AT_ONCE = 3 << 17  # bounds the dense working state of one merge, 12 KiB per row before and after
REACH = 2  # retrieval looks this many voxel edges around what is in view


class Evicted(NamedTuple):
    """Tokens that leave the live cache, per lane = (layer, head)."""

    keys: Tensor  # [lanes, n, D]
    values: Tensor  # [lanes, n, D]
    score: Tensor  # [lanes, n]
    voxel: Tensor  # [lanes, n] voxel key, NOWHERE = none


class Retrieved(NamedTuple):
    """Tokens to attend to, the same number of slots in every lane."""

    keys: Tensor  # [lanes, n, D], 0 where padded
    values: Tensor  # [lanes, n, D]
    bias: Tensor  # [lanes, n] float32: log of the number of tokens merged, −inf where padded
    length: Tensor  # [lanes] slots that are not padding
    pivots: Tensor | None = None  # [lanes, ≤ n] where each came from, −1 where it is no pivot


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
        self.rows.begin(self.moment)
        self.room.begin(self.moment, camera_cell, limit)
        self.room.enter(keys)

    def insert(self, evicted: Evicted) -> None:
        """Merge tokens into their voxels; those without a place are not for this memory."""
        voxel = self.room.enter(evicted.voxel)
        lanes, nowhere = self.rows.lanes, self.grid.capacity * self.rows.lanes
        lane = torch.arange(lanes, device=voxel.device)[:, None]
        row = (voxel * lanes + lane).masked_fill_(voxel < 0, nowhere)
        row, order = row.flatten().sort(stable=True)
        rows, index, size = row.unique_consecutive(return_inverse=True, return_counts=True)
        stops = size.cumsum(0)[ROWS_AT_ONCE - 1 :: ROWS_AT_ONCE]
        counts = torch.stack([(evicted.voxel != NOWHERE).sum(), (voxel >= 0).sum()])
        inserted, placed, *cuts = torch.cat([counts, stops]).tolist()
        self.counts.inserted += inserted
        self.counts.forgotten += inserted - placed
        if not placed:
            return
        rows = rows[: len(rows) - (placed < len(row))]
        borders = [0, *(cut for cut in cuts if cut < placed), placed]
        for number, (start, stop) in enumerate(pairwise(borders)):
            first, here = number * ROWS_AT_ONCE, order[start:stop]
            keys, values, score = (part.flatten(0, 1)[here].float() for part in evicted[:3])
            if self._config.norm_keep:
                keys, values = key_length.widen(keys, values)
            tokens = RowTokens(index[start:stop] - first, keys, values, score)
            self._insert_rows(rows[first : first + ROWS_AT_ONCE], tokens)

    def near(self, keys: Tensor) -> Tensor:
        """Voxels around the places in view, spilled ones brought back."""
        keys = places(keys)
        voxels = self.grid.near(keys, REACH)
        self.grid.visit(voxels, self.moment)  # before anything is spilled to make room for others
        if not self.room.host.records:
            return voxels
        self.room.recall(self.room.host.grid.near(keys.to("cpu"), REACH))
        return self.grid.near(keys, REACH)

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
        rows = self.rows.of_voxels(voxels).T  # [lanes, n]
        pivots = self._candidates("pivots", rows)
        if query is not None:
            pivots = _best(pivots, pivots.figures[..., 0], -1)
            order = self._by_query(pivots, query)
        elif seeds is not None:
            order = self._by_distance(pivots, voxels, seeds)
        else:
            order = pivots.figures[..., 0]
        chosen = [_best(pivots, order, budget)]
        if with_buffer:
            buffers = self._candidates("buffers", rows)
            chosen.append(_best(buffers, buffers.figures[..., 0], budget))
        found = chosen[0].slots.masked_fill(chosen[0].figures[..., -1] == 0, -1)
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
        """RuntimeError where a token is unaccounted for, or a slot belongs to two rows."""
        counts, held = self.counts, self.rows.tokens(self.rows.of_voxels(self.grid.voxels).flatten())
        spilled = self.room.host.tokens
        entered = counts.merged + counts.buffered
        if counts.inserted != entered + counts.gated + counts.forgotten:
            raise RuntimeError(f"tokens inserted do not add up: {counts}")
        if held + spilled != entered - self.room.counts.forgotten_tokens:
            raise RuntimeError(f"{held} tokens held and {spilled} spilled, {counts}, {self.room.counts}")
        self.rows.check(self.grid.voxels)

    def _insert_rows(self, rows: Tensor, tokens: RowTokens) -> None:
        before = self.rows.read(rows)
        after, counts = self._merged(before, tokens)
        update = self.rows.update(before, after, self.moment)
        if not self.room.reserve(update.needed):
            self.counts.forgotten += len(tokens.row)
            return
        self.rows.write(update)
        for name, n in counts._asdict().items():
            setattr(self.counts, name, getattr(self.counts, name) + n)

    def _merged(self, before: Content, tokens: RowTokens) -> tuple[RowState, MergeCounts]:
        config, merge, state = self._config, self._kernels.voxel_merge, before.state
        if before.touched is None:
            return merge(state, tokens, self._rules)
        stale = self.moment - before.touched > config.stale_after
        return merge_guarded(merge, state, tokens, self._rules, stale, config.stale_threshold)

    def _candidates(self, kind: str, rows: Tensor) -> Candidates:
        """Everything of one kind in rows [lanes, n]."""
        slots, figures = self.rows.figures(self.rows.kinds[kind], rows.flatten())
        shape = (rows.shape[0], -1)
        return Candidates(kind, slots.view(shape), figures.view(*shape, figures.shape[-1]))

    def _by_query(self, pivots: Candidates, query: Tensor) -> Tensor:
        """Scaled product of the lane's query with each pivot, plus the logarithm of its members.

        pivots: those that are present first.
        """
        found = self._gather([pivots], -1)
        logits = (found.keys.float() @ query.float()[..., None])[..., 0] / self._dim**0.5
        return logits + found.bias

    def _by_distance(self, pivots: Candidates, voxels: Tensor, seeds: Tensor) -> Tensor:
        """Nearest voxel to any seed first, heavier pivots first among equals."""
        centres = (unpack(self.grid.key[voxels]) + 0.5) * 2.0 ** self.grid.level[voxels][:, None]
        distance = torch.cdist(centres.float(), unpack(places(seeds)) + 0.5).amin(-1)
        weight = pivots.figures[..., 0]
        per_voxel = pivots.slots.shape[1] // len(voxels)
        return weight / (1 + weight) - distance.repeat_interleave(per_voxel)

    def _gather(self, chosen: list[Candidates], budget: int) -> Gathered:
        """The candidates of all kinds one after the other, without gaps."""
        kinds = []
        for candidates in chosen:
            members = candidates.figures[..., -1]
            if candidates.kind == "buffers":
                members = (members > 0).float()
            pool = self.rows.kinds[candidates.kind].pool
            kinds.append(Wanted(pool.pages, pool.bits, candidates.slots, members))
        width = budget if budget >= 0 else sum(kind.slots.shape[1] for kind in kinds)
        lanes = torch.arange(self.rows.lanes, device=kinds[0].slots.device)
        return self._kernels.gather(kinds, width, self._dim, self._dtype, self.rows.scale_of(lanes))


class Candidates(NamedTuple):
    """Slots of one kind that could be retrieved."""

    kind: str
    slots: Tensor  # [lanes, n]; −1 = none
    figures: Tensor  # [lanes, n, f]; the last is 0 where nothing is


def _best(candidates: Candidates, order: Tensor, budget: int) -> Candidates:
    """The `budget` highest in each lane, highest first; −1 = all."""
    order = order.masked_fill(candidates.figures[..., -1] == 0, -torch.inf)
    chosen = order.sort(dim=-1, descending=True, stable=True).indices
    chosen = chosen if budget < 0 else chosen[:, :budget]
    figures = candidates.figures.gather(1, chosen[..., None].expand(-1, -1, candidates.figures.shape[-1]))
    return Candidates(candidates.kind, candidates.slots.gather(1, chosen), figures)
