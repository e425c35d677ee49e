"""Moving tokens between slots and rows in plain PyTorch: the specification, and a path for any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stac_core.kernels.gather import Page
from stac_core.kernels.slots import Factor, RowSlots, SlotPage, Store, check_slots

Part = TypeVar("Part")


def read_slots(store: Store, slots: Tensor, factor: Factor | None) -> RowSlots:
    """The contract of `slots.py`."""
    check_slots(store, slots, factor)
    figures = _figures(store, slots)
    stored, codec = _read(store, slots.flatten()), store.codec
    empty = (figures[..., -1] <= 0)[..., None]
    keys, values = (codec.decode(fields).unflatten(0, slots.shape) for fields in _columns(stored.tokens))
    if factor is not None:
        keys = keys * factor.of_lane[factor.lane][:, None].to(keys.dtype)
    return RowSlots(keys.masked_fill(empty, 0).float(), values.masked_fill(empty, 0).float(), figures)


def read_figures(store: Store, slots: Tensor) -> Tensor:
    """The contract of `slots.py`."""
    check_slots(store, slots)
    return _figures(store, slots)


def save_slots(store: Store, slots: Tensor) -> SlotPage:
    """The contract of `slots.py`."""
    check_slots(store, slots, in_rows=False)
    return _read(store, slots)


def write_slots(
    store: Store,
    slots: Tensor,
    content: RowSlots,
    written: Tensor,
    coded: Tensor,
    factor: Factor | None,
    chance: torch.Generator | None = None,
) -> None:
    """The contract of `slots.py`."""
    check_slots(store, slots, factor, content, written, coded)
    keys, values, figures = (part.flatten(0, 1) for part in content)
    here, slot = written, slots.flatten()[written]
    for page, local, mine in _by_page(store.pages, slot):
        page.figures[local] = figures[here if mine is None else here[mine]]
    here = here[coded.flatten()[here]]
    slot = slots.flatten()[here]
    keys, values = keys[here], values[here]
    if factor is not None:
        keys = keys / factor.of_lane[factor.lane[here // slots.shape[1]]]
    coded_parts = [store.codec.encode(part, chance) for part in (keys, values)]
    for page, local, mine in _by_page(store.pages, slot):
        for columns, fields in zip(_columns(page.tokens), coded_parts, strict=True):
            for column, field in zip(columns, fields, strict=True):
                column[local] = field if mine is None else field[mine]


def _columns(tokens: Page) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Stored fields of the keys and of the values, as a codec has them."""
    keys, values, key_grid, value_grid = tokens
    if key_grid is None or value_grid is None:
        return (keys,), (values,)
    return (keys, key_grid), (values, value_grid)


def _figures(store: Store, slots: Tensor) -> Tensor:
    columns = [page.figures for page in store.pages]
    found = _take(columns, slots.flatten()) if columns else slots.new_zeros(slots.numel(), store.figures)
    return found.float().unflatten(0, slots.shape).masked_fill(slots[..., None] < 0, 0)


def _read(store: Store, slots: Tensor) -> SlotPage:
    """Slots [m] as they are stored; whatever there is for negative ones."""
    if not store.pages:
        wide = [slots.new_zeros(len(slots), c.width, dtype=c.dtype) for c in store.codec.columns]
        figures = slots.new_zeros(len(slots), store.figures, dtype=torch.float32)
        return SlotPage(Page(*(column for column in wide for _ in range(2))), figures)
    *tokens, figures = (
        _take(columns, slots) for columns in zip(*(page.fields for page in store.pages), strict=True)
    )
    return SlotPage(Page(*tokens), figures)


def _take(columns: Sequence[Tensor], slots: Tensor) -> Tensor:
    """Rows `slots` [m] of the columns one after the other."""
    if len(columns) == 1:
        return columns[0].index_select(0, slots.clamp_min(0))
    found = columns[0].new_zeros(len(slots), columns[0].shape[1])
    for column, local, here in _split(columns, [len(column) for column in columns], slots):
        found[here] = column[local]
    return found


def _by_page(pages: Sequence[SlotPage], slots: Tensor) -> Iterator[tuple[SlotPage, Tensor, Tensor | None]]:
    """Each page, the slots [m] that lie in it by their place there, and which these are; None = all."""
    if len(pages) == 1:
        return iter([(pages[0], slots, None)])
    return _split(pages, [len(page.figures) for page in pages], slots)


def _split(
    parts: Sequence[Part], lengths: Sequence[int], slots: Tensor
) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Each of the parts that lie one after the other, the slots in it by their place there, and which."""
    first = 0
    for part, length in zip(parts, lengths, strict=True):
        here = ((slots >= first) & (slots < first + length)).nonzero()[:, 0]
        yield part, slots[here] - first, here
        first += length
