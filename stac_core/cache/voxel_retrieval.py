"""What comes back of the voxel memory: which merged tokens, and in which order.

Source: STAC (arXiv 2603.20284), retrieval. Fetching them is a kernel (`kernels/gather.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.cache.voxel_grid import VoxelGrid
from stac_core.cache.voxel_keys import places, unpack
from stac_core.cache.voxel_rows import VoxelRows
from stac_core.config import CacheConfig
from stac_core.kernels.gather import Gathered, Wanted
from stac_core.kernels.select import Kernels

DIFFERENCES = "donot_use_mm_for_euclid_dist"  # how `torch.cdist` is to compute


class Retrieved(NamedTuple):
    """Tokens to attend to, the same number of slots in every lane."""

    keys: Tensor  # [lanes, n, D], 0 where padded
    values: Tensor  # [lanes, n, D]
    bias: Tensor  # [lanes, n] float32: log of the number of tokens merged, −inf where padded
    length: Tensor  # [lanes] slots that are not padding
    pivots: Tensor | None = None  # [lanes, ≤ n] where each came from, −1 where it is no pivot


class Candidates(NamedTuple):
    """Slots of one kind that could be retrieved."""

    kind: str
    slots: Tensor  # [lanes, n]; negative = none
    members: Tensor  # [lanes, n] tokens merged, or the score of a single one; 0 where nothing is


class VoxelRetrieval:
    """Chooses among the content of one `VoxelMemory`, which it leaves as it is."""

    def __init__(
        self, config: CacheConfig, grid: VoxelGrid, rows: VoxelRows, dim: int, dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:  # fmt: skip
        self._config, self._grid, self._rows, self._kernels = config, grid, rows, kernels
        self._dim, self._dtype = dim, dtype

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
        rows = self._rows.by_lane(voxels)
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

    def _candidates(self, kind: str, rows: Tensor) -> tuple[Candidates, Tensor]:
        """Everything of one kind in rows [lanes, n]; and its weight or score, 0 only where nothing is."""
        slots, figures = self._rows.figures(self._rows.kinds[kind], rows.flatten())
        by_lane = (x.reshape(len(rows), -1) for x in (slots, figures[..., -1], figures[..., 0]))
        slots, members, weight = by_lane
        return Candidates(kind, slots, members), weight

    def _best(self, candidates: Candidates, order: Tensor, budget: int) -> Candidates:
        """The `budget` highest in each lane, highest first, −1 = all; where nothing is, order is lowest."""
        if 0 <= budget < order.shape[1]:  # few are sorted sooner than all
            among = self._kernels.highest(order, budget).places
            chosen = among.gather(1, _falling(order.gather(1, among)))
        else:
            chosen = _falling(order)
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
        centres = (unpack(self._grid.key[voxels]) + 0.5) * 2.0 ** self._grid.level[voxels][:, None]
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
            pool = self._rows.kinds[candidates.kind].pool
            kinds.append(Wanted(pool.pages, pool.bits, candidates.slots, members))
        width = budget if budget >= 0 else sum(kind.slots.shape[1] for kind in kinds)
        return self._kernels.gather(kinds, width, self._dim, self._dtype, self._rows.key_scale)


def _falling(order: Tensor) -> Tensor:
    """Places in the rows of order [lanes, n], the highest first; of equal ones the first."""
    return order.sort(dim=-1, descending=True, stable=True).indices
