"""Attention with key mass in Triton: two passes, no atomics, one launch each over all key segments.

Forward: a block of queries sweeps the keys of one segment after the other with one running softmax.
Mass: a block of keys of one segment sweeps the sampled queries. Segments that are read alike (bits, factor,
bias) share the code that reads them: a group of segments is a tuple of arguments, of which a loop picks
one at a time. Coded tokens become numbers only in registers.

Triton compiles anew for every divisibility by 16 of every number in such a tuple. Numbers that change while
a stream runs therefore travel as odd ones, see `_odd`; what a segment does not have travels as 0.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.attend import (
    CODE_GROUP,
    AnySegment,
    Attended,
    CodedSegment,
    Codes,
    check_attend,
    sample_queries,
)

LOG2_E = tl.constexpr(1.4426950408889634)  # the GPU has 2ˣ in hardware, so logits are kept in base 2
GROUP = tl.constexpr(CODE_GROUP)
MAX_DIM = 128
# Places in the arguments of a segment, see `group_segments`.
KEYS_AT, VALUES_AT, BIAS_AT, LENGTH_AT, COLUMN_AT = (tl.constexpr(i) for i in (0, 8, 16, 18, 19))
# Triton's interpreter multiplies the bit patterns of bfloat16; widening is exact, so nothing else changes
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Tile(NamedTuple):
    """Block sizes and launch parameters; fixed rather than tuned at run time, so that runs repeat."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


def require(device_type: str) -> None:
    """Raise RuntimeError where Triton cannot run; its interpreter makes any device possible."""
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"the device is {device_type!r} and TRITON_INTERPRET is not set")


def check_reachable(name: str, x: Tensor) -> None:
    """ValueError naming the argument where no kernel could read it."""
    if x.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"{name}: is on {x.device}, the triton backend computes on CUDA devices")


def attend(q: Tensor, segments: Sequence[AnySegment], mass: bool = False, subsample: float = 1.0) -> Attended:
    """The contract of `attend.py` for head widths up to 128."""
    check_attend(q, segments, subsample)
    if q.shape[-1] > MAX_DIM:
        raise ValueError(f"q: head width {q.shape[-1]} is more than the {MAX_DIM} this backend has tiles for")
    check_reachable("q", q)
    filled = [s for s in segments if s.length]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        out, lse = _forward(q, filled)
        key_mass = None
        if mass:
            rows, stride, scale = sample_queries(q.shape[1], subsample)
            sampled = slice(0, rows * stride, stride)
            columns = _mass(q[:, sampled], filled, lse[:, sampled], scale)
            key_mass = list(columns.split([s.length for s in segments], 1))
    return Attended(out, lse, key_mass)


