"""Queries, keys and values of all heads in Triton: one launch, every number read once and written once.

A row is one head of one token. Its numbers come as first and second of the pairs that rotate, each
[axis, D / 4]: so norm and rotation need no number of another thread.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.launch_triton import check_reachable
from stac_core.kernels.to_heads import Norm, check_to_heads

NUMBERS, WARPS = 2048, 2  # of queries in one program, and as many keys and values


def to_heads(
    qkv: Tensor, heads: int, q_norm: Norm, k_norm: Norm, rotary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `to_heads.py`."""
    check_to_heads(qkv, heads, q_norm, k_norm, rotary)
    check_reachable("qkv", qkv)
    return _to_heads(qkv, heads, q_norm, k_norm, rotary, rows_for(qkv.shape[-1] // (3 * heads)), WARPS)


def rows_for(dim: int) -> int:
    """That one program takes."""
    return max(1, NUMBERS // triton.next_power_of_2(dim))


def _to_heads(
    qkv: Tensor, heads: int, q_norm: Norm, k_norm: Norm, rotary: Tensor, rows: int, warps: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    dim = width // (3 * heads)
    out = qkv.new_empty(3, batch, heads, tokens, dim)
    count = batch * tokens * heads
    if count:
        with torch.cuda.device_of(qkv):  # Triton launches on the current device
            _to_heads_kernel[(triton.cdiv(count, rows),)](
                qkv, *q_norm, *k_norm, rotary, out, tokens, count,
                heads, dim // 4, triton.next_power_of_2(dim // 4), rows, num_warps=warps,
            )  # fmt: skip
    q, k, v = out
    return q, k, v


@triton.jit
def _load_pairs(pointer, at, inside, QUARTER: tl.constexpr):
    """First and second of every pair that rotates, as float32; zero where not `inside`."""
    first = tl.load(pointer + at, mask=inside, other=0.0)
    second = tl.load(pointer + at + QUARTER, mask=inside, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _sum(x):
    """Over all channels of a row."""
    return tl.sum(tl.sum(x, 2), 1)[:, None, None]


@triton.jit
def _normed(x, channel, known, weight, bias, eps, QUARTER: tl.constexpr):
    """Layer norm over the channels of every row."""
    first, second = x
    mean = _sum(first + second) / (4 * QUARTER)
    first = tl.where(known, first - mean, 0.0)
    second = tl.where(known, second - mean, 0.0)
    scale = tl.rsqrt(_sum(first * first + second * second) / (4 * QUARTER) + eps)
    first_weight, second_weight = _load_pairs(weight, channel, known, QUARTER)
    first_bias, second_bias = _load_pairs(bias, channel, known, QUARTER)
    return first * scale * first_weight + first_bias, second * scale * second_weight + second_bias


@triton.jit
def _rotated(x, cosines, sines):
    """As `rotate` in network/rope.py."""
    first, second = x
    return first * cosines[0] - second * sines[0], second * cosines[1] + first * sines[1]


@triton.jit
def _store_pairs(pointer, at, x, inside, QUARTER: tl.constexpr):
    tl.store(pointer + at, x[0].to(pointer.dtype.element_ty), mask=inside)
    tl.store(pointer + at + QUARTER, x[1].to(pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "count"])
def _to_heads_kernel(
    qkv, q_weight, q_bias, q_eps, k_weight, k_bias, k_eps, rotary, out, tokens, count,
    HEADS: tl.constexpr, QUARTER: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    DIM: tl.constexpr = 4 * QUARTER
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place, head = row // HEADS, row % HEADS  # of the token among all; of the row
    batch, token = place // tokens, place % tokens
    axis, i = tl.arange(0, 2)[None, :, None], tl.arange(0, WIDTH)[None, None]
    channel = axis * (2 * QUARTER) + i
    known = i < QUARTER
    inside = (row < count)[:, None, None]
    if WIDTH != QUARTER:
        inside = inside & known
    source = (place.to(tl.int64) * (3 * HEADS * DIM) + head * DIM)[:, None, None] + channel
    target = (((batch * HEADS + head).to(tl.int64) * tokens + token) * DIM)[:, None, None] + channel
    turn = (token * DIM)[:, None, None] + channel
    all_rows = tl.cast(count, tl.int64) * DIM

    cosines = _load_pairs(rotary, turn, inside, QUARTER)
    sines = _load_pairs(rotary + tl.cast(tokens, tl.int64) * DIM, turn, inside, QUARTER)
    q = _load_pairs(qkv, source, inside, QUARTER)
    k = _load_pairs(qkv + HEADS * DIM, source, inside, QUARTER)
    v = _load_pairs(qkv + 2 * HEADS * DIM, source, inside, QUARTER)
    q = _rotated(_normed(q, channel, known, q_weight, q_bias, q_eps, QUARTER), cosines, sines)
    k = _rotated(_normed(k, channel, known, k_weight, k_bias, k_eps, QUARTER), cosines, sines)
    _store_pairs(out, target, q, inside, QUARTER)
    _store_pairs(out + all_rows, target, k, inside, QUARTER)
    _store_pairs(out + 2 * all_rows, target, v, inside, QUARTER)
