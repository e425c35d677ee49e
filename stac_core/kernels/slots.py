"""Contract of moving tokens between the slots of a store and rows of numbers that merging works on.

A row has S slots, each somewhere in the pages of the store, or nowhere where its number is negative. Beside
key and value a slot holds figures; the last one is 0 where it is empty. `slots_torch` is the specification
in code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stac_core.kernels.checks import check_tensor
from stac_core.kernels.gather import Page, check_page
from stac_core.kernels.quantization import Codec

LIKE = "slots"  # whose device all arguments share


class SlotPage(NamedTuple):
    """Consecutive slots as they are stored, without gaps in memory."""

    tokens: Page
    figures: Tensor  # [n, f] float32

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """All columns that there are."""
        return *(part for part in self.tokens if part is not None), self.figures


@dataclass(frozen=True)
class Store:
    """Slot s is the s-th of all pages."""

    pages: Sequence[SlotPage]
    codec: Codec
    figures: int  # how many a slot has


@dataclass(frozen=True)
class Factor:
    """What keys are divided by before they are coded."""

    of_lane: Tensor  # [lanes, D] float32
    lane: Tensor  # [n] int64, of each row


class RowSlots(NamedTuple):
    """What the S slots of n rows hold; 0 where they hold nothing."""

    keys: Tensor  # [n, S, D] float32
    values: Tensor  # [n, S, D] float32
    figures: Tensor  # [n, S, f] float32


class SlotKernels(Protocol):
    """One implementation of the contract: a module. slots: [n, S] int64, all different but the negative ones.

    ValueError naming the argument that does not fit.
    """

    def read_slots(self, store: Store, slots: Tensor, factor: Factor | None) -> RowSlots:
        """What rows hold, keys multiplied by the factor."""

    def read_figures(self, store: Store, slots: Tensor) -> Tensor:
        """The figures [n, S, f] alone."""

    def save_slots(self, store: Store, slots: Tensor) -> SlotPage:
        """A copy of slots [m], none of them negative, as they are stored."""

    def write_slots(
        self,
        store: Store,
        slots: Tensor,
        content: RowSlots,
        written: Tensor,
        coded: Tensor,
        factor: Factor | None,
        chance: torch.Generator | None = None,
    ) -> None:
        """Replace figures at the places `written` [m] int64 of all n · S slots, none of them negative.

        Of these, also keys and values where `coded` [n, S] is true.
        chance: see `Codec.encode`.
        """


def check_slots(
    store: Store,
    slots: Tensor,
    factor: Factor | None = None,
    content: RowSlots | None = None,
    written: Tensor | None = None,
    coded: Tensor | None = None,
    in_rows: bool = True,
) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    codec, device, shape = store.codec, slots.device, list(slots.shape)
    if slots.ndim != (2 if in_rows else 1):
        raise ValueError(f"slots: expected {'[n, S]' if in_rows else '[m]'}, got shape {shape}")
    check_tensor("slots", slots, shape, torch.int64, device, LIKE)
    for i, (tokens, figures) in enumerate(store.pages):
        check_page(f"store.pages[{i}].tokens", tokens, codec.bits, codec.dim, codec.dtype, device)
        size = [len(tokens.keys), store.figures]
        check_tensor(f"store.pages[{i}].figures", figures, size, torch.float32, device, LIKE)
        if not figures.is_contiguous():
            strides = figures.stride()
            raise ValueError(f"store.pages[{i}].figures: must be contiguous, got strides {strides}")
    if factor is not None:
        lanes = len(factor.of_lane)
        check_tensor("factor.of_lane", factor.of_lane, [lanes, codec.dim], torch.float32, device, LIKE)
        check_tensor("factor.lane", factor.lane, shape[:1], torch.int64, device, LIKE)
    if content is not None:
        widths = codec.dim, codec.dim, store.figures
        for name, part, width in zip(content._fields, content, widths, strict=True):
            check_tensor(f"content.{name}", part, [*shape, width], torch.float32, device, LIKE)
    if written is not None:
        check_tensor("written", written, [written.numel()], torch.int64, device, LIKE)
    if coded is not None:
        check_tensor("coded", coded, shape, torch.bool, device, LIKE)
