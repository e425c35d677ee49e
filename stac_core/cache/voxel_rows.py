"""Which slots belong to which row: the content of voxels, whatever the storage.

A row is voxel · lanes + lane, a lane one (layer, head). Rows are read as the dense state that the merge
kernel works on and written back as the slots that changed.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.cache import key_length
from stac_core.cache.later import Later
from stac_core.cache.pages import Pages
from stac_core.cache.saved_state import State
from stac_core.cache.slots import SlotPool, block_size
from stac_core.config import CacheConfig
from stac_core.kernels.quantization import Codec
from stac_core.kernels.slots import Factor, RowSlots, SlotKernels
from stac_core.kernels.voxel_merge import MergeCounts, RowState

TELLING = 16  # channels by which keys are told apart
NO_BLOCK = -(1 << 24)  # so far below 0 that no slot of such a block reaches it


class Kind:
    """One kind of slots, buffered tokens or pivots, and the table from rows to them."""

    def __init__(self, slots_per_row: int, figures: int, codec: Codec, allocator: str, first: int,
                 device: torch.device, kernels: SlotKernels) -> None:  # fmt: skip
        self.block = block_size(allocator, slots_per_row)
        self.blocks_per_row = -(-slots_per_row // self.block)
        self.pool = SlotPool(codec, figures, self.block, first, device, kernels)
        self.slots_per_row = slots_per_row
        self._offsets = torch.arange(self.block, device=device)
        # First slot of each block; NO_BLOCK = the row has no such block yet.
        self.table = Pages({"first": (self.blocks_per_row, torch.int32)}, device, NO_BLOCK, in_one=True)

    def blocks(self, rows: Tensor) -> Tensor:
        """The table's entries [n, blocks_per_row] of rows [n]."""
        return self.table.read("first", self.table.locate(rows))

    def held(self, rows: Tensor) -> int:
        """Blocks that the rows [n] have."""
        return int((self.blocks(rows) >= 0).sum())

    def slots(self, blocks: Tensor) -> Tensor:
        """Entries of the table → slots [n, slots_per_row]; negative = none."""
        return (blocks[..., None] + self._offsets).flatten(1)[:, : self.slots_per_row]

    def used(self, occupied: Tensor) -> Tensor:
        """Which blocks [n, blocks_per_row] hold one of the slots that are occupied [n, slots_per_row]."""
        if self.block == 1:
            return occupied
        missing = self.blocks_per_row * self.block - self.slots_per_row
        padded = F.pad(occupied, (0, missing)) if missing else occupied
        return padded.unflatten(-1, (self.blocks_per_row, self.block)).any(-1)

    def within(self, used: Tensor) -> Tensor:
        """The slots [n, slots_per_row] of used blocks [n, blocks_per_row]."""
        return used[..., None].expand(-1, -1, self.block).flatten(1)[:, : self.slots_per_row]

    def fit(self, rows: Tensor, occupied: Tensor) -> Tensor:
        """Give the rows [n] the blocks that `occupied` needs, take back the others; → their slots."""
        blocks = self.blocks(rows)
        won, lost = _exchanged(blocks, self.used(occupied))
        return self.exchange(rows, blocks, won, lost, *torch.stack([won.sum(), lost.sum()]).tolist())

    def exchange(
        self, rows: Tensor, blocks: Tensor, won: Tensor, lost: Tensor, taken: int, given_back: int
    ) -> Tensor:
        """Change so many blocks of the rows [n] → their slots."""
        if not (taken or given_back):
            return self.slots(blocks)
        if given_back:
            gone = torch.nonzero_static(lost.flatten(), size=given_back)[:, 0]
            self.pool.give_back(blocks.flatten()[gone])
        entries = blocks.masked_fill(lost, NO_BLOCK)
        if taken:
            entries.masked_scatter_(won, self.pool.take(taken))
        self.table.write("first", self.table.locate(rows), entries, blocks)
        return self.slots(entries)


