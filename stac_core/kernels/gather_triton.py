"""Fetching retrieved tokens in Triton: one launch per kind, every row of the result written once.

A store may have any number of pages. Kernels find them in a table on the device, see `page_table`: had they
the pages as arguments, Triton would compile anew whenever a store gets more of them.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.device import send
from stac_core.kernels.attend import CODE_GROUP
from stac_core.kernels.gather import Gathered, Page, Wanted, check_gather, shares
from stac_core.kernels.launch_triton import check_lanes, check_reachable
from stac_core.kernels.segments_triton import decode, unpack

GROUP = tl.constexpr(CODE_GROUP)
ALIGNMENT = tl.constexpr(16)  # bytes; what is aligned so is read in the largest pieces
TOKENS, WARPS = 32, 4  # of one program
# Columns of a page in the table: its first slot, then where its fields begin, grids two behind their codes.
FIRST_SLOT, KEYS, VALUES, KEY_GRID, VALUE_GRID, FIGURES, COLUMNS = (tl.constexpr(i) for i in range(7))
NUMBERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def gather(
    kinds: Sequence[Wanted], budget: int, dim: int, dtype: torch.dtype, factor: Tensor | None = None
) -> Gathered:
    """The contract of `gather.py`."""
    check_gather(kinds, budget, dim, dtype, factor)
    check_reachable("kinds[0].slots", kinds[0].slots)
    lanes, device = kinds[0].slots.shape[0], kinds[0].slots.device
    check_lanes("kinds[0].slots", lanes)
    keys, values = (torch.empty(lanes, budget, dim, dtype=dtype, device=device) for _ in range(2))
    bias = torch.empty(lanes, budget, device=device)
    found, total = shares(kinds)
    factor = None if factor is None else factor.contiguous()
    if budget and lanes:
        with torch.cuda.device_of(bias):  # Triton launches on the current device
            for i, (kind, share) in enumerate(zip(kinds, found, strict=True)):
                table, pages, aligned = page_table(kind.pages, device)
                _gather_kernel[(triton.cdiv(budget, TOKENS), lanes)](
                    kind.slots, kind.members, *kind.slots.stride(), *kind.members.stride(), *share, total,
                    table, pages, factor, keys, values, bias, budget,
                    dim, triton.next_power_of_2(dim), kind.bits, NUMBERS[dtype], aligned, i == 0, TOKENS,
                    num_warps=WARPS,
                )  # fmt: skip
    return Gathered(keys, values, bias, total.clamp_max(budget))


def page_table(
    pages: Sequence[Page], device: torch.device, figures: Sequence[Tensor] = ()
) -> tuple[Tensor, int, bool]:
    """What kernels ask for pages, and the figures that each of them may have.

    → [pages, columns] int64 on the device; how many pages; whether all they hold begins at a multiple of
    `ALIGNMENT`. The pages have to live as long as the kernels run.
    """
    rows, first = [], 0
    for i, page in enumerate(pages):
        fields = (*page, figures[i] if figures else None)
        rows.append((first, *(0 if x is None else x.data_ptr() for x in fields)))
        first += len(page.keys)
    aligned = not any(begin % ALIGNMENT.value for row in rows for begin in row[1:])
    return _sent_table(tuple(rows), device), len(rows), aligned


@lru_cache(maxsize=64)  # a store grows now and then; most launches see the pages of the one before
@torch.inference_mode(False)
def _sent_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return send(torch.tensor(rows or [[0] * COLUMNS.value]), device)


@triton.jit
def find_page(table, pages, slot):
    """Where the row of the page lies that each slot is in, and the number of the slot within it."""
    row = table + tl.zeros_like(slot)
    for i in range(1, pages):
        row += tl.where(slot >= tl.load(table + i * COLUMNS + FIRST_SLOT), COLUMNS, 0)
    return row, slot - tl.load(row + FIRST_SLOT)


@triton.jit
def field(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a field of pages begins, by their rows in the table."""
    begin = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    return tl.multiple_of(begin, ALIGNMENT) if ALIGNED else begin


@triton.jit
def read(
    row, local, inside, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr,
    ALIGNED: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """[tokens, WIDTH] keys or values by the rows of their pages, as float32; 0 where not inside.

    Beyond DIM there is nothing to rely on.
    """
    channel = tl.arange(0, WIDTH)
    if BITS == 16:
        at = field(row, COLUMN, NUMBER, ALIGNED) + local * DIM
        numbers = tl.load(
            at[:, None] + channel[None], mask=inside[:, None] & (channel[None] < DIM), other=0.0
        )
        numbers = numbers.to(tl.float32)
    else:
        BYTES: tl.constexpr = DIM * BITS // 8
        byte = tl.arange(0, WIDTH * BITS // 8)
        at = field(row, COLUMN, tl.uint8, ALIGNED) + local * BYTES
        codes = tl.load(at[:, None] + byte[None], mask=inside[:, None] & (byte[None] < BYTES), other=0)
        if BITS == 4:
            codes = unpack(codes)
        at = field(row, COLUMN + 2, tl.int32, ALIGNED) + local * ((DIM + GROUP - 1) // GROUP)
        if DIM <= GROUP:
            words = tl.load(at, mask=inside, other=0)[:, None]
        else:
            mask = inside[:, None] & (channel[None] < DIM)
            words = tl.load(at[:, None] + (channel // GROUP)[None], mask=mask, other=0)
        numbers = decode(codes, words)
    return numbers


@triton.jit(do_not_specialize=["slot_lane", "slot_token", "members_lane", "members_token", "pages", "budget"])
def _gather_kernel(
    slots, members, slot_lane, slot_token, members_lane, members_token, before, count, total,
    table, pages, factor, keys_out, values_out, bias_out, budget,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr,
    ALIGNED: tl.constexpr, PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Tokens of one kind, and with PAD the padding behind all kinds."""
    lane = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = place - tl.load(before + lane)
    comes = (token >= 0) & (token < tl.load(count + lane)) & (place < budget)
    slot = tl.load(slots + lane * slot_lane + token * slot_token, mask=comes, other=-1)
    comes = comes & (slot >= 0) & (pages > 0)
    row, local = find_page(table, pages, slot)
    channel = tl.arange(0, WIDTH)
    to = lane * budget + place
    at = to[:, None] * DIM + channel[None]
    mask = comes[:, None] & (channel[None] < DIM)
    k = read(row, local, comes, DIM, WIDTH, BITS, NUMBER, ALIGNED, KEYS)
    if factor is not None:
        k *= tl.load(factor + lane * DIM + channel, mask=channel < DIM, other=0.0)[None]
    tl.store(keys_out + at, k.to(NUMBER), mask=mask)
    v = read(row, local, comes, DIM, WIDTH, BITS, NUMBER, ALIGNED, VALUES)
    tl.store(values_out + at, v.to(NUMBER), mask=mask)
    stands_for = tl.load(members + lane * members_lane + token * members_token, mask=comes, other=1.0)
    tl.store(bias_out + to, tl.log(stands_for), mask=comes)
    if PAD:
        left = (place >= tl.load(total + lane)) & (place < budget)
        mask = left[:, None] & (channel[None] < DIM)
        nothing = tl.zeros([TOKENS, WIDTH], NUMBER)
        tl.store(keys_out + at, nothing, mask=mask)
        tl.store(values_out + at, nothing, mask=mask)
        tl.store(bias_out + to, tl.full([TOKENS], float("-inf"), tl.float32), mask=left)