def is_hopper(device: torch.device) -> bool:
    """Whose matrix instructions read their operands from shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def forward_tile(q: Tensor, coded: bool, hopper: bool) -> Tile:
    """Wide heads and codes need more registers per key and query, so fewer at a time.

    With more than 128 registers only one block of 8 warps runs on a multiprocessor; left alone, the compiler
    takes more as soon as segments are read in two ways. On other GPUs so few
    would spill.
    """
    if q.dtype == torch.float32:
        return Tile(64, 32, 8, 2)
    if q.shape[-1] > 64:
        return Tile(64, 32, 8, 2) if coded else Tile(128, 32, 8, 3)
    return Tile(128, 32 if coded else 64, 8, 3, 128 if hopper else 255)


def mass_tile(q: Tensor) -> Tile:
    """Deeper prefetch pays over many queries only."""
    if q.dtype == torch.float32:
        return Tile(32, 64, 8, 2)
    if q.shape[-1] > 64:
        return Tile(64, 128, 8, 3)
    return Tile(64, 64, 4, 4 if q.shape[1] >= 2048 else 3)


def _forward(q: Tensor, segments: Sequence[AnySegment], tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    rows, queries, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, queries, dtype=torch.float32, device=q.device)
    tile = tile or forward_tile(q, any(isinstance(s, CodedSegment) for s in segments), is_hopper(q.device))
    groups, kinds = group_segments(segments)
    _forward_kernel[(triton.cdiv(queries, tile.queries), rows)](
        q, *q.stride()[:2], groups, out, lse, queries, 1 / math.sqrt(dim),
        dim, _width(dim), tile.queries, tile.keys, *kinds,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return out, lse


def _mass(
    q: Tensor, segments: Sequence[AnySegment], lse: Tensor, factor: float, tile: Tile | None = None
) -> Tensor:
    """[rows, keys of all segments]."""
    rows, queries, dim = q.shape
    tile = tile or mass_tile(q)
    columns = sum(s.length for s in segments)
    key_mass = torch.empty(rows, columns, dtype=torch.float32, device=q.device)
    groups, kinds = group_segments(segments)
    _mass_kernel[(sum(triton.cdiv(s.length, tile.keys) for s in segments), rows)](
        q, *q.stride()[:2], groups, lse, *lse.stride(), key_mass, columns,
        queries, 1 / math.sqrt(dim), factor,
        dim, _width(dim), tile.queries, tile.keys, *kinds,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return key_mass


def _width(dim: int) -> int:
    """Channels of a tile: a power of two, and no fewer than a matrix instruction takes."""
    return max(16, triton.next_power_of_2(dim))


class Kinds(NamedTuple):
    """How the segments of each group are read; part of the compiled kernel."""

    bits: tuple[int, ...]
    scaled: tuple[bool, ...]  # keys have a factor per channel
    biased: tuple[bool, ...]


def group_segments(segments: Sequence[AnySegment]) -> tuple[tuple[tuple[Any, ...], ...], Kinds]:
    """Arguments of the kernels: groups of segments that are read alike, and how each is read.

    A segment: keys and values as `_stored` has them, bias and its row stride, length, first column of mass.
    """
    groups: dict[tuple[int, bool, bool], list[tuple[Any, ...]]] = {}
    column = 0
    for segment in segments:
        bits, scaled = 16, False
        if isinstance(segment, CodedSegment):
            bits, scaled = segment.keys.bits, segment.keys.factor is not None
        bias = (
            segment.bias if segment.bias is None or segment.bias.stride(1) == 1 else segment.bias.contiguous()
        )
        shift = (0, _odd(0)) if bias is None else (bias, _odd(bias.stride(0)))
        argument = (
            *_stored(segment.keys), *_stored(segment.values), *shift, _odd(segment.length), _odd(column)
        )  # fmt: skip
        groups.setdefault((bits, scaled, bias is not None), []).append(argument)
        column += segment.length
    return tuple(tuple(group) for group in groups.values()), Kinds(*zip(*groups, strict=True))


def _odd(number: int) -> int:
    """Neither 1 nor divisible by 16; `_even` in a kernel takes it back."""
    return 2 * number + 3


def _stored(tokens: Tensor | Codes) -> tuple[Tensor | int, ...]:
    """What is stored per token, its grid, the factor per channel, each with its strides.

    A scale and its offset are one word of the grid, so that a token's come with one load.
    """
    if not isinstance(tokens, Codes):
        return tokens, *tokens.stride()[:2], 0, 0, 0, 0, 0
    grid = tokens.grid
    if grid.storage_offset() % 2 or any(stride % 2 for stride in grid.stride()[:2]):
        grid = grid.contiguous()
    words = grid.view(torch.int32)
    factor = (0, 0) if tokens.factor is None else (tokens.factor, tokens.factor.stride(0))
    return (
        tokens.codes, *tokens.codes.stride()[:2], words, _odd(words.stride(0)), words.stride(1), *factor
    )  # fmt: skip


@triton.jit
def _even(odd):
    return (odd - 3) >> 1


@triton.jit
def _pick(group, i, FIELD: tl.constexpr):
    """One field of the i-th segment of a group, by a number known only at run time."""
    picked = group[0][FIELD]
    for j in tl.static_range(1, len(group)):
        picked = tl.where(i == j, group[j][FIELD], picked)
    return picked


@triton.jit
def _pick_tokens(group, i, FIRST: tl.constexpr):
    """The eight fields of `_stored`."""
    return (
        _pick(group, i, FIRST), _pick(group, i, FIRST + 1), _pick(group, i, FIRST + 2),
        _pick(group, i, FIRST + 3), _pick(group, i, FIRST + 4), _pick(group, i, FIRST + 5),
        _pick(group, i, FIRST + 6), _pick(group, i, FIRST + 7),
    )  # fmt: skip


@triton.jit
def _pick_bias(group, i):
    """Where it begins, its row stride."""
    return _pick(group, i, BIAS_AT), _even(_pick(group, i, BIAS_AT + 1))


@triton.jit
def _load_numbers(
    pointer, row, row_stride, token_stride, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """[COUNT, WIDTH] tokens from `start` on; zero beyond the head width and, unless WHOLE, the last token."""
    token, channel = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    first = pointer + row * row_stride + tl.cast(start, tl.int64) * token_stride
    at = first + (token[:, None] * token_stride + channel[None])
    if WHOLE and DIM == WIDTH:
        numbers = tl.load(at)
    else:
        inside = start + token[:, None] < length
        if DIM != WIDTH:
            inside = inside & (channel[None] < DIM)
        numbers = tl.load(at, mask=inside, other=0.0)
    return numbers


@triton.jit
def _load_codes(
    stored, row, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The same for tokens stored as codes, as float32. Channels lie across lanes, as numbers do."""
    pointer, row_stride, token_stride, grid, grid_row, grid_token, factor, factor_row = stored
    token, channel = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    inside = start + token < length
    first = pointer + row * row_stride + tl.cast(start, tl.int64) * token_stride
    if BITS == 8:
        offsets = token[:, None] * token_stride + channel[None]
        codes = tl.load(first + offsets, mask=inside[:, None] & (channel[None] < DIM), other=0)
    else:
        pair = tl.arange(0, WIDTH // 2)
        offsets = token[:, None] * token_stride + pair[None]
        pairs = tl.load(first + offsets, mask=inside[:, None] & (pair[None] < DIM // 2), other=0)
        codes = tl.reshape(tl.join(pairs & 15, pairs >> 4), (COUNT, WIDTH))
    first = grid + row * _even(grid_row) + tl.cast(start, tl.int64) * grid_token
    if DIM <= GROUP:  # one word per token
        words = tl.load(first + token * grid_token, mask=inside, other=0)[:, None]
    else:
        at = token[:, None] * grid_token + (channel // GROUP)[None]
        words = tl.load(first + at, mask=inside[:, None] & (channel[None] < DIM), other=0)
    scale = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    offset = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    numbers = codes.to(tl.float32) * scale.to(tl.float32) + offset.to(tl.float32)
    if SCALED:
        numbers *= tl.load(factor + row * factor_row + channel, mask=channel < DIM, other=0.0)[None]
    if DIM != WIDTH:
        numbers = tl.where(channel[None] < DIM, numbers, 0.0)
    return numbers


@triton.jit
def _load_tokens(
    stored, row, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """The same for tokens stored either way; numbers come out as TYPE."""
    if BITS == 16:
        numbers = _load_numbers(stored[0], row, stored[1], stored[2], start, length, DIM, WIDTH, COUNT, WHOLE)
    else:
        numbers = _load_codes(stored, row, start, length, DIM, WIDTH, COUNT, BITS, SCALED).to(TYPE)
    return numbers


@triton.jit
def _load_bias(bias, row, token, length, BIASED: tl.constexpr, WHOLE: tl.constexpr = False):
    """[tokens] in base 2; −inf beyond the last token, of which WHOLE says that there are none."""
    pointer, row_stride = bias
    inside = token < length
    if BIASED and WHOLE:
        shift = tl.load(pointer + row * row_stride + token) * LOG2_E
    elif BIASED:
        shift = tl.load(pointer + row * row_stride + token, mask=inside, other=float("-inf")) * LOG2_E
    else:
        shift = tl.where(inside, 0.0, float("-inf"))
    return shift


@triton.jit
def _product(a, b, add_to=None):
    """a @ b with float32 accumulation, added to what is given; float32 is not rounded to tf32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, add_to, input_precision="ieee")


@triton.jit
def _sweep_block(
    q, top, total, out, keys, values, bias, row, start, length, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, BITS: tl.constexpr,
    SCALED: tl.constexpr, BIASED: tl.constexpr, WHOLE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: largest logit, sum of weights and weighted sum of values so far.

    scale: to base 2. Of a WHOLE block nothing is masked, and without bias its logits are never written out.
    """
    k = _load_tokens(keys, row, start, length, DIM, WIDTH, KEYS, BITS, SCALED, TYPE, WHOLE)
    product = _product(q, tl.trans(k))
    if WHOLE and not BIASED:
        new_top = tl.maximum(top, tl.max(product, 1) * scale)
        weights = tl.exp2(product * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
    else:
        shift = _load_bias(bias, row, start + tl.arange(0, KEYS), length, BIASED, WHOLE)
        logits = product * scale + shift[None]
        new_top = tl.maximum(top, tl.max(logits, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − (−inf) would be NaN
        weights = tl.exp2(logits - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
    v = _load_tokens(values, row, start, length, DIM, WIDTH, KEYS, BITS, False, TYPE, WHOLE)
    out = _product(weights.to(v.dtype), v, out * shrink[:, None])
    return new_top, total * shrink + tl.sum(weights, 1), out


@triton.jit(do_not_specialize=["queries"])
def _forward_kernel(
    q_pointer, q_row, q_token, groups, out_pointer, lse_pointer, queries, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    first_query = tl.program_id(0) * QUERIES
    q = _load_numbers(q_pointer, row, q_row, q_token, first_query, queries, DIM, WIDTH, QUERIES)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)

    for g in tl.static_range(len(groups)):
        for i in range(0, len(groups[g])):
            keys, values = _pick_tokens(groups[g], i, KEYS_AT), _pick_tokens(groups[g], i, VALUES_AT)
            bias, length = _pick_bias(groups[g], i), _even(_pick(groups[g], i, LENGTH_AT))
            TYPE: tl.constexpr = q_pointer.dtype.element_ty
            if BITS[g] == 16 and TYPE.primitive_bitwidth == 16 and WIDTH <= 64:
                whole = length // KEYS * KEYS
                for start in range(0, whole, KEYS):
                    top, total, out = _sweep_block(
                        q, top, total, out, keys, values, bias, row, start, length, scale * LOG2_E,
                        DIM, WIDTH, KEYS, BITS[g], SCALED[g], BIASED[g], True, TYPE,
                    )  # fmt: skip
                if whole < length:
                    top, total, out = _sweep_block(
                        q, top, total, out, keys, values, bias, row, whole, length, scale * LOG2_E,
                        DIM, WIDTH, KEYS, BITS[g], SCALED[g], BIASED[g], False, TYPE,
                    )  # fmt: skip
            else:  # registers are scarce here, and masks cost little beside the rest
                for start in range(0, length, KEYS):
                    top, total, out = _sweep_block(
                        q, top, total, out, keys, values, bias, row, start, length, scale * LOG2_E,
                        DIM, WIDTH, KEYS, BITS[g], SCALED[g], BIASED[g], False, TYPE,
                    )  # fmt: skip

    # the output and lse lie without gaps: [rows, queries, DIM], [rows, queries]
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    m, channel = first_query + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    out_offsets = tl.arange(0, QUERIES)[:, None] * DIM + channel[None]
    out_inside = (m[:, None] < queries) & (channel[None] < DIM)
    first_out = out_pointer + (row * queries + first_query) * DIM
    tl.store(first_out + out_offsets, out.to(out_pointer.dtype.element_ty), mask=out_inside)
    tl.store(lse_pointer + row * queries + m, (top + tl.log2(total)) / LOG2_E, mask=m < queries)


@triton.jit
def _load_lse(
    pointer, row, row_stride, token_stride, start, queries, COUNT: tl.constexpr, WHOLE: tl.constexpr = False
):
    """[COUNT] in base 2; +∞ for queries that give nothing: no key to see, or beyond the last one."""
    m = start + tl.arange(0, COUNT)
    at = pointer + row * row_stride + m * token_stride
    lse = tl.load(at) if WHOLE else tl.load(at, mask=m < queries, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit(do_not_specialize=["queries", "columns"])
def _mass_kernel(
    q_pointer, q_row, q_token, groups, lse_pointer, lse_row, lse_token, mass_pointer, columns,
    queries, scale, factor,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A program serves one block of keys: find its segment, sweep the queries."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    for g in tl.static_range(len(groups)):
        first_key, mine = -1, 0
        for i in tl.static_range(len(groups[g])):
            blocks = tl.cdiv(_even(groups[g][i][LENGTH_AT]), KEYS)
            if (block >= 0) & (block < blocks):
                first_key, mine = block * KEYS, i
            block -= blocks
        if first_key >= 0:
            keys, bias = _pick_tokens(groups[g], mine, KEYS_AT), _pick_bias(groups[g], mine)
            length = _even(_pick(groups[g], mine, LENGTH_AT))
            column = _even(_pick(groups[g], mine, COLUMN_AT))
            n = first_key + tl.arange(0, KEYS)
            k = _load_tokens(
                keys, row, first_key, length, DIM, WIDTH, KEYS, BITS[g], SCALED[g], q_pointer.dtype.element_ty
            )
            shift = _load_bias(bias, row, n, length, BIASED[g])
            # summed element by element and across lanes once at the end: no shuffle inside the loop
            sums = tl.zeros([QUERIES, KEYS], tl.float32)
            whole = queries // QUERIES * QUERIES
            for start in range(0, whole, QUERIES):
                q = _load_numbers(q_pointer, row, q_row, q_token, start, queries, DIM, WIDTH, QUERIES, True)
                lse = _load_lse(lse_pointer, row, lse_row, lse_token, start, queries, QUERIES, True)
                logits = _product(q, tl.trans(k)) * (scale * LOG2_E) + shift[None]
                sums += tl.exp2(logits - lse[:, None])
            if whole < queries:
                q = _load_numbers(q_pointer, row, q_row, q_token, whole, queries, DIM, WIDTH, QUERIES)
                lse = _load_lse(lse_pointer, row, lse_row, lse_token, whole, queries, QUERIES)
                logits = _product(q, tl.trans(k)) * (scale * LOG2_E) + shift[None]
                sums += tl.exp2(logits - lse[:, None])
            total = tl.sum(sums, 0) * factor
            tl.store(mass_pointer + row * columns + column + n, total, mask=n < length)
