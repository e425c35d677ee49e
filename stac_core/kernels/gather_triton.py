"""Fetching retrieved tokens in Triton: one launch per kind, every row of the result written once.

The pages of a store reach the kernel as a tuple, `PAGES_AT_ONCE` at most; a store of more takes one more
launch, which writes the tokens of those pages.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.attend import CODE_GROUP
from stac_core.kernels.attend_triton import check_reachable, require
from stac_core.kernels.gather import Gathered, Page, Wanted, check_gather, shares
from stac_core.kernels.segments_triton import decode, even, odd, unpack

__all__ = ["gather", "require"]

GROUP = tl.constexpr(CODE_GROUP)
PAGES_AT_ONCE = 32
TOKENS, WARPS = 32, 4  # of one program
NEVER = 1 << 29  # a slot that no token has


def gather(
    kinds: Sequence[Wanted], budget: int, dim: int, dtype: torch.dtype, factor: Tensor | None = None
) -> Gathered:
    """The contract of `gather.py`."""
    check_gather(kinds, budget, dim, dtype, factor)
    check_reachable("kinds[0].slots", kinds[0].slots)
    lanes, device = kinds[0].slots.shape[0], kinds[0].slots.device
    keys, values = (torch.empty(lanes, budget, dim, dtype=dtype, device=device) for _ in range(2))
    bias = torch.empty(lanes, budget, device=device)
    found, total = shares(kinds)
    factor = None if factor is None else factor.contiguous()
    grid = (triton.cdiv(budget, TOKENS), lanes)
    with torch.cuda.device_of(bias):  # Triton launches on the current device
        for i, (kind, share) in enumerate(zip(kinds, found, strict=True)):
            bits = kind.bits if kind.pages else 16
            for pages, stop in page_groups(kind.pages or [Page(keys, values)]) if budget and lanes else ():
                pad = i == 0 and pages[0][4] == odd(0)
                stop = stop if kind.pages else 0
                _gather_kernel[grid](
                    kind.slots, kind.members, *kind.slots.stride(), *kind.members.stride(), *share, total,
                    pages, stop, factor, keys, values, bias, budget,
                    dim, triton.next_power_of_2(dim), bits, pad, TOKENS,
                    num_warps=WARPS,
                )  # fmt: skip
    return Gathered(keys, values, bias, total.clamp_max(budget))


def page_groups(pages: Sequence[Page]) -> list[tuple[tuple[tuple[Any, ...], ...], int]]:
    """Arguments of launches: keys, key grid, values, value grid, `odd` first slot per page; the slot behind.

    A group has 1, 2, 4 … pages, filled up with ones that no slot lies in, so that few kernels are compiled.
    Pages of numbers have no grids; their own tokens stand in for them.
    """
    groups, first = [], 0
    for start in range(0, len(pages), PAGES_AT_ONCE):
        group: list[tuple[Any, ...]] = []
        for page in pages[start : start + PAGES_AT_ONCE]:
            key_grid, value_grid = (
                tokens if grid is None else grid
                for tokens, grid in ((page.keys, page.key_grid), (page.values, page.value_grid))
            )
            group.append((page.keys, key_grid, page.values, value_grid, odd(first)))
            first += len(page.keys)
        filling = triton.next_power_of_2(len(group)) - len(group)
        groups.append((tuple(group) + ((*group[0][:4], odd(NEVER)),) * filling, first))
    return groups


@triton.jit
def _find_page(pages, slot, FIELD: tl.constexpr):
    """A field of the page that each slot lies in."""
    found = pages[0][FIELD] + tl.zeros_like(slot)
    for i in tl.static_range(1, len(pages)):
        found = tl.where(slot >= even(pages[i][4]), pages[i][FIELD], found)
    return found


@triton.jit
def _read(
    pages,
    slot,
    local,
    inside,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    FIELD: tl.constexpr,
):
    """[TOKENS, WIDTH] keys (field 0) or values (field 2) as float32; 0 where not inside.

    Beyond DIM there is nothing to rely on.
    """
    channel = tl.arange(0, WIDTH)
    first = _find_page(pages, slot, FIELD)
    if BITS == 16:
        mask = inside[:, None] & (channel[None] < DIM)
        numbers = tl.load((first + local * DIM)[:, None] + channel[None], mask=mask, other=0.0)
        numbers = numbers.to(tl.float32)
    else:
        BYTES: tl.constexpr = DIM * BITS // 8
        byte = tl.arange(0, WIDTH * BITS // 8)
        mask = inside[:, None] & (byte[None] < BYTES)
        codes = tl.load((first + local * BYTES)[:, None] + byte[None], mask=mask, other=0)
        if BITS == 4:
            codes = unpack(codes)
        grid = _find_page(pages, slot, FIELD + 1).to(
            tl.pointer_type(tl.int32)
        )  # scale and offset as one word
        grid += local * ((DIM + GROUP - 1) // GROUP)
        if DIM <= GROUP:
            words = tl.load(grid, mask=inside, other=0)[:, None]
        else:
            mask = inside[:, None] & (channel[None] < DIM)
            words = tl.load(grid[:, None] + (channel // GROUP)[None], mask=mask, other=0)
        numbers = decode(codes, words)
    return numbers


@triton.jit(do_not_specialize=["stop", "budget"])
def _gather_kernel(
    slots, members, slot_lane, slot_token, members_lane, members_token, before, count, total,
    pages, stop, factor, keys_out, values_out, bias_out, budget,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Tokens of one kind whose slots lie in `pages`, and with PAD the padding behind all kinds."""
    lane = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = place - tl.load(before + lane)
    comes = (token >= 0) & (token < tl.load(count + lane)) & (place < budget)
    channel = tl.arange(0, WIDTH)
    row = lane * budget + place
    at = row[:, None] * DIM + channel[None]
    slot = tl.load(slots + lane * slot_lane + token * slot_token, mask=comes, other=-1)
    comes = comes & (slot >= even(pages[0][4])) & (slot < stop)
    local = slot - even(_find_page(pages, slot, 4))
    mask = comes[:, None] & (channel[None] < DIM)
    k = _read(pages, slot, local, comes, DIM, WIDTH, BITS, 0)
    if factor is not None:
        k *= tl.load(factor + lane * DIM + channel, mask=channel < DIM, other=0.0)[None]
    tl.store(keys_out + at, k.to(keys_out.dtype.element_ty), mask=mask)
    v = _read(pages, slot, local, comes, DIM, WIDTH, BITS, 2)
    tl.store(values_out + at, v.to(values_out.dtype.element_ty), mask=mask)
    stands_for = tl.load(members + lane * members_lane + token * members_token, mask=comes, other=1.0)
    tl.store(bias_out + row, tl.log(stands_for), mask=comes)
    if PAD:
        left = (place >= tl.load(total + lane)) & (place < budget)
        mask = left[:, None] & (channel[None] < DIM)
        nothing = tl.zeros([TOKENS, WIDTH], keys_out.dtype.element_ty)
        tl.store(keys_out + at, nothing, mask=mask)
        tl.store(values_out + at, nothing, mask=mask)
        tl.store(bias_out + row, tl.full([TOKENS], float("-inf"), tl.float32), mask=left)
