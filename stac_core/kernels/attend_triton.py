"""Attention with key mass in Triton: two passes, no atomics, one launch per key segment and pass.

Forward: a block of queries sweeps the keys with a running softmax. A further segment starts from
the output and lse of the one before it, as if that were a single key; so segments join without a
copy of keys and without a kernel of their own. Mass: a block of keys sweeps the sampled queries.
Coded tokens become numbers only in registers.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    fold_factor,
    sample_queries,
)

LOG2_E = tl.constexpr(1.4426950408889634)  # the GPU has 2ˣ in hardware, so logits are kept in base 2
GROUP = tl.constexpr(CODE_GROUP)
MAX_DIM = 128
# Triton's interpreter multiplies the bit patterns of bfloat16; widening is exact, so nothing else changes
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Tile(NamedTuple):
    """Block sizes and launch parameters; fixed rather than tuned at run time, so that runs repeat."""

    queries: int
    keys: int
    warps: int
    stages: int


def require(device_type: str) -> None:
    """Raise RuntimeError where Triton cannot run; its interpreter makes any device possible."""
    if device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"the device is {device_type!r} and TRITON_INTERPRET is not set")


def attend(q: Tensor, segments: Sequence[AnySegment], mass: bool = False, subsample: float = 1.0) -> Attended:
    """The contract of `attend.py` for head widths up to 128."""
    check_attend(q, segments, subsample)
    if q.shape[-1] > MAX_DIM:
        raise ValueError(f"q: head width {q.shape[-1]} is more than the {MAX_DIM} this backend has tiles for")
    with torch.cuda.device_of(q):  # Triton launches on the current device
        out, lse = _forward(q, [s for s in segments if s.length])
        key_mass = None
        if mass:
            rows, stride, scale = sample_queries(q.shape[1], subsample)
            sampled = slice(0, rows * stride, stride)
            key_mass = [_mass(q[:, sampled], s, lse[:, sampled], scale) for s in segments]
    return Attended(out, lse, key_mass)


def forward_tile(q: Tensor, bits: int = 16) -> Tile:
    """Wide heads and codes need more registers per key, so fewer keys at a time."""
    if q.dtype == torch.float32:
        return Tile(64, 32, 8, 2)
    return Tile(128, 64 if q.shape[-1] <= 64 and bits == 16 else 32, 8, 3)


def mass_tile(q: Tensor) -> Tile:
    if q.dtype == torch.float32:
        return Tile(32, 64, 8, 2)
    return Tile(64, 128, 8, 3)


def _forward(q: Tensor, segments: Sequence[AnySegment]) -> tuple[Tensor, Tensor]:
    rows, queries, dim = q.shape
    lse = torch.empty(rows, queries, dtype=torch.float32, device=q.device)
    joined = torch.empty(q.shape, dtype=torch.float32, device=q.device) if len(segments) > 1 else None
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        target = out if last or joined is None else joined
        folded, bits = fold_factor(q, segment), _bits(segment)
        tile = forward_tile(q, bits)
        _forward_kernel[(triton.cdiv(queries, tile.queries), rows)](
            folded, *_pointers(segment.keys), *_pointers(segment.values), segment.bias,
            joined if i else None, target, lse,
            *folded.stride()[:2], *_strides(segment.keys), *_strides(segment.values),
            *(segment.bias.stride() if segment.bias is not None else (0, 0)),
            queries, segment.length, 1 / math.sqrt(dim),
            dim, max(16, triton.next_power_of_2(dim)), tile.queries, tile.keys, bits,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


def _mass(q: Tensor, segment: AnySegment, lse: Tensor, factor: float) -> Tensor:
    tile = mass_tile(q)
    rows, queries, dim = q.shape
    key_mass = torch.empty(rows, segment.length, dtype=torch.float32, device=q.device)
    if segment.length:
        q = fold_factor(q, segment)
        _mass_kernel[(triton.cdiv(segment.length, tile.keys), rows)](
            q, *_pointers(segment.keys), segment.bias, lse, key_mass,
            *q.stride()[:2], *_strides(segment.keys),
            *(segment.bias.stride() if segment.bias is not None else (0, 0)), *lse.stride(),
            queries, segment.length, 1 / math.sqrt(dim), factor,
            dim, max(16, triton.next_power_of_2(dim)), tile.queries, tile.keys, _bits(segment),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return key_mass


def _bits(segment: AnySegment) -> int:
    return segment.keys.bits if isinstance(segment, CodedSegment) else 16


def _pointers(tokens: Tensor | Codes) -> tuple[Tensor, Tensor | None]:
    """What is stored per token, and scale and offset where these are codes."""
    return (tokens.codes, tokens.grid) if isinstance(tokens, Codes) else (tokens, None)


def _strides(tokens: Tensor | Codes) -> tuple[int, int, int, int]:
    """Of rows and tokens, in what is stored and in its scales."""
    stored, grid = _pointers(tokens)
    return *stored.stride()[:2], *(grid.stride()[:2] if grid is not None else (0, 0))  # type: ignore[return-value]


@triton.jit
def _load_tokens(
    pointer, row, row_stride, token_stride, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """[COUNT, WIDTH] tokens from `start` on; zero beyond the last token and beyond the head width."""
    token, channel = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    first = pointer + row * row_stride + tl.cast(start, tl.int64) * token_stride
    inside = start + token[:, None] < length
    if DIM != WIDTH:
        inside = inside & (channel[None] < DIM)
    return tl.load(first + (token[:, None] * token_stride + channel[None]), mask=inside, other=0.0)


@triton.jit
def _load_codes(
    pointer, grid, row, row_stride, token_stride, grid_row, grid_token, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The same for tokens stored as codes, as float32."""
    token, channel = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    inside = start + token < length
    first = pointer + row * row_stride + tl.cast(start, tl.int64) * token_stride
    offsets = token[:, None] * token_stride + (channel * BITS // 8)[None]
    codes = tl.load(first + offsets, mask=inside[:, None] & (channel[None] < DIM), other=0)
    if BITS == 4:
        codes = (codes >> (channel % 2 * 4)[None].to(tl.uint8)) & 15
    first = grid + row * grid_row + tl.cast(start, tl.int64) * grid_token
    if DIM <= GROUP:  # one scale per token
        scale = tl.load(first + token * grid_token, mask=inside, other=0.0)[:, None]
        offset = tl.load(first + token * grid_token + 1, mask=inside, other=0.0)[:, None]
    else:
        at = token[:, None] * grid_token + (channel // GROUP * 2)[None]
        scale = tl.load(first + at, mask=inside[:, None], other=0.0)
        offset = tl.load(first + at + 1, mask=inside[:, None], other=0.0)
    numbers = codes.to(tl.float32) * scale.to(tl.float32) + offset.to(tl.float32)
    if DIM != WIDTH:
        numbers = tl.where(channel[None] < DIM, numbers, 0.0)
    return numbers


@triton.jit
def _load_any(
    pointer, grid, row, row_stride, token_stride, grid_row, grid_token, start, length,
    DIM: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """The same for tokens stored either way; numbers come out as TYPE."""
    if BITS == 16:
        numbers = _load_tokens(pointer, row, row_stride, token_stride, start, length, DIM, WIDTH, COUNT)
    else:
        numbers = _load_codes(
            pointer, grid, row, row_stride, token_stride, grid_row, grid_token, start, length,
            DIM, WIDTH, COUNT, BITS,
        ).to(TYPE)  # fmt: skip
    return numbers


@triton.jit
def _load_bias(pointer, row, stride_row, stride_token, token, length):
    """[tokens] in base 2; −inf beyond the last token."""
    inside = token < length
    if pointer is None:
        return tl.where(inside, 0.0, float("-inf"))
    bias = tl.load(pointer + row * stride_row + token * stride_token, mask=inside, other=float("-inf"))
    return bias * LOG2_E


@triton.jit
def _product(a, b):
    """a @ b with float32 accumulation; float32 operands are not rounded to tf32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _forward_kernel(
    q_pointer, k_pointer, k_grid_pointer, v_pointer, v_grid_pointer, bias_pointer,
    before_pointer, out_pointer, lse_pointer,
    q_row, q_token, k_row, k_token, k_grid_row, k_grid_token,
    v_row, v_token, v_grid_row, v_grid_token, bias_row, bias_token,
    queries, keys, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    first_query = tl.program_id(0) * QUERIES
    m = first_query + tl.arange(0, QUERIES)
    q = _load_tokens(q_pointer, row, q_row, q_token, first_query, queries, DIM, WIDTH, QUERIES)
    # the output, the one carried over and lse lie without gaps: [rows, queries, DIM], [rows, queries]
    if before_pointer is None:
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        out = tl.zeros([QUERIES, WIDTH], tl.float32)
    else:
        top = tl.load(lse_pointer + row * queries + m, mask=m < queries, other=float("-inf")) * LOG2_E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        out = _load_tokens(before_pointer, row, queries * DIM, DIM, first_query, queries, DIM, WIDTH, QUERIES)

    for start in range(0, keys, KEYS):
        n = start + tl.arange(0, KEYS)
        k = _load_any(
            k_pointer, k_grid_pointer, row, k_row, k_token, k_grid_row, k_grid_token,
            start, keys, DIM, WIDTH, KEYS, BITS, q_pointer.dtype.element_ty,
        )  # fmt: skip
        bias = _load_bias(bias_pointer, row, bias_row, bias_token, n, keys)
        logits = _product(q, tl.trans(k)) * (scale * LOG2_E) + bias[None]
        new_top = tl.maximum(top, tl.max(logits, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − (−inf) would be NaN
        weights = tl.exp2(logits - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        v = _load_any(
            v_pointer, v_grid_pointer, row, v_row, v_token, v_grid_row, v_grid_token,
            start, keys, DIM, WIDTH, KEYS, BITS, q_pointer.dtype.element_ty,
        )  # fmt: skip
        out = out * shrink[:, None] + _product(weights.to(v.dtype), v)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top

    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    channel = tl.arange(0, WIDTH)
    out_offsets = tl.arange(0, QUERIES)[:, None] * DIM + channel[None]
    out_inside = (m[:, None] < queries) & (channel[None] < DIM)
    first_out = out_pointer + (row * queries + first_query) * DIM
    tl.store(first_out + out_offsets, out.to(out_pointer.dtype.element_ty), mask=out_inside)
    tl.store(lse_pointer + row * queries + m, (top + tl.log2(total)) / LOG2_E, mask=m < queries)


@triton.jit
def _mass_kernel(
    q_pointer, k_pointer, k_grid_pointer, bias_pointer, lse_pointer, mass_pointer,
    q_row, q_token, k_row, k_token, k_grid_row, k_grid_token, bias_row, bias_token, lse_row, lse_token,
    queries, keys, scale, factor,
    DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    first_key = tl.program_id(0) * KEYS
    n = first_key + tl.arange(0, KEYS)
    k = _load_any(
        k_pointer, k_grid_pointer, row, k_row, k_token, k_grid_row, k_grid_token,
        first_key, keys, DIM, WIDTH, KEYS, BITS, q_pointer.dtype.element_ty,
    )  # fmt: skip
    bias = _load_bias(bias_pointer, row, bias_row, bias_token, n, keys)
    # summed element by element and across lanes once at the end: no shuffle inside the loop
    sums = tl.zeros([KEYS, QUERIES], tl.float32)
    for start in range(0, queries, QUERIES):
        m = start + tl.arange(0, QUERIES)
        q = _load_tokens(q_pointer, row, q_row, q_token, start, queries, DIM, WIDTH, QUERIES)
        lse = tl.load(lse_pointer + row * lse_row + m * lse_token, mask=m < queries, other=float("-inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)  # such a query gives nothing
        logits = _product(k, tl.trans(q)) * (scale * LOG2_E)
        sums += tl.exp2(logits + (bias[:, None] - lse[None]))
    tl.store(mass_pointer + row * keys + n, tl.sum(sums, 1) * factor, mask=n < keys)