class Content(NamedTuple):
    """What rows hold, and where."""

    rows: Tensor  # [n]
    state: RowState  # of n rows, in float32
    blocks: dict[str, Tensor]  # by kind: entries of the table [n, blocks_per_row]
    slots: dict[str, Tensor]  # by kind [n, slots_per_row], negative = none
    factor: Factor | None  # that keys are divided by where they are coded
    touched: Tensor | None  # [n, pivots] when each pivot was last changed, in passes, where that is noted


class Change(NamedTuple):
    """What new content of rows takes in one kind."""

    won: Tensor  # [n, blocks_per_row] blocks that are taken
    lost: Tensor  # [n, blocks_per_row] blocks that are given back
    written: Tensor  # [n, slots_per_row] slots whose figures are
    coded: Tensor  # [n, slots_per_row] of these, those whose key and value are, too


class Update(NamedTuple):
    """New content of rows, and what it takes to store it."""

    before: Content
    after: RowState
    touched: Tensor | None  # as in `Content`
    changes: dict[str, Change]
    totals: Later  # of each change the columns of its parts but the last, added up; then `MergeCounts`

    @property
    def counts(self) -> dict[str, list[int]]:
        """How many there are of each part of a change but the last."""
        found = iter(self.totals.list)
        return {
            name: [sum(islice(found, mask.shape[1])) for mask in change[:3]]
            for name, change in self.changes.items()
        }

    @property
    def merge(self) -> MergeCounts:
        """What led to it."""
        return MergeCounts(*self.totals.list[-len(MergeCounts._fields) :])

    @property
    def needed(self) -> dict[str, int]:
        """Blocks of each kind that are taken from the pool beyond those given back before."""
        return {name: max(0, taken - given_back) for name, (taken, given_back, *_) in self.counts.items()}


