"""Moving tokens between slots and rows in Triton: every slot is read or written once, all fields together.

Kernels find the pages of a store as in `gather_triton`. Rounding by chance is left to PyTorch, whose random
numbers it takes.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels import slots_torch
from stac_core.kernels.attend import CODE_GROUP
from stac_core.kernels.gather import Page
from stac_core.kernels.gather_triton import (
    FIGURES,
    KEYS,
    NUMBERS,
    VALUES,
    field,
    find_page,
    page_table,
    read,
)
from stac_core.kernels.launch_triton import check_reachable
from stac_core.kernels.quantization import SMALLEST_SCALE
from stac_core.kernels.slots import LIKE, Factor, RowSlots, SlotPage, Store, check_slots

GROUP = tl.constexpr(CODE_GROUP)
SMALLEST = tl.constexpr(SMALLEST_SCALE)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it leaves no fraction, and rounds halves to even
TOKENS, WARPS = 16, 2  # of one program


def read_slots(store: Store, slots: Tensor, factor: Factor | None) -> RowSlots:
    """The contract of `slots.py`."""
    check_slots(store, slots, factor)
    check_reachable(LIKE, slots)
    keys, values = (torch.empty(*slots.shape, store.codec.dim, device=slots.device) for _ in range(2))
    content = RowSlots(keys, values, _new_figures(store, slots))
    _launch_read(store, slots, factor, content)
    return content


def read_figures(store: Store, slots: Tensor) -> Tensor:
    """The contract of `slots.py`."""
    check_slots(store, slots)
    check_reachable(LIKE, slots)
    figures = _new_figures(store, slots)
    _launch_read(store, slots, None, RowSlots(figures, figures, figures), FIGURES_ONLY=True)
    return figures


def save_slots(store: Store, slots: Tensor) -> SlotPage:
    """The contract of `slots.py`."""
    check_slots(store, slots, in_rows=False)
    check_reachable(LIKE, slots)
    if not store.pages:
        return slots_torch.save_slots(store, slots)
    fields = tuple(x.new_empty(len(slots), x.shape[1]) for x in store.pages[0].fields)
    if len(slots):
        with torch.cuda.device_of(slots):  # Triton launches on the current device
            _save_kernel[(triton.cdiv(len(slots), TOKENS),)](
                slots, *_table(store, slots), fields, len(slots), TOKENS=TOKENS, **_fields(fields),
                num_warps=WARPS,
            )  # fmt: skip
    *tokens, figures = fields
    return SlotPage(Page(*tokens), figures)


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
    if chance is not None:
        return slots_torch.write_slots(store, slots, content, written, coded, factor, chance)
    check_slots(store, slots, factor, content, written, coded)
    check_reachable(LIKE, slots)
    if not len(written) or not store.pages:
        return
    slots, written, coded = (x.contiguous() for x in (slots, written, coded))
    content = RowSlots(*(x.contiguous() for x in content))
    with torch.cuda.device_of(slots):  # Triton launches on the current device
        _write_kernel[(triton.cdiv(len(written), TOKENS),)](
            slots, written, coded, *_table(store, slots), *_factors(factor), *content, len(written),
            **_constants(store, slots), num_warps=WARPS,
        )  # fmt: skip


def _launch_read(
    store: Store, slots: Tensor, factor: Factor | None, content: RowSlots, FIGURES_ONLY: bool = False
) -> None:
    if not store.pages or not slots.numel():
        for part in content:
            part.zero_()
        return
    slots = slots.contiguous()
    with torch.cuda.device_of(slots):  # Triton launches on the current device
        _read_kernel[(triton.cdiv(slots.numel(), TOKENS),)](
            slots, *_table(store, slots), *_factors(factor), *content, slots.numel(),
            FIGURES_ONLY=FIGURES_ONLY, **_constants(store, slots), num_warps=WARPS,
        )  # fmt: skip


def _table(store: Store, slots: Tensor) -> tuple[Tensor, int, bool]:
    """What kernels ask for the pages, see `page_table`."""
    tokens, figures = zip(*store.pages, strict=True)
    return page_table(tokens, slots.device, figures)


def _fields(fields: tuple[Tensor, ...]) -> dict[str, tuple[int, ...]]:
    """Where the table has the fields of a `SlotPage`, and how wide these are."""
    *tokens, _ = range(KEYS.value, KEYS.value + len(fields))
    widths = tuple(x.shape[1] for x in fields)
    round_widths = tuple(triton.next_power_of_2(width) for width in widths)
    return {"AT": (*tokens, FIGURES.value), "WIDTHS": widths, "ROUND_WIDTHS": round_widths}


def _factors(factor: Factor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if factor is None else (factor.of_lane.contiguous(), factor.lane.contiguous())


def _constants(store: Store, slots: Tensor) -> dict[str, Any]:
    dim, figures = store.codec.dim, store.figures
    return {
        "PER_ROW": slots.shape[1], "DIM": dim, "WIDTH": triton.next_power_of_2(dim), "BITS": store.codec.bits,
        "COUNT": figures, "COUNT_WIDTH": triton.next_power_of_2(figures),
        "NUMBER": NUMBERS[store.codec.dtype], "TOKENS": TOKENS,
    }  # fmt: skip


def _new_figures(store: Store, slots: Tensor) -> Tensor:
    """[n, S, f] whose n · S figures of one kind lie together: whoever takes one kind needs no copy."""
    return torch.empty(store.figures, *slots.shape, device=slots.device).movedim(0, -1)


@triton.jit
def _figures_at(row, local, inside, COUNT: tl.constexpr, COUNT_WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses of the figures of slots, and which of them there are."""
    number = tl.arange(0, COUNT_WIDTH)
    first = field(row, FIGURES, tl.float32, ALIGNED) + local * COUNT
    return first[:, None] + number[None], inside[:, None] & (number < COUNT)[None]


