"""Merging evicted tokens into voxel rows in Triton: one program per row, one launch per call.

A program has few lanes for many small steps, so what counts is how often they exchange numbers and wait for
memory. Cosines are taken of keys in pieces, means of rows (`vectors_triton.py`); tokens are read a block at a
time, values only of those that join or wait. Waiting tokens are not sorted: each finds its rank by counting
who comes before it, ties by age like the stable sort of the reference.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.launch_triton import check_reachable
from stac_core.kernels.vectors_triton import in_rows, number_of
from stac_core.kernels.voxel_merge import LIKE, MergeRules, RowState, RowTokens, check_merge
from stac_core.kernels.voxel_merge_steps_triton import (
    LEAST,
    aggregate,
    find_waiting,
    fold,
    join,
    lowest_score,
    rank_waiting,
    scores_waiting,
    waiting_in_rows,
)

BLOCK = 32  # waiting tokens that find their ranks together
TOKENS = 8  # merged together
WARPS = 1  # of one row
REGISTERS = 112  # of a thread: about the fewest without spilling on any GPU, so that most rows run at once


def voxel_merge(state: RowState, tokens: RowTokens, rules: MergeRules) -> tuple[RowState, Tensor]:
    """The contract of `voxel_merge.py`."""
    check_merge(state, tokens)
    check_reachable(LIKE, tokens.order)
    state = RowState(*(part.contiguous() for part in state))
    start, order, keys, values, score = (part.contiguous() for part in tokens)
    after = RowState(*(torch.empty_like(part) for part in state))
    rows, pivots, dim = state.pivot_keys.shape
    score_left = torch.empty_like(order, dtype=score.dtype)
    ranked = order.new_empty(len(order) + state.buffer_score.numel(), dtype=torch.int32)
    counts = torch.empty(rows, 5, dtype=torch.int32, device=order.device)
    if rows:
        with torch.cuda.device_of(order):  # Triton launches on the current device
            _merge_kernel[(rows,)](
                *state, *after, order, start, keys, values, score, score_left, ranked, counts,
                rules.threshold, rules.gate, rules.inertia or float("inf"),
                DIM=dim, WIDTH=triton.next_power_of_2(dim), PIVOTS=pivots,
                PIVOT_WIDTH=triton.next_power_of_2(pivots), BUFFER=state.buffer_score.shape[1],
                BUFFER_WIDTH=triton.next_power_of_2(state.buffer_score.shape[1]), BLOCK=BLOCK, TOKENS=TOKENS,
                num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
    return after, counts.sum(0)


@triton.jit
def _merge_kernel(
    pivot_keys, pivot_values, weight_in, score_sum, members_in, buffer_keys, buffer_values, buffer_score,
    new_pivot_keys, new_pivot_values, new_weight, new_score_sum, new_members,
    new_buffer_keys, new_buffer_values, new_buffer_score,
    order, start, keys, values, score, score_left, ranked, counts,
    threshold, gate, heaviest,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PIVOTS: tl.constexpr, PIVOT_WIDTH: tl.constexpr,
    BUFFER: tl.constexpr, BUFFER_WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program serves one row, in the steps of `voxel_merge.py`."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(start + row)
    count = (tl.load(start + row + 1) - first).to(tl.int32)
    tokens = (order + first, keys, values)
    score_left += first
    ranked += first + row * BUFFER
    pivot_keys += row * PIVOTS * DIM
    pivot_values += row * PIVOTS * DIM
    members_in += row * PIVOTS
    buffer = (buffer_keys + row * BUFFER * DIM, buffer_values + row * BUFFER * DIM)
    buffer_score += row * BUFFER
    pivot = tl.arange(0, PIVOT_WIDTH)
    real = pivot < PIVOTS
    weight = tl.load(weight_in + row * PIVOTS + pivot, mask=real, other=0.0)
    scores = tl.load(score_sum + row * PIVOTS + pivot, mask=real, other=0.0)
    members = tl.load(members_in + pivot, mask=real, other=0.0)

    # 1. Join the most similar pivot.
    sum_keys, sum_values, added, scores, members, merged = join(
        tokens, count, score, score_left, pivot_keys, members_in, scores, members, threshold,
        DIM, WIDTH, PIVOTS, TOKENS,
    )  # fmt: skip
    tl.debug_barrier()  # the scores left are read by other threads from here on
    weight += added
    mean_keys = in_rows(pivot_keys, pivot, real, DIM, WIDTH)
    mean_values = in_rows(pivot_values, pivot, real, DIM, WIDTH)
    shrink = (1.0 / tl.maximum(weight, LEAST))[:, None]
    mean_keys += (sum_keys - added[:, None] * mean_keys) * shrink
    mean_values += (sum_values - added[:, None] * mean_values) * shrink
    new_pivot_keys += row * PIVOTS * DIM
    new_pivot_values += row * PIVOTS * DIM
    channel = tl.arange(0, WIDTH)
    at, inside = pivot[:, None] * DIM + channel[None], real[:, None] & (channel[None] < DIM)
    tl.store(new_pivot_keys + at, mean_keys, mask=inside)
    tl.store(new_pivot_values + at, mean_values, mask=inside)

    # 2. Drop what scores too little beside what was merged here; rank what waits.
    lowest = lowest_score(scores, members, gate)
    waiting, passed = rank_waiting(ranked, buffer_score, score_left, count, lowest, BUFFER, BLOCK)
    tl.debug_barrier()  # other threads read the ranks, and write into the pivots

    # 3. Full buffers become pivots, the best scored first.
    slot = tl.arange(0, BUFFER_WIDTH)
    remerged = 0
    for turn in range(0, waiting // BUFFER):
        place = tl.load(ranked + turn * BUFFER + slot, mask=slot < BUFFER, other=-1)
        seed = tl.load(ranked + turn * BUFFER)
        new_key, new_value, sum_weight = aggregate(tokens, buffer, place, seed, slot, DIM, WIDTH, BUFFER)
        taken_scores = scores_waiting(buffer_score, score_left, place, count, lowest, BUFFER)
        sum_score = number_of(taken_scores, slot < BUFFER)

        # 4. A full row folds its lightest pivot into that one's nearest neighbour.
        free = real & (members == 0)
        slot_taken = tl.argmax(free.to(tl.int32), 0)
        if tl.sum(free.to(tl.int32), 0) == 0:
            tl.debug_barrier()  # the pivots have been written by other threads
            slot_taken = tl.argmin(tl.where(real, weight, float("inf")), 0)
            weight, scores, members = fold(
                new_pivot_keys, new_pivot_values, weight, scores, members, slot_taken, DIM, WIDTH, PIVOTS
            )
            remerged += 1
        tl.store(new_pivot_keys + slot_taken * DIM + channel, new_key, mask=channel < DIM)
        tl.store(new_pivot_values + slot_taken * DIM + channel, new_value, mask=channel < DIM)
        taken = pivot == slot_taken
        weight = tl.where(taken, sum_weight, weight)
        scores = tl.where(taken, sum_score, scores)
        members = tl.where(taken, 1.0 * BUFFER, members)
    tl.store(new_weight + row * PIVOTS + pivot, tl.minimum(weight, heaviest), mask=real)
    tl.store(new_score_sum + row * PIVOTS + pivot, scores, mask=real)
    tl.store(new_members + row * PIVOTS + pivot, members, mask=real)

    # What is left waits on; unused slots are cleared.
    full = waiting // BUFFER
    place = tl.load(ranked + full * BUFFER + slot, mask=slot < waiting % BUFFER, other=-1)
    found = find_waiting(tokens[0], place, BUFFER)
    at, inside = slot[:, None] * DIM + channel[None], (slot < BUFFER)[:, None] & (channel[None] < DIM)
    key = waiting_in_rows(buffer[0], keys, found, DIM, WIDTH)
    tl.store(new_buffer_keys + row * BUFFER * DIM + at, key, mask=inside)
    value = waiting_in_rows(buffer[1], values, found, DIM, WIDTH)
    tl.store(new_buffer_values + row * BUFFER * DIM + at, value, mask=inside)
    left_scores = scores_waiting(buffer_score, score_left, place, count, lowest, BUFFER)
    tl.store(new_buffer_score + row * BUFFER + slot, left_scores, mask=slot < BUFFER)

    counts += row * 5
    tl.store(counts, merged)
    tl.store(counts + 1, passed)
    tl.store(counts + 2, count - merged - passed)
    tl.store(counts + 3, full)
    tl.store(counts + 4, remerged)