class VoxelRows:
    """Buffered tokens and pivots of all rows.

    With `norm_keep` the dense state has one more channel than what is stored, see `key_length`.
    """

    def __init__(
        self, config: CacheConfig, lanes: int, dim: int, dtype: torch.dtype, device: torch.device,
        kernels: SlotKernels, key_scale: Tensor | None,
    ) -> None:  # fmt: skip
        """key_scale [lanes, D]: divides keys before they are coded; None = no coding."""
        self.lanes, self.key_scale = lanes, key_scale
        self._numbers = torch.arange(lanes, device=device)  # of the lanes
        self._shrink, self._touched = config.norm_keep, config.stale_after > 0
        self._chance: dict[str, torch.Generator] = {}  # kinds that are rounded by chance
        if config.pivot_rounding == "stochastic":
            self._chance["pivots"] = torch.Generator(device)
        first, numbers = config.voxel_num * lanes, 3 + self._shrink + self._touched
        pivots, buffers = Codec(config.pivot_bits, dim, dtype), Codec(config.buffer_bits, dim, dtype)
        # Kinds compared with what was there, as storing the same again would change it, or is to be noted.
        self._compared = {
            "pivots": not pivots.exact or self._shrink or self._touched,
            "buffers": not buffers.exact,
        }
        self.kinds = {
            "pivots": Kind(config.voxel_piv_cap, numbers, pivots, config.allocator, first, device, kernels),
            "buffers": Kind(config.voxel_buf_cap, 1, buffers, config.allocator, first, device, kernels),
        }

    @property
    def bytes(self) -> int:
        """Allocated."""
        return self._fixed_bytes + sum(kind.pool.bytes for kind in self.kinds.values())

    @property
    def most_bytes(self) -> int:
        """Allocated once all blocks are free."""
        return self._fixed_bytes + sum(kind.pool.most_bytes for kind in self.kinds.values())

    @property
    def _fixed_bytes(self) -> int:
        """Of all but the pools."""
        scale = 0 if self.key_scale is None else self.key_scale.nbytes
        return scale + sum(kind.table.bytes for kind in self.kinds.values())

    @property
    def voxel_bytes(self) -> int:
        """Of the tables, per voxel."""
        return self.lanes * sum(kind.table.row_bytes for kind in self.kinds.values())

    def begin(self, moment: int) -> None:
        """A new pass, or a move after it: what is left to chance depends on its number only."""
        for chance in self._chance.values():
            chance.manual_seed(moment)

    def grow(self, voxels: int) -> None:
        """Make room in the tables for rows of more voxels."""
        for kind in self.kinds.values():
            kind.table.grow(voxels * self.lanes)

    def of_voxels(self, voxels: Tensor) -> Tensor:
        """Row numbers [n, lanes] of voxels [n]."""
        return torch.add(self._numbers, voxels[:, None], alpha=self.lanes)

    def by_lane(self, voxels: Tensor) -> Tensor:
        """The same [lanes, n]; of voxels [lanes, n] one each. Below 0 where the voxel is."""
        return torch.add(self._numbers[:, None], voxels, alpha=self.lanes)

    def read(self, rows: Tensor) -> Content:
        """The content of rows [n]."""
        blocks, slots = self._find(rows)
        factor = self._factor(rows)
        pivot_keys, pivot_values, pivots = self.kinds["pivots"].pool.read(slots["pivots"], factor)
        buffer_keys, buffer_values, buffers = self.kinds["buffers"].pool.read(slots["buffers"], factor)
        if self._shrink:
            pivot_keys, pivot_values = key_length.relax(pivot_keys, pivot_values, pivots[..., 2])
            buffer_keys, buffer_values = key_length.widen(buffer_keys, buffer_values)
        weight, score_sum, members, score = pivots[..., 0], pivots[..., 1], pivots[..., -1], buffers[..., 0]
        buffer_score = F.threshold(score, 0.0, -torch.inf)  # 0 where there is nothing
        state = RowState(
            pivot_keys, pivot_values, weight, score_sum, members, buffer_keys, buffer_values, buffer_score
        )
        return Content(rows, state, blocks, slots, factor, pivots[..., -2] if self._touched else None)

    def fresh(self, rows: Tensor, state: RowState) -> Content:
        """Rows [n] without any slot as if they held `state`."""
        touched = torch.zeros_like(state.members) if self._touched else None
        return Content(rows, state, *self._find(rows), self._factor(rows), touched)

    def blocks(self, name: str, state: RowState) -> int:
        """Blocks of one kind that rows with this content hold."""
        return int(self.kinds[name].used(_occupied(state)[name]).sum())

    def update(self, before: Content, after: RowState, merge: Tensor, moment: int) -> Update:
        """What replacing the content takes. What is as before is not written again.

        merge: numbers of `MergeCounts`.
        """
        occupied, touched = _occupied(after), before.touched
        changes: dict[str, Change] = {}
        for name, kind in self.kinds.items():
            used = kind.used(occupied[name])
            coded = written = kind.within(used)
            if self._compared[name]:
                altered = _altered(name, before.state, after)
                if touched is not None and name == "pivots":
                    touched = touched.masked_fill(altered, moment)
                altered = altered | (before.slots[name] < 0)
                written, coded = written & altered, occupied[name] & altered
            changes[name] = Change(*_exchanged(before.blocks[name], used), written, coded)
        masks = [mask for change in changes.values() for mask in change[:3]]
        return Update(before, after, touched, changes, Later(torch.cat([torch.cat(masks, 1).sum(0), merge])))

    def write(self, update: Update) -> None:
        """Replace the content of rows, whose slots are reserved."""
        rows, factor, counts = update.before.rows, update.before.factor, update.counts
        for name, kind in self.kinds.items():
            change, (taken, given_back, count) = update.changes[name], counts[name]
            blocks = update.before.blocks[name]
            slots = kind.exchange(rows, blocks, change.won, change.lost, taken, given_back)
            content, chance = self._stored(name, update), self._chance.get(name)
            kind.pool.write(slots, content, change.written, count, change.coded, factor, chance)

    def tokens(self, rows: Tensor) -> int:
        """Tokens that the rows [n] stand for: buffered, and merged into pivots."""
        _, pivots = self.figures(self.kinds["pivots"], rows)
        _, buffers = self.figures(self.kinds["buffers"], rows)
        return int(pivots[..., -1].sum(dtype=torch.float64)) + int((buffers[..., -1] > 0).sum())

    def clear(self, rows: Tensor) -> None:
        """Empty the rows [n] and free their slots."""
        for kind in self.kinds.values():
            kind.fit(rows, torch.zeros(len(rows), kind.slots_per_row, dtype=torch.bool, device=rows.device))

    def state(self) -> State:
        return {n: {"table": k.table.state(), "pool": k.pool.state()} for n, k in self.kinds.items()}

    def restore(self, state: State) -> None:
        for name, kind in self.kinds.items():
            kind.table.restore(state[name].get("table", {}))
            kind.pool.restore(state[name]["pool"])

    def check(self, voxels: Tensor) -> None:
        """RuntimeError where a slot belongs to two rows, or to none without being free."""
        rows = self.of_voxels(voxels).flatten()
        for name, kind in self.kinds.items():
            blocks = kind.blocks(rows)
            held = blocks[blocks >= 0]
            if len(held.unique()) != len(held) or len(held) * kind.block != kind.pool.slots_used:
                raise RuntimeError(f"{name}: {len(held)} blocks in rows, {kind.pool.slots_used} slots in use")

    def figures(self, kind: Kind, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [n, slots_per_row] of the rows and their figures [n, slots_per_row, f], 0 where empty."""
        slots = kind.slots(kind.blocks(rows))
        return slots, kind.pool.figures(slots)

    def _find(self, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Blocks and slots of rows [n] by kind."""
        blocks = {name: kind.blocks(rows) for name, kind in self.kinds.items()}
        return blocks, {name: kind.slots(blocks[name]) for name, kind in self.kinds.items()}

    def _factor(self, rows: Tensor) -> Factor | None:
        return None if self.key_scale is None else Factor(self.key_scale, rows % self.lanes)

    def _stored(self, name: str, update: Update) -> RowSlots:
        """What of one kind is stored."""
        after = update.after
        if name == "buffers":
            keys, values = after.buffer_keys, after.buffer_values
            if self._shrink:
                keys, values = keys[..., :-1], values[..., :-1]
            return RowSlots(keys, values, after.buffer_score.clamp_min(0)[..., None])
        keys, values = after.pivot_keys, after.pivot_values
        figures = [after.weight, after.score_sum]
        if self._shrink:
            keys, values, shrink = key_length.stretch(keys, values)
            figures.append(shrink)
        if update.touched is not None:
            figures.append(update.touched)
        return RowSlots(keys, values, torch.stack([*figures, after.members], -1))


def _occupied(state: RowState) -> dict[str, Tensor]:
    return {"pivots": state.members > 0, "buffers": state.buffer_score > -torch.inf}


def _altered(name: str, before: RowState, after: RowState) -> Tensor:
    """Slots [n, slots_per_row] of one kind that hold something else than before.

    Whoever joins a pivot is counted; any other pivot, and any other token, has another key.
    """
    number, keys = ("members", "pivot_keys") if name == "pivots" else ("buffer_score", "buffer_keys")
    old, new = (getattr(state, keys)[..., :TELLING] for state in (before, after))
    return (getattr(before, number) != getattr(after, number)) | _any(old != new)


def _any(mask: Tensor) -> Tensor:
    """[..., n] without gaps → [...]; eight at a time where that comes out even, as a GPU does much sooner."""
    return (mask if mask.shape[-1] % 8 else mask.view(torch.int64)).any(-1)


def _exchanged(blocks: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks have to be taken, and which are given back, by the table's entries and what is used."""
    held = blocks >= 0
    return used > held, held > used
