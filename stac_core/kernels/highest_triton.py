"""Finding the highest scores in Triton: one launch, one program per lane, no sort.

A program counts how many scores are at least as high as a threshold, which it finds bit by bit; then it
writes the places in order, each where the counts before it say.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.highest import Highest, check_highest
from stac_core.kernels.launch_triton import check_reachable

KEPT, BLOCK, WARPS = 8192, 1024, 8  # scores in registers from first to last, scores read again at a time
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all bits of a number but its sign
NAN = tl.constexpr(0x7FC00000)
ABSENT = tl.constexpr(-0x80000000)  # below the rank of every score


def highest(score: Tensor, budget: int, rest: bool = False) -> Highest:
    """The contract of `highest.py`."""
    check_highest(score, budget)
    check_reachable("score", score)
    lanes, n = score.shape
    budget = min(budget, n)
    places = torch.empty(lanes, budget, dtype=torch.int64, device=score.device)
    others = places.new_empty(lanes, n - budget) if rest else None
    if places.numel() or (others is not None and others.numel()):
        with torch.cuda.device_of(score):  # Triton launches on the current device
            _highest_kernel[(lanes,)](
                score.contiguous(), places, others, n, budget, KEPT, BLOCK, num_warps=WARPS
            )  # fmt: skip
    return Highest(places, others)


@triton.jit
def _load_ranks(scores, start, n, COUNT: tl.constexpr):
    """Scores as integers in the same order, equal ones equal; ABSENT beyond the last one."""
    place = start + tl.arange(0, COUNT)
    score = tl.load(scores + place, mask=place < n, other=0.0)
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, -(bits & MAGNITUDE), bits)
    rank = tl.where(score == score, rank, NAN)
    return tl.where(place < n, rank, ABSENT)


@triton.jit
def _count(first, scores, n, least, BLOCK: tl.constexpr):
    """How many ranks of a row are at least so high; `first`: those in registers."""
    count = tl.sum((first >= least).to(tl.int32), 0)
    for start in range(first.shape[0], n, BLOCK):
        count += tl.sum((_load_ranks(scores, start, n, BLOCK) >= least).to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=["scores", "n", "budget"])
def _highest_kernel(scores, places, rest, n, budget, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64)
    scores += lane * n
    places += lane * budget
    first = _load_ranks(scores, 0, n, KEPT)
    # the highest threshold that at least `budget` ranks reach, its sign first; how many are above it
    count = _count(first, scores, n, 0, BLOCK)
    threshold = tl.where(count >= budget, 0, ABSENT)
    above = tl.where(count >= budget, 0, count)
    for i in range(31):
        higher = threshold + (1 << (30 - i))
        count = _count(first, scores, n, higher, BLOCK)
        threshold = tl.where(count >= budget, higher, threshold)
        above = tl.where(count >= budget, above, count)
    ties = budget - above  # that are chosen
    above_before, ties_before = 0, 0  # in the blocks so far
    for start in range(0, n, BLOCK):
        ranks = _load_ranks(scores, start, n, BLOCK)
        is_above, is_tie = (ranks > threshold).to(tl.int32), (ranks == threshold).to(tl.int32)
        tie = ties_before + tl.cumsum(is_tie, 0)
        chosen_so_far = above_before + tl.cumsum(is_above, 0) + tl.minimum(tie, ties)
        chosen = (is_above == 1) | ((is_tie == 1) & (tie <= ties))
        place = start + tl.arange(0, BLOCK)
        tl.store(places + (chosen_so_far - 1), place.to(tl.int64), mask=chosen)
        if rest is not None:
            others = rest + lane * (n - budget)
            tl.store(others + (place - chosen_so_far), place.to(tl.int64), mask=(place < n) & ~chosen)
        above_before += tl.sum(is_above, 0)
        ties_before += tl.sum(is_tie, 0)
