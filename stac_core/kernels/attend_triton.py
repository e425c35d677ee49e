"""Attention with key mass in Triton: two passes, no atomics, one launch each over all key segments.

Here, a block of queries sweeps the keys of segment after segment with one softmax (`softmax_triton.py`).
Where such blocks are too few for the device, the keys are split among several programs
(`attend_split_triton.py`). Mass: `mass_triton.py`. How segments are read: `segments_triton.py`.
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

from stac_core.kernels.attend import AnySegment, Attended, CodedSegment, check_attend, sample_queries
from stac_core.kernels.attend_split_triton import choose_parts, combine, count_blocks, new_parts, stretch
from stac_core.kernels.launch_triton import (
    Tile,
    blocks_of,
    check_queries,
    is_hopper,
    multiprocessors,
    product,
    require,
    tile_width,
)
from stac_core.kernels.mass_triton import mass_of
from stac_core.kernels.segments_triton import (
    LOG2_E,
    Kinds,
    bias_of,
    from_token,
    group_segments,
    length_of,
    load_bias,
    load_numbers,
    load_tokens,
    tokens_of,
)
from stac_core.kernels.softmax_triton import KEYS_AGAIN, STAGES_AGAIN, all_held, new_sums, shifts, weigh

__all__ = ["attend", "require"]
_SPLIT_COMPILED: set[tuple] = set()


def attend(q: Tensor, segments: Sequence[AnySegment], mass: bool = False, subsample: float = 1.0) -> Attended:
    """The contract of `attend.py` for head widths up to 128."""
    check_attend(q, segments, subsample)
    check_queries(q)
    filled = [s for s in segments if s.length]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        out, lse = _forward(q, filled)
        key_mass = None
        if mass:
            rows, stride, scale = sample_queries(q.shape[1], subsample)
            sampled = slice(0, rows * stride, stride)
            columns = mass_of(q[:, sampled], filled, lse[:, sampled], scale)
            key_mass = list(columns.split([s.length for s in segments], 1))
    return Attended(out, lse, key_mass)


def forward_tile(q: Tensor, coded: bool, hopper: bool) -> Tile:
    """Wide heads and codes need more registers per key and query, so fewer at a time.

    With more than 128 registers only one block of 8 warps runs on a multiprocessor; left alone, the compiler
    takes more as soon as segments are read in two ways. On other GPUs so few registers would spill.
    """
    if q.dtype == torch.float32 and q.shape[1] <= 16:  # frames of a camera head
        return Tile(16, 32, 8, 2, 128)
    if q.dtype == torch.float32:
        return Tile(64, 32, 8, 2)
    if q.shape[-1] > 64:
        return Tile(64, 32, 8, 2) if coded else Tile(128, 32, 8, 3)
    return Tile(128, 32 if coded else 64, 8, 3, 128 if hopper else 255)


def _forward(
    q: Tensor, segments: Sequence[AnySegment], tile: Tile | None = None, parts: int | None = None
) -> tuple[Tensor, Tensor]:
    """parts: among how many programs the keys are split."""
    tile = tile or forward_tile(q, any(isinstance(s, CodedSegment) for s in segments), is_hopper(q.device))
    groups, kinds = group_segments(segments)
    if parts is None:
        parts = parts_for(q, tile, sum(blocks_of(s.length, tile.keys) for s in segments))
        if parts == 1 and not triton.knobs.runtime.interpret:
            _compile_split(q, segments, tile, (q.device, q.dtype, q.shape[-1], tile, kinds))
    return sweep(q, groups, kinds, tile, parts)


def parts_for(q: Tensor, tile: Tile, key_blocks: int) -> int:
    """Among how many programs so many blocks of keys are split on the device of q."""
    query_blocks = blocks_of(q.shape[1], tile.queries) * q.shape[0]
    return choose_parts(query_blocks, key_blocks, multiprocessors(q.device) * tile.at_once)


def sweep(
    q: Tensor, groups: tuple[Any, ...] | Tensor, kinds: Kinds, tile: Tile, parts: int,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward pass. groups: of `group_segments`, or the same segments listed on the device.

    → out, each query's heads side by side, and lse [rows, M] float32, there where one is given, without gaps.
    """
    rows, queries, dim = q.shape
    out = torch.empty(queries, rows, dim, dtype=q.dtype, device=q.device).transpose(0, 1)
    if lse is None:
        lse = torch.empty(rows, queries, dtype=torch.float32, device=q.device)
    results = new_parts(parts, q) if parts > 1 else (out, lse)
    _forward_kernel[(blocks_of(queries, tile.queries), rows, parts)](
        q, *q.stride()[:2], groups, *results, *results[0].stride()[-3:-1], queries, 1 / math.sqrt(dim),
        dim, tile_width(dim), tile.queries, tile.keys, *kinds, parts > 1, isinstance(groups, Tensor),
        shifts(q.dtype, dim),
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    if parts > 1:
        combine(*results, out, lse)
    return out, lse


def _compile_split(q: Tensor, segments: Sequence[AnySegment], tile: Tile, compiled_for: tuple) -> None:
    """Run the kernels for split keys once over segments of each kind, so that Triton compiles them now.

    A shorter chunk, or one that sees more, would otherwise have them compiled in the midst of a stream.
    """
    if compiled_for not in _SPLIT_COMPILED:
        _SPLIT_COMPILED.add(compiled_for)
        _forward(q[:, :1], segments, tile, parts=2)


@triton.jit
def _sweep_block(
    q, top, total, out, keys, values, bias, row, start, length, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, BITS: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One step of the softmax: largest logit, sum of weights and weighted sum of values so far.

    scale: to base 2. Of a WHOLE block nothing is masked. Weights are SHIFTED by the largest logit, or not.
    """
    k = load_tokens(keys, row, start, length, DIM, WIDTH, KEYS, BITS, SCALED, q.dtype, WHOLE)
    logits = product(q, tl.trans(k)) * scale
    if BIASED or not WHOLE:
        logits += load_bias(bias, row, start + tl.arange(0, KEYS), length, BIASED, WHOLE)[None]
    weights, top, total, out = weigh(logits, top, total, out, SHIFTED)
    v = load_tokens(values, row, start, length, DIM, WIDTH, KEYS, BITS, False, q.dtype, WHOLE)
    return top, total, product(weights.to(v.dtype), v, out)


@triton.jit
def _sweep_keys(
    q, groups, first, stop, row, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, SIZES: tl.constexpr,
    SPLIT: tl.constexpr, LISTED: tl.constexpr,
    SHIFTED: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The softmax over all keys or, where they are SPLIT, over the blocks `first` to before `stop`.

    STEP, STAGES: keys at a time, stages of the pipeline (None = as launched), where weights are SHIFTED.
    """
    top, total, out = new_sums(q.shape[0], WIDTH, SHIFTED)
    for g in tl.static_range(len(SIZES)):
        for i in range(0, SIZES[g]):
            keys, values = tokens_of(groups, g, i, SIZES, LISTED, DIM, q.dtype)
            bias, length = (
                bias_of(groups, g, i, SIZES, LISTED, BIASED),
                length_of(groups, g, i, SIZES, LISTED),
            )
            if SPLIT:  # a part of a segment is a segment
                begin, inside = stretch(first, stop, length, KEYS)
                first -= tl.cdiv(length, KEYS)
                stop -= tl.cdiv(length, KEYS)
                keys, values, bias = from_token(keys, values, bias, begin, BITS[g], BIASED[g])
                length = inside
            if SHIFTED:
                for start in tl.range(0, length, STEP, num_stages=STAGES):
                    top, total, out = _sweep_block(
                        q, top, total, out, keys, values, bias, row, start, length, scale,
                        DIM, WIDTH, STEP, BITS[g], SCALED[g], BIASED[g], False, True,
                    )  # fmt: skip
            else:
                NUMBERS: tl.constexpr = BITS[g] == 16  # beside decoding, masks cost little
                swept = length // KEYS * KEYS if NUMBERS else length
                for start in range(0, swept, KEYS):
                    top, total, out = _sweep_block(
                        q, top, total, out, keys, values, bias, row, start, length, scale,
                        DIM, WIDTH, KEYS, BITS[g], SCALED[g], BIASED[g], NUMBERS, False,
                    )  # fmt: skip
                if NUMBERS and swept < length:
                    top, total, out = _sweep_block(
                        q, top, total, out, keys, values, bias, row, swept, length, scale,
                        DIM, WIDTH, KEYS, BITS[g], SCALED[g], BIASED[g], False, False,
                    )  # fmt: skip
    return top, total, out


@triton.jit(do_not_specialize=["queries"])
def _forward_kernel(
    q_pointer, q_row, q_token, groups, out_pointer, lse_pointer, out_row, out_token, queries, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, SIZES: tl.constexpr,
    SPLIT: tl.constexpr, LISTED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """A program serves one block of queries with all keys or, where they are SPLIT, with its part of them."""
    row = tl.program_id(1).to(tl.int64)
    first, stop = 0, 0
    if SPLIT:
        part, parts = tl.program_id(2), tl.num_programs(2)
        blocks = count_blocks(groups, KEYS, SIZES, LISTED)
        first, stop = part * blocks // parts, (part + 1) * blocks // parts
    first_query = tl.program_id(0) * QUERIES
    q = load_numbers(q_pointer, row, q_row, q_token, first_query, queries, DIM, WIDTH, QUERIES)
    top, total, out = _sweep_keys(
        q, groups, first, stop, row, scale * LOG2_E,
        DIM, WIDTH, KEYS, BITS, SCALED, BIASED, SIZES, SPLIT, LISTED, SHIFTED, KEYS, None,
    )  # fmt: skip
    if not SHIFTED:  # noqa: SIM102 (known to the compiler, and the next one is not)
        if not all_held(total):
            top, total, out = _sweep_keys(
                q, groups, first, stop, row, scale * LOG2_E,
                DIM, WIDTH, KEYS, BITS, SCALED, BIASED, SIZES, SPLIT, LISTED, True, KEYS_AGAIN, STAGES_AGAIN,
            )  # fmt: skip

    # of parts as `new_parts` has them
    if SPLIT:
        row += tl.program_id(2) * tl.num_programs(1)
    else:
        out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    m, channel = first_query + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    out_offsets = tl.arange(0, QUERIES)[:, None] * out_token + channel[None]
    out_inside = (m[:, None] < queries) & (channel[None] < DIM)
    first_out = out_pointer + row * out_row + tl.cast(first_query, tl.int64) * out_token
    tl.store(first_out + out_offsets, out.to(out_pointer.dtype.element_ty), mask=out_inside)
    if SPLIT:
        tl.store(lse_pointer + row * queries + m, top, mask=m < queries)
        row += tl.num_programs(2) * tl.num_programs(1)
        tl.store(lse_pointer + row * queries + m, total, mask=m < queries)
    else:
        tl.store(lse_pointer + row * queries + m, (top + tl.log2(total)) / LOG2_E, mask=m < queries)
