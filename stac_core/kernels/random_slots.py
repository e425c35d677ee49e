"""Random stores and rows, to compare backends of `slots` with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stac_core.kernels.gather import Page
from stac_core.kernels.quantization import Codec
from stac_core.kernels.slots import Factor, RowSlots, SlotPage, Store

LANES = 3


class SlotCase(NamedTuple):
    """What a problem looks like."""

    sizes: Sequence[int]  # of pages, in slots
    bits: int
    rows: int
    width: int  # slots of a row
    dim: int
    dtype: torch.dtype
    figures: int
    scaled: bool  # keys have a factor


class SlotProblem(NamedTuple):
    """All that the kernels of slots can be asked for."""

    store: Store
    slots: Tensor  # [rows, width]
    factor: Factor | None
    content: RowSlots
    held: Tensor  # [rows, width]
    coded: Tensor  # [rows, width]

    def copy_to(self, device: torch.device) -> SlotProblem:
        """With a store of its own."""
        store, slots, factor, content, held, coded = self
        return SlotProblem(
            copy_store(store, device),
            slots.to(device),
            None if factor is None else Factor(factor.of_lane.to(device), factor.lane.to(device)),
            RowSlots(*(part.to(device) for part in content)),
            held.to(device),
            coded.to(device),
        )


def copy_store(store: Store, device: torch.device) -> Store:
    pages = []
    for page in store.pages:
        *tokens, figures = (field.to(device, copy=True) for field in page.fields)
        pages.append(SlotPage(Page(*tokens), figures))
    return Store(pages, store.codec, store.figures)


def random_problem(case: SlotCase, seed: int) -> SlotProblem:
    """On the host. Some of the occupied slots are to be replaced, some only in their figures."""
    g = torch.Generator().manual_seed(seed)
    store = random_store(case.sizes, Codec(case.bits, case.dim, case.dtype), case.figures, g)
    slots = random_slots(sum(case.sizes), case.rows, case.width, g)
    factor = random_factor(case.rows, case.dim, g) if case.scaled else None
    keys, values = torch.randn(2, *slots.shape, case.dim, generator=g)
    values[:, 0] = 0.25  # the same in all channels
    content = RowSlots(keys, values, torch.rand(*slots.shape, case.figures, generator=g))
    held = (torch.rand(slots.shape, generator=g) < 0.8) & (slots >= 0)
    coded = held & (torch.rand(slots.shape, generator=g) < 0.7)
    return SlotProblem(store, slots, factor, content, held, coded)


def random_store(sizes: Sequence[int], codec: Codec, figures: int, generator: torch.Generator) -> Store:
    """Pages of these sizes; every third slot is empty."""
    pages = []
    for size in sizes:
        keys, values = (codec.encode(torch.randn(size, codec.dim, generator=generator)) for _ in range(2))
        numbers = torch.rand(size, figures, generator=generator) + 0.5
        numbers[::3, -1] = 0
        tokens = Page(*(x.contiguous() for x in (keys[0], values[0], *keys[1:], *values[1:])))
        pages.append(SlotPage(tokens, numbers))
    return Store(pages, codec, figures)


def random_slots(total: int, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """[rows, width], about half of them nowhere, the others different; of several rows the first has none."""
    slots = torch.randint(-9, 0, (rows * width,), generator=generator)
    first = width if rows > 1 else 0
    where = first + torch.randperm(rows * width - first, generator=generator)
    count = min(total, -(-rows * width // 2), len(where))
    slots[where[:count]] = torch.randperm(total, generator=generator)[:count]
    return slots.view(rows, width)


def random_factor(rows: int, dim: int, generator: torch.Generator) -> Factor:
    lane = torch.randint(0, LANES, (rows,), generator=generator)
    return Factor(torch.rand(LANES, dim, generator=generator) + 0.5, lane)