@triton.jit(do_not_specialize=["pages", "count"])
def _read_kernel(
    slots, table, pages, ALIGNED: tl.constexpr, factor, lane, keys_out, values_out, figures_out, count,
    FIGURES_ONLY: tl.constexpr, PER_ROW: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    COUNT: tl.constexpr, COUNT_WIDTH: tl.constexpr, NUMBER: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real = at < count
    slot = tl.load(slots + at, mask=real, other=-1)
    inside = slot >= 0
    row, local = find_page(table, pages, slot)
    number = tl.arange(0, COUNT_WIDTH)
    source, there = _figures_at(row, local, inside, COUNT, COUNT_WIDTH, ALIGNED)
    figures = tl.load(source, mask=there, other=0.0)
    mask = real[:, None] & (number < COUNT)[None]
    tl.store(figures_out + at[:, None] + (number.to(tl.int64) * count)[None], figures, mask=mask)
    if not FIGURES_ONLY:
        last = tl.sum(tl.where((number == COUNT - 1)[None], figures, 0.0), 1)
        full = inside & (last > 0)
        channel = tl.arange(0, WIDTH)
        target = (at * DIM)[:, None] + channel[None]
        mask = real[:, None] & (channel < DIM)[None]
        k = read(row, local, full, DIM, WIDTH, BITS, NUMBER, ALIGNED, KEYS)
        if factor is not None:
            of_lane = tl.load(lane + at // PER_ROW, mask=full, other=0)
            of_lane = (factor + of_lane * DIM)[:, None] + channel[None]
            scale = tl.load(of_lane, mask=full[:, None] & (channel < DIM)[None], other=0.0)
            k = (k.to(NUMBER).to(tl.float32) * scale.to(NUMBER).to(tl.float32)).to(NUMBER).to(tl.float32)
        k = tl.where(full[:, None], k, 0.0)
        tl.store(keys_out + target, k.to(NUMBER).to(tl.float32), mask=mask)
        v = tl.where(full[:, None], read(row, local, full, DIM, WIDTH, BITS, NUMBER, ALIGNED, VALUES), 0.0)
        tl.store(values_out + target, v.to(NUMBER).to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["pages", "count"])
def _save_kernel(
    slots, table, pages, ALIGNED: tl.constexpr, fields, count,
    AT: tl.constexpr, WIDTHS: tl.constexpr, ROUND_WIDTHS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Every field of the slots."""
    at = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + at, mask=at < count, other=-1)
    row, local = find_page(table, pages, slot)
    for i in tl.static_range(len(fields)):
        channel = tl.arange(0, ROUND_WIDTHS[i])
        mask = (slot >= 0)[:, None] & (channel < WIDTHS[i])[None]
        source = field(row, AT[i], fields[i].dtype.element_ty, ALIGNED) + local * WIDTHS[i]
        target = (at * WIDTHS[i])[:, None] + channel[None]
        tl.store(fields[i] + target, tl.load(source[:, None] + channel[None], mask=mask), mask=mask)


@triton.jit
def _write(
    row, local, inside, numbers,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr, TOKENS: tl.constexpr,
    ALIGNED: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Store [TOKENS, WIDTH] keys or values by the rows of their pages, where inside."""
    channel = tl.arange(0, WIDTH)
    if BITS == 16:
        mask = inside[:, None] & (channel < DIM)[None]
        target = field(row, COLUMN, NUMBER, ALIGNED) + local * DIM
        tl.store(target[:, None] + channel[None], numbers.to(NUMBER), mask=mask)
    else:
        LEVELS: tl.constexpr = 2**BITS - 1
        INNER: tl.constexpr = min(WIDTH, GROUP)
        OUTER: tl.constexpr = WIDTH // INNER
        GROUPS: tl.constexpr = (DIM + GROUP - 1) // GROUP
        real = (channel < DIM)[None]
        lowest = tl.reshape(tl.where(real, numbers, float("inf")), [TOKENS, OUTER, INNER])
        highest = tl.reshape(tl.where(real, numbers, float("-inf")), [TOKENS, OUTER, INNER])
        offset = tl.min(lowest, 2).to(tl.float16)
        scale = tl.div_rn(tl.max(highest, 2) - offset.to(tl.float32), LEVELS * 1.0)
        scale = tl.maximum(scale, SMALLEST).to(tl.float16)
        group = tl.arange(0, OUTER)
        grid = field(row, COLUMN + 2, tl.float16, ALIGNED) + local * (2 * GROUPS)
        grid = grid[:, None] + (2 * group)[None]
        mask = inside[:, None] & (group < GROUPS)[None]
        tl.store(grid, scale, mask=mask)
        tl.store(grid + 1, offset, mask=mask)
        steps = tl.reshape(numbers, [TOKENS, OUTER, INNER]) - offset.to(tl.float32)[:, :, None]
        steps = tl.div_rn(steps, tl.broadcast_to(scale.to(tl.float32)[:, :, None], [TOKENS, OUTER, INNER]))
        codes = tl.minimum(tl.maximum((steps + ROUNDING) - ROUNDING, 0.0), LEVELS * 1.0)
        codes = tl.reshape(codes, [TOKENS, WIDTH]).to(tl.int32).to(tl.uint8)
        PER_BYTE: tl.constexpr = 8 // BITS
        byte = tl.arange(0, WIDTH // PER_BYTE)
        if BITS == 4:
            low, high = tl.split(tl.reshape(codes, [TOKENS, WIDTH // 2, 2]))
            codes = low | (high << 4)
        mask = inside[:, None] & (byte < DIM // PER_BYTE)[None]
        target = field(row, COLUMN, tl.uint8, ALIGNED) + local * (DIM // PER_BYTE)
        tl.store(target[:, None] + byte[None], codes, mask=mask)


@triton.jit(do_not_specialize=["pages", "count"])
def _write_kernel(
    slots, written, coded, table, pages, ALIGNED: tl.constexpr, factor, lane, keys, values, figures, count,
    PER_ROW: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    COUNT: tl.constexpr, COUNT_WIDTH: tl.constexpr, NUMBER: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at = tl.load(written + place, mask=place < count, other=0)
    slot = tl.load(slots + at, mask=place < count, other=-1)
    inside = slot >= 0
    row, local = find_page(table, pages, slot)
    target, mask = _figures_at(row, local, inside, COUNT, COUNT_WIDTH, ALIGNED)
    number = tl.arange(0, COUNT_WIDTH)
    tl.store(target, tl.load(figures + (at * COUNT)[:, None] + number[None], mask=mask, other=0.0), mask=mask)
    changes = inside & (tl.load(coded + at, mask=inside, other=0) != 0)
    channel = tl.arange(0, WIDTH)
    source = (at * DIM)[:, None] + channel[None]
    mask = changes[:, None] & (channel < DIM)[None]
    k = tl.load(keys + source, mask=mask, other=0.0)
    if factor is not None:
        of_lane = tl.load(lane + at // PER_ROW, mask=changes, other=0)
        k = tl.div_rn(k, tl.load((factor + of_lane * DIM)[:, None] + channel[None], mask=mask, other=1.0))
    _write(row, local, changes, k, DIM, WIDTH, BITS, NUMBER, TOKENS, ALIGNED, KEYS)
    v = tl.load(values + source, mask=mask, other=0.0)
    _write(row, local, changes, v, DIM, WIDTH, BITS, NUMBER, TOKENS, ALIGNED, VALUES)
