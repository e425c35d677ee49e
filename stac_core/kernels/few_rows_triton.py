"""A linear map of few rows in Triton: a program serves all rows and reads some rows of the weight, once.

Nothing but the weight takes time. Its next chunk is on its way while one is multiplied, and the first one
while the norm is computed, which every program does for itself; without a barrier behind these loads, which
nothing else needs, the compiler would move them to where they are used. A thread adds up what it has
multiplied; sums of different threads meet at the end.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.few_rows import Residual, check_few_rows
from stac_core.kernels.launch_triton import check_reachable
from stac_core.kernels.to_heads import Norm

OUTPUTS, CHUNK, WARPS = 4, 512, 4  # rows of the weight that a program reads, and numbers of each at a time


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Residual | None = None,
) -> Tensor:
    """The contract of `few_rows.py`."""
    check_few_rows(x, weight, bias, norm, residual)
    check_reachable("x", x)
    outputs, width = weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    rows = x.numel() // width
    if outputs:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            _few_rows_kernel[(triton.cdiv(outputs, OUTPUTS),)](
                x, weight, bias, *(norm or (None, None, 0.0)), *(residual or (None, None)), out,
                rows, outputs, width, gelu, triton.next_power_of_2(rows), OUTPUTS, CHUNK, num_warps=WARPS,
            )  # fmt: skip
    return out


@triton.jit
def _load(rows, start, WIDTH: tl.constexpr, CHUNK: tl.constexpr, POLICY: tl.constexpr):
    """A chunk of all rows, which begin at `rows` [·, ·, 1]; zero where they have ended."""
    place = start + tl.arange(0, CHUNK)[None, None]
    if WIDTH % CHUNK == 0:
        x = tl.load(rows + place, eviction_policy=POLICY)
    else:
        x = tl.load(rows + place, mask=place < WIDTH, other=0.0, eviction_policy=POLICY)
    return x


@triton.jit
def _sums(x):
    """Of four numbers each of a chunk, which one thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 4, 4]), 3)


@triton.jit
def _mean(sums, WIDTH: tl.constexpr):
    """Of all numbers of a row: [ROWS, 1, 1]."""
    return tl.sum(sums, 2)[:, :, None] / WIDTH


@triton.jit
def _mean_and_scale(x, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """What a layer norm takes from every row, and multiplies it with: [ROWS, 1, 1].

    Differences to a mean sum up to what rounding took from it: beside a large one not little.
    """
    total = tl.zeros([ROWS, 1, CHUNK // 4], tl.float32)
    left, squares = total, total
    for start in range(0, WIDTH, CHUNK):
        total += _sums(_load(x, start, WIDTH, CHUNK, "evict_last"))
    mean = _mean(total, WIDTH)
    for start in range(0, WIDTH, CHUNK):
        away = _load(x, start, WIDTH, CHUNK, "evict_last") - mean
        if WIDTH % CHUNK != 0:
            away = tl.where(start + tl.arange(0, CHUNK)[None, None] < WIDTH, away, 0.0)
        left += _sums(away)
        squares += _sums(away * away)
    return mean + _mean(left, WIDTH), tl.rsqrt(_mean(squares, WIDTH) + eps)


@triton.jit
def _multiplied(
    weight, x, start, norm_weight, norm_bias, mean, scale, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    """Sums of four products each of one chunk: [ROWS, OUTPUTS, CHUNK / 4]."""
    x = _load(x, start, WIDTH, CHUNK, "evict_last")
    if norm_weight is not None:
        x = (x - mean) * scale * _load(norm_weight, start, WIDTH, CHUNK, "evict_last")
        x += _load(norm_bias, start, WIDTH, CHUNK, "evict_last")
    return _sums(weight * x)


@triton.jit(do_not_specialize=["rows", "outputs"])
def _few_rows_kernel(
    x, weight, bias, norm_weight, norm_bias, eps, residual, gamma, out, rows, outputs,
    WIDTH: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = (WIDTH - 1) // CHUNK * CHUNK  # chunk of a row
    row, n = tl.arange(0, ROWS)[:, None], (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None]
    # past the last row comes the last one again
    x += (tl.minimum(row, rows - 1) * WIDTH)[:, :, None]
    weight += (tl.minimum(n, outputs - 1).to(tl.int64) * WIDTH)[:, :, None]

    known, at = n < outputs, row * outputs + n
    inside = (row < rows) & known
    addend = tl.load(bias + n, mask=known, other=0.0)
    if residual is not None:
        before = tl.load(residual + at, mask=inside, other=0.0)
        factor = tl.load(gamma + n, mask=known, other=0.0)

    chunk = _load(weight, 0, WIDTH, CHUNK, "evict_first")
    tl.debug_barrier()
    mean, scale = 0.0, 1.0
    if norm_weight is not None:
        mean, scale = _mean_and_scale(x, eps, ROWS, WIDTH, CHUNK)
    sums = tl.zeros([ROWS, OUTPUTS, CHUNK // 4], tl.float32)
    for start in tl.range(0, LAST, CHUNK, loop_unroll_factor=2):
        following = _load(weight, start + CHUNK, WIDTH, CHUNK, "evict_first")
        tl.debug_barrier()
        sums += _multiplied(chunk, x, start, norm_weight, norm_bias, mean, scale, WIDTH, CHUNK)
        chunk = following
    sums += _multiplied(chunk, x, LAST, norm_weight, norm_bias, mean, scale, WIDTH, CHUNK)

    # every thread has all sums: gathered, they are spread over the threads for what is left to do
    own = tl.broadcast_to(tl.arange(0, OUTPUTS)[None], [ROWS, OUTPUTS])
    y = tl.gather(tl.sum(sums, 2), own, 1) + addend
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if residual is not None:
        y = before + factor * y
    tl.store(out + at, y, mask=inside)
