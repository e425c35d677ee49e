"""Places for single tokens, handed out in blocks: the allocator of the voxel memory.

`static` hands out all slots that a row can ever need at once, `slab` four at a time, `segment` one at a
time. What a slot holds never depends on where it lies, so all three give the same results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.cache.pages import GROWTH, Pages, Places
from stac_core.cache.saved_state import State
from stac_core.kernels.gather import Page
from stac_core.kernels.quantization import Codec
from stac_core.kernels.slots import Factor, RowSlots, SlotKernels, SlotPage, Store

SLAB = 4


class SlotPool:
    """Slots of one kind: a key, a value and a few float32 figures each."""

    def __init__(
        self, codec: Codec, figures: int, block: int, first_slots: int, device: torch.device,
        kernels: SlotKernels,
    ) -> None:  # fmt: skip
        """figures: float32 numbers beside each token; block: slots handed out together."""
        self.block = block
        self._figures, self._kernels = figures, kernels
        self._codec, self._first_blocks = codec, max(1, first_slots // block)
        fields = {f"{part}{i}": (c.width, c.dtype) for part in "kv" for i, c in enumerate(codec.columns)}
        self._pages = Pages(fields | {"figures": (figures, torch.float32)}, device)
        # A stack of blocks by their first slots.
        self._free = torch.empty(0, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        """Allocated."""
        return self._pages.bytes + self._free.nbytes

    @property
    def most_bytes(self) -> int:
        """Allocated once all blocks have come back, for which the stack grows."""
        return self.blocks * self.block_bytes

    @property
    def block_bytes(self) -> int:
        """Of one block and its entry in the stack of free ones."""
        return self.slot_bytes * self.block + self._free.itemsize

    @property
    def slot_bytes(self) -> int:
        return self._pages.row_bytes

    @property
    def slots_used(self) -> int:
        return self._pages.length - self.block * len(self._free)

    @property
    def blocks(self) -> int:
        """Allocated, free or not."""
        return self._pages.length // self.block

    def missing(self, blocks: int) -> int:
        """How many more blocks would have to be allocated to take so many."""
        return max(0, blocks - len(self._free))

    def grow(self, blocks: int, most: int | None) -> None:
        """Allocate at least so many blocks more, at most `most`."""
        held = self.blocks
        wanted = max(blocks, int(GROWTH * held) if held else self._first_blocks)
        wanted = wanted if most is None else min(wanted, most)
        self._pages.grow(wanted * self.block)
        start, stop, like = held * self.block, (held + wanted) * self.block, self._free
        fresh = torch.arange(start, stop, self.block, dtype=like.dtype, device=like.device)
        self._free = torch.cat([fresh, self._free])

    def take(self, blocks: int) -> Tensor:
        """First slots of so many free blocks [blocks] int32."""
        left = len(self._free) - blocks
        taken = self._free[left:]
        self._free = self._free[:left].clone()  # a view would hold on to the taken entries
        return taken

    def give_back(self, first_slots: Tensor) -> None:
        """Free the blocks that begin at these slots [n] int32."""
        self._free = torch.cat([self._free, first_slots])

    @property
    def pages(self) -> list[Page]:
        """All tokens as they are stored, slot by slot."""
        return [Page(p["k0"], p["v0"], p.get("k1"), p.get("v1")) for p in self._pages.parts]

    @property
    def bits(self) -> int:
        return self._codec.bits

    def locate(self, slots: Tensor) -> Places:
        """Where slots [n] lie; until the pool grows."""
        return self._pages.locate(slots)

    def read(self, slots: Tensor, factor: Factor | None) -> RowSlots:
        """What is in slots [n, S], negative = nothing."""
        return self._kernels.read_slots(self._store, slots, factor)

    def figures(self, slots: Tensor) -> Tensor:
        """Of this the figures [n, S, f] alone."""
        return self._kernels.read_figures(self._store, slots)

    def write(
        self, slots: Tensor, content: RowSlots, written: Tensor, count: int, coded: Tensor,
        factor: Factor | None, chance: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        """Figures of the slots [n, S] that are to be `written`, so many, keys and values where `coded`."""
        places = torch.nonzero_static(written.flatten(), size=count)[:, 0]
        if self._pages.watched:
            saved = slots.flatten()[places]
            (keys, values, key_grid, value_grid), figures = self._kernels.save_slots(self._store, saved)
            old = {"k0": keys, "v0": values, "k1": key_grid, "v1": value_grid, "figures": figures}
            self._pages.remember(saved, {name: field for name, field in old.items() if field is not None})
        self._kernels.write_slots(self._store, slots, content, places, coded, factor, chance)

    def read_figures(self, places: Places) -> Tensor:
        return self._pages.read("figures", places)

    def write_figures(self, places: Places, figures: Tensor | float) -> None:
        self._pages.write("figures", places, figures)

    def read_raw(self, places: Places) -> dict[str, Tensor]:
        """Every field as it is stored, for moving slots elsewhere without decoding them."""
        return {name: self._pages.read(name, places) for name in self._pages.names}

    def write_raw(self, places: Places, fields: dict[str, Tensor]) -> None:
        for name, field in fields.items():
            self._pages.write(name, places, field)

    def state(self) -> State:
        return {"pages": self._pages.state(), "free": self._free}

    def restore(self, state: State) -> None:
        self._pages.restore(state.get("pages", {}))
        self._free = state["free"]

    @property
    def _store(self) -> Store:
        pages = zip(self.pages, self._pages.parts, strict=True)
        return Store([SlotPage(page, part["figures"]) for page, part in pages], self._codec, self._figures)


def block_size(allocator: str, capacity: int) -> int:
    """Slots per block for rows of `capacity` slots."""
    return {"static": capacity, "slab": min(SLAB, capacity), "segment": 1}[allocator]
