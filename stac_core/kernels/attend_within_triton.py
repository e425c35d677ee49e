"""Attention of tokens to each other in Triton: a program serves one block of queries of one head.

`attend_triton.py` without segments, bias, mass and what they cost.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.attend_within import check_attend_within
from stac_core.kernels.launch_triton import Tile, check_queries, product, tile_width
from stac_core.kernels.segments_triton import LOG2_E, load_numbers
from stac_core.kernels.softmax_triton import KEYS_AGAIN, all_held, new_sums, shifts, weigh


def attend_within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The contract of `attend_within.py` for head widths up to 128."""
    check_attend_within(q, k, v)
    check_queries(q)
    return _attend_within(q, k, v, tile_for(q.shape[-1]))


def tile_for(dim: int) -> Tile:
    """Small blocks: a frame has few queries, which are to keep all multiprocessors busy.

    Wide heads would need more registers than there are.
    """
    return Tile(64, 64, 4, 3) if dim <= 64 else Tile(128, 32, 8, 3)


def _attend_within(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> Tensor:
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim)
    if out.numel():
        with torch.cuda.device_of(q):  # Triton launches on the current device
            _attend_within_kernel[(triton.cdiv(tokens, tile.queries), heads, batch)](
                q, k, v, out, q.stride()[:3], k.stride()[:3], v.stride()[:3], tokens, 1 / math.sqrt(dim),
                heads, dim, tile_width(dim), tile.queries, tile.keys, shifts(q.dtype, dim),
                num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
            )  # fmt: skip
    return out.transpose(1, 2)


@triton.jit
def _of_head(pointer, strides):
    """Where the tokens begin that this program reads."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    return pointer + batch * strides[0] + head * strides[1]


@triton.jit
def _sweep_block(
    q, top, total, out, k_pointer, k_token, v_pointer, v_token, start, tokens, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, WHOLE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One step of the softmax, as in `attend_triton.py`; scale: to base 2."""
    k = load_numbers(k_pointer, 0, 0, k_token, start, tokens, DIM, WIDTH, KEYS, WHOLE)
    logits = product(q, tl.trans(k)) * scale
    if not WHOLE:
        logits = tl.where((start + tl.arange(0, KEYS) < tokens)[None], logits, float("-inf"))
    weights, top, total, out = weigh(logits, top, total, out, SHIFTED)
    v = load_numbers(v_pointer, 0, 0, v_token, start, tokens, DIM, WIDTH, KEYS, WHOLE)
    return top, total, product(weights.to(v.dtype), v, out)


@triton.jit
def _sweep(
    q, k_pointer, k_token, v_pointer, v_token, tokens, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Sum of weights and weighted sum of values, over all tokens."""
    top, total, out = new_sums(q.shape[0], WIDTH, SHIFTED)
    if SHIFTED:
        for start in range(0, tokens, KEYS):
            top, total, out = _sweep_block(
                q, top, total, out, k_pointer, k_token, v_pointer, v_token, start, tokens, scale,
                DIM, WIDTH, KEYS, False, True,
            )  # fmt: skip
    else:
        whole = tokens // KEYS * KEYS
        for start in range(0, whole, KEYS):
            top, total, out = _sweep_block(
                q, top, total, out, k_pointer, k_token, v_pointer, v_token, start, tokens, scale,
                DIM, WIDTH, KEYS, True, False,
            )  # fmt: skip
        if whole < tokens:
            top, total, out = _sweep_block(
                q, top, total, out, k_pointer, k_token, v_pointer, v_token, whole, tokens, scale,
                DIM, WIDTH, KEYS, False, False,
            )  # fmt: skip
    return total, out


@triton.jit(do_not_specialize=["tokens"])
def _attend_within_kernel(
    q_pointer, k_pointer, v_pointer, out_pointer, q_strides, k_strides, v_strides, tokens, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    first_query = tl.program_id(0) * QUERIES
    keys, values = _of_head(k_pointer, k_strides), _of_head(v_pointer, v_strides)
    queries = _of_head(q_pointer, q_strides)
    q = load_numbers(queries, 0, 0, q_strides[2], first_query, tokens, DIM, WIDTH, QUERIES)
    total, out = _sweep(
        q, keys, k_strides[2], values, v_strides[2], tokens, scale * LOG2_E,
        DIM, WIDTH, KEYS, SHIFTED,
    )  # fmt: skip
    if not SHIFTED:  # noqa: SIM102 (known to the compiler, and the next one is not)
        if not all_held(total):
            total, out = _sweep(
                q, keys, k_strides[2], values, v_strides[2], tokens, scale * LOG2_E,
                DIM, WIDTH, KEYS_AGAIN, True,
            )  # fmt: skip
    out /= total[:, None]
    m, channel = first_query + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    row = tl.program_id(2).to(tl.int64) * tokens + m
    at = (row * HEADS + tl.program_id(1))[:, None] * DIM + channel[None]
    inside = (m < tokens)[:, None] & (channel < DIM)[None]
    tl.store(out_pointer + at, out.to(out_pointer.dtype.element_ty), mask=inside)
