"""Which slots belong to which row: the content of voxels, whatever the storage.

A row is voxel · lanes + lane, a lane one (layer, head). Rows are read as the dense state that the merge
kernel works on and written back as the slots that changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache import key_length
from stac_core.cache.pages import Pages
from stac_core.cache.quantization import Codec
from stac_core.cache.saved_state import State
from stac_core.cache.slots import SlotPool, block_size
from stac_core.config import CacheConfig
from stac_core.kernels.voxel_merge import RowState


class Kind:
    """One kind of slots, buffered tokens or pivots, and the table from rows to them."""

    def __init__(self, slots_per_row: int, figures: int, codec: Codec, allocator: str, first: int,
                 device: torch.device) -> None:  # fmt: skip
        self.block = block_size(allocator, slots_per_row)
        self.blocks_per_row = -(-slots_per_row // self.block)
        self.pool = SlotPool(codec, figures, self.block, first, device)
        self.slots_per_row = slots_per_row
        # First slot of each block plus one; 0 = the row has no such block yet.
        self.table = Pages({"first": (self.blocks_per_row, torch.int32)}, device)

    def slots(self, rows: Tensor) -> Tensor:
        """Rows [n] → their slots [n, slots_per_row]; −1 = none."""
        first = self.table.read("first", rows).long()[..., None]
        offsets = torch.arange(self.block, device=rows.device)
        return torch.where(first > 0, first - 1 + offsets, -1).flatten(1)[:, : self.slots_per_row]

    def fit(self, rows: Tensor, occupied: Tensor) -> None:
        """Give the rows [n] the blocks that `occupied` [n, slots_per_row] needs, take back the others."""
        first, used = self.table.read("first", rows), self._used(occupied)
        wanted, unwanted = used & (first == 0), ~used & (first > 0)
        self.pool.give_back(first[unwanted].long() - 1)
        first[unwanted] = 0
        first[wanted] = self.pool.take(int(wanted.sum()))[:, 0].int() + 1
        self.table.write("first", rows, first)

    def blocks(self, occupied: Tensor) -> int:
        """Blocks that rows with these slots occupied hold."""
        return int(self._used(occupied).sum())

    def held(self, rows: Tensor) -> int:
        """Blocks that the rows [n] have."""
        return int((self.table.read("first", rows) > 0).sum())

    def needed(self, rows: Tensor, occupied: Tensor) -> int:
        """Blocks that `fit` would take from the pool, beyond those that it gives back before."""
        held, used = self.table.read("first", rows) > 0, self._used(occupied)
        return max(0, int((used & ~held).sum()) - int((~used & held).sum()))

    def _used(self, occupied: Tensor) -> Tensor:
        missing = self.blocks_per_row * self.block - self.slots_per_row
        padded = torch.nn.functional.pad(occupied, (0, missing))
        return padded.unflatten(-1, (self.blocks_per_row, self.block)).any(-1)


class VoxelRows:
    """Buffered tokens and pivots of all rows.

    With `norm_keep` the dense state has one more channel than what is stored, see `key_length`.
    """

    def __init__(
        self, config: CacheConfig, lanes: int, dim: int, dtype: torch.dtype, device: torch.device,
        key_scale: Tensor | None,
    ) -> None:  # fmt: skip
        """key_scale [lanes, D]: divides keys before they are coded; None = no coding."""
        self.lanes, self._key_scale = lanes, key_scale
        self._shrink, self._touched = config.norm_keep, config.stale_after > 0
        self._chance: dict[str, torch.Generator] = {}  # kinds that are rounded by chance
        if config.pivot_rounding == "stochastic":
            self._chance["pivots"] = torch.Generator(device)
        first, numbers = config.voxel_num * lanes, 3 + self._shrink + self._touched
        pivots, buffers = Codec(config.pivot_bits, dim, dtype), Codec(config.buffer_bits, dim, dtype)
        self.kinds = {
            "pivots": Kind(config.voxel_piv_cap, numbers, pivots, config.allocator, first, device),
            "buffers": Kind(config.voxel_buf_cap, 1, buffers, config.allocator, first, device),
        }

    @property
    def bytes(self) -> int:
        scale = 0 if self._key_scale is None else self._key_scale.nbytes
        return scale + sum(kind.pool.bytes + kind.table.bytes for kind in self.kinds.values())

    @property
    def voxel_bytes(self) -> int:
        """Of the tables, per voxel."""
        return self.lanes * sum(kind.table.row_bytes for kind in self.kinds.values())

    def begin(self, moment: int) -> None:
        """A new pass: what is left to chance depends on its number only."""
        for chance in self._chance.values():
            chance.manual_seed(moment)

    def grow(self, voxels: int) -> None:
        """Make room in the tables for rows of more voxels."""
        for kind in self.kinds.values():
            kind.table.grow(voxels * self.lanes)

    def of_voxels(self, voxels: Tensor) -> Tensor:
        """Row numbers [n, lanes] of voxels [n]."""
        return voxels[:, None] * self.lanes + torch.arange(self.lanes, device=voxels.device)

    def read(self, rows: Tensor) -> RowState:
        """The content of rows [n] in float32."""
        pivot_keys, pivot_values, pivot_figures = self._read(self.kinds["pivots"], rows)
        buffer_keys, buffer_values, buffer_figures = self._read(self.kinds["buffers"], rows)
        if self._shrink:
            pivot_keys, pivot_values = key_length.relax(pivot_keys, pivot_values, pivot_figures[..., 2])
            buffer_keys, buffer_values = key_length.widen(buffer_keys, buffer_values)
        score = buffer_figures[..., 0]
        return RowState(
            pivot_keys, pivot_values, pivot_figures[..., 0], pivot_figures[..., 1], pivot_figures[..., -1],
            buffer_keys, buffer_values, torch.where(score > 0, score, -torch.inf),
        )  # fmt: skip

    def needed(self, rows: Tensor, state: RowState) -> dict[str, int]:
        """Blocks of each kind that `write` would take."""
        return {name: kind.needed(rows, _occupied(state)[name]) for name, kind in self.kinds.items()}

    def blocks(self, name: str, state: RowState) -> int:
        """Blocks of one kind that rows with this content hold."""
        return self.kinds[name].blocks(_occupied(state)[name])

    def write(self, rows: Tensor, before: RowState, after: RowState, moment: int) -> None:
        """Replace the content of rows [n], whose slots are reserved; what is as before is not coded again."""
        self._write_pivots(rows, before, after, moment)
        moved = _moved(before.buffer_keys, after.buffer_keys, before.buffer_values, after.buffer_values)
        moved |= ~_occupied(before)["buffers"]
        keys, values = after.buffer_keys, after.buffer_values
        if self._shrink:
            keys, values = keys[..., :-1], values[..., :-1]
        figures = after.buffer_score.clamp_min(0)[..., None]
        self._write("buffers", rows, _occupied(after)["buffers"], moved, figures, keys, values)

    def touched(self, rows: Tensor) -> Tensor:
        """When each pivot of the rows was last changed, in passes [n, pivots]."""
        return self.figures(self.kinds["pivots"], rows)[1][..., -2]

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
            slots = kind.table.read("first", rows)
            held = slots[slots > 0]
            if len(held.unique()) != len(held) or len(held) * kind.block != kind.pool.slots_used:
                raise RuntimeError(f"{name}: {len(held)} blocks in rows, {kind.pool.slots_used} slots in use")

    def scale_of(self, rows: Tensor) -> Tensor | None:
        return None if self._key_scale is None else self._key_scale[rows % self.lanes]

    def figures(self, kind: Kind, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [n, slots_per_row] of the rows and their figures [n, slots_per_row, f], 0 where empty."""
        slots = kind.slots(rows)
        here = slots >= 0
        found = kind.pool.read_figures(slots[here])
        figures = found.new_zeros(*slots.shape, found.shape[-1])
        figures[here] = found
        return slots, figures

    def _read(self, kind: Kind, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slots, figures = self.figures(kind, rows)
        occupied = figures[..., -1] > 0
        row, _ = occupied.nonzero().unbind(-1)
        keys, values = kind.pool.read(slots[occupied], self.scale_of(rows[row]))
        dense = figures.new_zeros(2, *slots.shape, keys.shape[-1])
        dense[0][occupied], dense[1][occupied] = keys.float(), values.float()
        return dense[0], dense[1], figures

    def _write_pivots(self, rows: Tensor, before: RowState, after: RowState, moment: int) -> None:
        moved = _moved(before.pivot_keys, after.pivot_keys, before.pivot_values, after.pivot_values)
        moved |= ~_occupied(before)["pivots"]
        keys, values = after.pivot_keys, after.pivot_values
        figures = [after.weight, after.score_sum]
        if self._shrink:
            keys, values, shrink = key_length.stretch(keys, values)
            figures.append(shrink)
        if self._touched:
            changed = moved | (after.members != before.members)
            figures.append(self.touched(rows).masked_fill(changed, moment))
        figures.append(after.members)
        occupied = _occupied(after)["pivots"]
        self._write("pivots", rows, occupied, moved, torch.stack(figures, -1), keys, values)

    def _write(
        self, name: str, rows: Tensor, occupied: Tensor, moved: Tensor, figures: Tensor, keys: Tensor,
        values: Tensor,
    ) -> None:  # fmt: skip
        kind = self.kinds[name]
        fresh = kind.slots(rows) < 0
        kind.fit(rows, occupied)
        slots = kind.slots(rows)
        here = slots >= 0
        kind.pool.write_figures(slots[here], figures[here])
        changed = occupied & (moved | fresh)
        row, _ = changed.nonzero().unbind(-1)
        scale, chance = self.scale_of(rows[row]), self._chance.get(name)
        kind.pool.write(slots[changed], keys[changed], values[changed], scale, chance)


def _occupied(state: RowState) -> dict[str, Tensor]:
    return {"pivots": state.members > 0, "buffers": state.buffer_score > -torch.inf}


def _moved(old_keys: Tensor, keys: Tensor, old_values: Tensor, values: Tensor) -> Tensor:
    """Where a key or a value differs."""
    return (keys != old_keys).any(-1) | (values != old_values).any(-1)
