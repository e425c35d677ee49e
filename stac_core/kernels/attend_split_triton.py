"""Attention with the keys split among several programs (flash decoding).

One frame has too few blocks of queries for a large GPU: some multiprocessors work twice, most of them once.
There each program sweeps only a part of the keys and leaves its running softmax; a second, small kernel
combines them. Parts are whole blocks of keys, one segment after the other, as even as that allows.
Sources: FlashAttention-2 (arXiv 2307.08691) for the running softmax, Flash-Decoding (Dao, Haziza, Massa and
Sizov 2023) for the parts.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.launch_triton import blocks_of
from stac_core.kernels.segments_triton import LOG2_E, length_of

MOST_PARTS = 8
# Costs, in the time that a program needs for one block of keys; estimated. On an H200 the number of parts
# that they choose was within 3 % of the best one tried, for frames one by one and by four:
START = 4  # of a program: read the queries, fill the pipeline, write what is read once more
COMBINE = 12  # of the second launch
FILLED = 1.5  # programs in terms of those that run at once, from which on nothing is split
ROWS, WARPS = 8, 4  # of a program that combines


@functools.lru_cache(maxsize=1024)  # a stream asks the same in every layer
def choose_parts(query_blocks: int, key_blocks: int, at_once: int) -> int:
    """Among how many programs the keys of each block of queries are split; at_once: so many can run at once.

    They run in rounds, each as long as a part has blocks of keys. Of equally good numbers the smallest.
    """
    if query_blocks >= FILLED * at_once:
        return 1

    def cost(parts: int) -> int:
        rounds = blocks_of(query_blocks * parts, at_once)
        return rounds * (blocks_of(key_blocks, parts) + START) + (COMBINE if parts > 1 else 0)

    return min(range(1, min(MOST_PARTS, key_blocks) + 1), key=cost)


@triton.jit
def count_blocks(groups, KEYS: tl.constexpr, SIZES: tl.constexpr, LISTED: tl.constexpr):
    """Blocks of keys in all segments."""
    blocks = 0
    for g in tl.static_range(len(SIZES)):
        for i in range(0, SIZES[g]):
            blocks += tl.cdiv(length_of(groups, g, i, SIZES, LISTED), KEYS)
    return blocks


@triton.jit
def stretch(first, stop, length, KEYS: tl.constexpr):
    """Blocks `first` to before `stop` of a segment: the token at which they begin, how many tokens they are.

    Counted from the segment's own first block; those before it and behind its last one are none.
    """
    begin = tl.maximum(first, 0) * KEYS
    return begin, tl.maximum(tl.minimum(stop * KEYS, length) - begin, 0)


def new_parts(parts: int, q: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running softmax of each part goes, in float32.

    Weighted sums of values [parts, rows, M, D]; largest logits and sums of weights [2, parts, rows, M].
    """
    outs = torch.empty(parts, *q.shape, dtype=torch.float32, device=q.device)
    return outs, torch.empty(2, parts, *q.shape[:2], dtype=torch.float32, device=q.device)


def combine(outs: Tensor, sums: Tensor, out: Tensor, lse: Tensor) -> None:
    """Parts as in `new_parts` into out [rows, M, D], of any strides, and lse [rows, M]."""
    parts, dim, count = outs.shape[0], outs.shape[-1], lse.numel()
    _combine_kernel[(triton.cdiv(count, ROWS),)](
        outs, sums, out, lse, count, lse.shape[1], *out.stride()[:2], parts,
        dim, triton.next_power_of_2(dim), ROWS, MOST_PARTS, num_warps=WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "queries", "parts"])
def _combine_kernel(
    outs_pointer, sums_pointer, out_pointer, lse_pointer, count, queries, out_row, out_token, parts,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The running softmax goes on over the parts, in their order. Of `count` queries a program serves ROWS.

    Parts that do not exist are masked, so that all loads can be under way together.
    """
    m, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside, channels = m < count, channel[None] < DIM
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range(MOST):
        at = sums_pointer + tl.cast(part, tl.int64) * count + m
        top = tl.maximum(top, tl.load(at, mask=inside & (part < parts), other=float("-inf")))
    safe_top = tl.where(top == float("-inf"), 0.0, top)  # −inf − (−inf) would be NaN
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    for part in tl.static_range(MOST):
        row, exists = tl.cast(part, tl.int64) * count + m, inside & (part < parts)
        weight = tl.exp2(tl.load(sums_pointer + row, mask=exists, other=float("-inf")) - safe_top)
        at = sums_pointer + tl.cast(parts, tl.int64) * count + row
        total += weight * tl.load(at, mask=exists, other=0.0)
        at = outs_pointer + row[:, None] * DIM + channel[None]
        out += weight[:, None] * tl.load(at, mask=exists[:, None] & channels, other=0.0)
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    first = (m // queries).to(tl.int64) * out_row + (m % queries).to(tl.int64) * out_token
    at = out_pointer + first[:, None] + channel[None]
    tl.store(at, out.to(out_pointer.dtype.element_ty), mask=inside[:, None] & channels)
    tl.store(lse_pointer + m, (top + tl.log2(total)) / LOG2_E, mask=inside)
