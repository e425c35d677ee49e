"""Contract of fetching retrieved tokens: from slots of a store to rows that attention reads.

A lane, one (layer, head), wants some tokens of every kind (merged, buffered). They come one kind after the
other, without gaps, at most `budget` of them; what is left is padding. A token that stands for n others is
weighed by a bias of log n. Source: STAC (arXiv 2603.20284), retrieval.
`gather_torch.gather` is the specification in code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stac_core.kernels.attend import CODE_GROUP, DTYPES
from stac_core.kernels.checks import check_tensor

LIKE = "kinds[0].slots"  # whose device all arguments share


class Page(NamedTuple):
    """Tokens in consecutive slots, without gaps in memory: numbers, or codes as in `attend.Codes`."""

    keys: Tensor  # [n, D] numbers, or [n, D · bits / 8] uint8
    values: Tensor
    key_grid: Tensor | None = None  # [n, 2 · groups] float16, scale and offset of each group
    value_grid: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """Tokens of one kind, by lane, the wanted ones first; slot s is the s-th token of all pages."""

    pages: Sequence[Page]
    bits: int
    slots: Tensor  # [lanes, n] int64
    members: Tensor  # [lanes, n] float32, how many tokens each stands for; 0 = not wanted


class Gathered(NamedTuple):
    """The same number of tokens in every lane; padding is 0 with a bias of −inf."""

    keys: Tensor  # [lanes, budget, D]
    values: Tensor  # [lanes, budget, D]
    bias: Tensor  # [lanes, budget] float32
    length: Tensor  # [lanes] int64, tokens that are not padding


class Gather(Protocol):
    """One implementation of the contract."""

    def __call__(
        self,
        kinds: Sequence[Wanted],
        budget: int,
        dim: int,
        dtype: torch.dtype,
        factor: Tensor | None = None,
    ) -> Gathered:
        """factor [lanes, D] float32 multiplies keys; ValueError naming the argument that does not fit."""


class Share(NamedTuple):
    """Where the tokens of one kind go: places `before` … `before + wanted` of each lane."""

    before: Tensor  # [lanes] int64
    wanted: Tensor  # [lanes] int64


def shares(kinds: Sequence[Wanted]) -> tuple[list[Share], Tensor]:
    """The share of each kind, and how many tokens all of them want [lanes]."""
    wanted = [(kind.members > 0).sum(-1) for kind in kinds]
    before = [torch.zeros_like(wanted[0]), *accumulate(wanted)]
    return [Share(*share) for share in zip(before, wanted, strict=False)], before[-1]


def check_gather(
    kinds: Sequence[Wanted], budget: int, dim: int, dtype: torch.dtype, factor: Tensor | None
) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if budget < 0:
        raise ValueError(f"budget = {budget}: expected a number of tokens, at least 0")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim = {dim}: expected an even head width")
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype}: expected float32, bfloat16 or float16")
    if not kinds:
        raise ValueError("kinds: nothing to gather from")
    slots = kinds[0].slots
    if slots.ndim != 2:
        raise ValueError(f"kinds[0].slots: expected [lanes, n], got shape {list(slots.shape)}")
    lanes, device = slots.shape[0], slots.device
    for i, kind in enumerate(kinds):
        n = kind.slots.shape[-1]
        check_tensor(f"kinds[{i}].slots", kind.slots, [lanes, n], torch.int64, device, LIKE)
        check_tensor(f"kinds[{i}].members", kind.members, [lanes, n], torch.float32, device, LIKE)
        if kind.bits not in (16, 8, 4):
            raise ValueError(f"kinds[{i}].bits = {kind.bits}: expected 16, 8 or 4")
        for j, page in enumerate(kind.pages):
            check_page(f"kinds[{i}].pages[{j}]", page, kind.bits, dim, dtype, device)
    if factor is not None:
        check_tensor("factor", factor, [lanes, dim], torch.float32, device, LIKE)


def check_page(name: str, page: Page, bits: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    stored = (dim, dtype) if bits == 16 else (dim * bits // 8, torch.uint8)
    grid = 2 * -(-dim // CODE_GROUP)
    for part, x, (width, kind) in (
        ("keys", page.keys, stored),
        ("values", page.values, stored),
        ("key_grid", page.key_grid, (grid, torch.float16)),
        ("value_grid", page.value_grid, (grid, torch.float16)),
    ):
        if x is None:
            if bits != 16:
                raise ValueError(f"{name}.{part}: missing; codes of {bits} bits need it")
            continue
        check_tensor(f"{name}.{part}", x, [len(page.keys), width], kind, device, LIKE)
        if not x.is_contiguous():
            raise ValueError(f"{name}.{part}: must be contiguous, got strides {x.stride()}")
        if part.endswith("grid"):  # scale and offset are read as one word
            check_begin(f"{name}.{part}", x)


def check_begin(name: str, x: Tensor) -> None:
    """ValueError where it begins between pairs of numbers."""
    if x.storage_offset() % 2:
        size = 2 * x.element_size()
        offset = x.storage_offset()
        raise ValueError(f"{name}: must begin at a multiple of {size} bytes, got offset {offset}; copy it")
