"""A softmax in Triton, step by step over blocks of keys, shifted by the largest logit or not; all to base 2.

A weight that is the exponential of its logit as it is waits for no other. Where queries and keys are normed,
float32 holds them all; where it does not, a block of queries starts again with the running softmax of
FlashAttention-2 (arXiv 2307.08691), with which other types begin.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

# Sums of weights may grow so far without a shift, which leaves room for those of values, and shrink as far.
MOST_WEIGHT = tl.constexpr(2.0**100)
# Of a step of a block that starts again, for which few registers are left.
KEYS_AGAIN, STAGES_AGAIN = tl.constexpr(16), tl.constexpr(2)


@functools.cache
def shifts(dtype: torch.dtype, dim: int) -> bool:
    """Whether weights are shifted from the start: float16 has no range, and wide heads leave no registers for
    two ways."""
    return dtype != torch.bfloat16 or dim > 64


@triton.jit
def new_sums(QUERIES: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr):
    """Before the first step: largest logit, sum of weights, weighted sum of values."""
    top = tl.full([QUERIES], float("-inf") if SHIFTED else 0.0, tl.float32)
    return top, tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES, WIDTH], tl.float32)


@triton.jit
def weigh(logits, top, total, out, SHIFTED: tl.constexpr):
    """The weights of more keys [QUERIES, KEYS], and the sums so far, to which their values are to be added.

    Weights are SHIFTED by the largest logit, which then weighs 1. Else they are cut to what bfloat16 holds of
    them, up to 2⁻⁸ less, and summed as they multiply values: one key alone gives its value as it is.
    """
    if SHIFTED:
        new_top = tl.maximum(top, tl.max(logits, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # −inf − (−inf) would be NaN
        shrink = tl.exp2(top - safe_top)
        top, total, out = new_top, total * shrink, out * shrink[:, None]
        logits -= safe_top[:, None]
    weights = tl.exp2(logits)
    if not SHIFTED:
        weights = (weights.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return weights, top, total + tl.sum(weights, 1), out


@triton.jit
def all_held(total):
    """Whether float32 has held all sums of weights that were not shifted."""
    held = (total >= 1 / MOST_WEIGHT) & (total <= MOST_WEIGHT)  # NaN is not
    return tl.min(held.to(tl.int32), 0) > 0
