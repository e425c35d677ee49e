"""What keys have received of attention, in Triton: a block of keys sweeps the queries that count.

`attend_triton.py` is the pass before, whose lse this reads; how segments are read: `segments_triton.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.attend import AnySegment
from stac_core.kernels.launch_triton import Tile, blocks_of, product, tile_width
from stac_core.kernels.segments_triton import (
    LOG2_E,
    Kinds,
    bias_of,
    column_of,
    group_segments,
    length_of,
    load_bias,
    load_numbers,
    load_tokens,
    tokens_of,
)


def mass_tile(q: Tensor) -> Tile:
    """Deeper prefetch pays over many queries only."""
    if q.dtype == torch.float32:
        return Tile(32, 64, 8, 2)
    if q.shape[-1] > 64:
        return Tile(64, 128, 8, 3)
    return Tile(64, 64, 4, 4 if q.shape[1] >= 2048 else 3)


def mass_of(
    q: Tensor, segments: Sequence[AnySegment], lse: Tensor, factor: float, tile: Tile | None = None
) -> Tensor:
    """[rows, keys of all segments]; q, lse: those that count, each for `factor` queries."""
    tile = tile or mass_tile(q)
    columns = sum(s.length for s in segments)
    key_mass = torch.empty(q.shape[0], columns, dtype=torch.float32, device=q.device)
    groups, kinds = group_segments(segments)
    blocks = sum(blocks_of(s.length, tile.keys) for s in segments)
    sum_columns(q, groups, kinds, lse, factor, tile, blocks, key_mass)
    return key_mass


def sum_columns(
    q: Tensor, groups: tuple[Any, ...] | Tensor, kinds: Kinds, lse: Tensor, factor: float,
    tile: Tile, blocks: int, key_mass: Tensor,
) -> None:  # fmt: skip
    """Launch the mass pass over at most so many blocks of keys; groups: of `group_segments`, or listed."""
    rows, queries, dim = q.shape
    _mass_kernel[(blocks, rows)](
        q, *q.stride()[:2], groups, lse, *lse.stride(), key_mass, key_mass.stride(0),
        queries, 1 / math.sqrt(dim), factor,
        dim, tile_width(dim), tile.queries, tile.keys, *kinds, isinstance(groups, Tensor),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


@triton.jit
def _load_lse(
    pointer, row, row_stride, token_stride, start, queries, COUNT: tl.constexpr, WHOLE: tl.constexpr = False
):
    """[COUNT] in base 2; +∞ for queries that give nothing: no key to see, or beyond the last one."""
    m = start + tl.arange(0, COUNT)
    at = pointer + row * row_stride + m * token_stride
    lse = tl.load(at) if WHOLE else tl.load(at, mask=m < queries, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def _shares(q, k, shift, lse, scale, BIASED: tl.constexpr):
    """What each key [KEYS] has of each query's attention [QUERIES]; scale, shift, lse: to base 2."""
    logits = product(q, tl.trans(k)) * scale
    if BIASED:
        logits += shift[None]
    return tl.exp2(logits - lse[:, None])


@triton.jit(do_not_specialize=["queries", "columns"])
def _mass_kernel(
    q_pointer, q_row, q_token, groups, lse_pointer, lse_row, lse_token, mass_pointer, columns,
    queries, scale, factor,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    SIZES: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """A program serves one block of keys: find its segment, sweep the queries."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    TYPE: tl.constexpr = q_pointer.dtype.element_ty
    for g in tl.static_range(len(SIZES)):
        first_key, mine = -1, 0
        for i in range(0, SIZES[g]):
            blocks = tl.cdiv(length_of(groups, g, i, SIZES, LISTED), KEYS)
            if (block >= 0) & (block < blocks):
                first_key, mine = block * KEYS, i
            block -= blocks
        if first_key >= 0:
            keys, _ = tokens_of(groups, g, mine, SIZES, LISTED, DIM, TYPE)
            bias = bias_of(groups, g, mine, SIZES, LISTED, BIASED)
            length = length_of(groups, g, mine, SIZES, LISTED)
            column = column_of(groups, g, mine, SIZES, LISTED)
            n = first_key + tl.arange(0, KEYS)
            k = load_tokens(keys, row, first_key, length, DIM, WIDTH, KEYS, BITS[g], SCALED[g], TYPE)
            shift = load_bias(bias, row, n, length, BIASED[g])
            # summed element by element and across lanes once at the end: no shuffle inside the loop
            sums = tl.zeros([QUERIES, KEYS], tl.float32)
            whole = queries // QUERIES * QUERIES
            for start in range(0, whole, QUERIES):
                q = load_numbers(q_pointer, row, q_row, q_token, start, queries, DIM, WIDTH, QUERIES, True)
                lse = _load_lse(lse_pointer, row, lse_row, lse_token, start, queries, QUERIES, True)
                sums += _shares(q, k, shift, lse, scale * LOG2_E, BIASED[g])
            if whole < queries:
                q = load_numbers(q_pointer, row, q_row, q_token, whole, queries, DIM, WIDTH, QUERIES)
                lse = _load_lse(lse_pointer, row, lse_row, lse_token, whole, queries, QUERIES)
                sums += _shares(q, k, shift, lse, scale * LOG2_E, BIASED[g])
            total = tl.sum(sums, 0) * factor
            tl.store(mass_pointer + row * columns + column + n, total, mask=n < length)
