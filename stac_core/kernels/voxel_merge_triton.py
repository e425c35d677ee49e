"""Merging evicted tokens into voxel rows in Triton: one program per row, one launch per call.

The program keeps the pivots of its row in registers. Waiting tokens are never sorted: each step looks
for the best score behind the one taken last, which for the few tokens of a row is cheaper, and breaks
ties like the stable sort of the reference.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stac_core.kernels.attend_triton import check_reachable, require
from stac_core.kernels.voxel_merge import LEAST_SCORE, MergeCounts, MergeRules, RowState, RowTokens
from stac_core.kernels.voxel_merge_rows import group_by_row

__all__ = ["require", "voxel_merge"]

LEAST = tl.constexpr(LEAST_SCORE)
SMALLEST_NORM = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
BLOCK = 32  # scores looked at together
WARPS = 1  # of one row
REGISTERS = 128  # of a thread; left alone, the assembler would rather spill than give each so many


def voxel_merge(state: RowState, tokens: RowTokens, rules: MergeRules) -> tuple[RowState, MergeCounts]:
    """The contract of `voxel_merge.py`."""
    state, tokens, order, start = group_by_row(state, tokens)
    check_reachable("tokens.row", tokens.row)
    after = RowState(*(torch.empty_like(part) for part in state))
    rows, pivots, dim = state.pivot_keys.shape
    score_left = torch.empty_like(tokens.score)
    counts = torch.empty(rows, 5, dtype=torch.int32, device=order.device)
    if rows:
        with torch.cuda.device_of(order):  # Triton launches on the current device
            _merge_kernel[(rows,)](
                *state, *after, order, start, tokens.keys, tokens.values, tokens.score, score_left, counts,
                rules.threshold, rules.gate, rules.inertia or float("inf"),
                DIM=dim, WIDTH=triton.next_power_of_2(dim), PIVOTS=pivots,
                PIVOT_WIDTH=triton.next_power_of_2(pivots), BUFFER=state.buffer_score.shape[1],
                BUFFER_WIDTH=triton.next_power_of_2(state.buffer_score.shape[1]), BLOCK=BLOCK,
                num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
    return after, MergeCounts(*counts.sum(0).tolist())


@triton.jit
def _unit(x):
    """[..., WIDTH] → of length 1."""
    length = tl.sqrt(tl.sum(x * x, -1, keep_dims=True))
    return x / tl.maximum(length, SMALLEST_NORM)


@triton.jit
def _best_after(scores, positions, best, position, last_score, last_position):
    """The best score behind the one taken last, ties by position; the given one unless it is beaten."""
    behind = (scores < last_score) | ((scores == last_score) & (positions > last_position))
    scores = tl.where(behind, scores, float("-inf"))
    found = tl.max(scores, 0)
    place = tl.min(tl.where((scores == found) & behind, positions, 2147483647), 0)
    return tl.maximum(best, found), tl.where(found > best, place, position)


@triton.jit
def _take_next(
    buffer_score, score_left, row, first, last, lowest, last_score, last_position,
    BUFFER: tl.constexpr, BUFFER_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score and position of the next waiting token; buffered ones come first, then the row's own."""
    slot = tl.arange(0, BUFFER_WIDTH)
    scores = tl.load(buffer_score + row * BUFFER + slot, mask=slot < BUFFER, other=float("-inf"))
    nothing = tl.full([], float("-inf"), tl.float32)
    best, position = _best_after(scores, slot, nothing, last_position, last_score, last_position)
    for begin in range(first, last, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        fresh = tl.load(score_left + i, mask=i < last, other=float("-inf"))
        fresh = tl.where(fresh > lowest, fresh, float("-inf"))
        best, position = _best_after(
            fresh, (i - first + BUFFER).to(tl.int32), best, position, last_score, last_position
        )
    return best, position


@triton.jit
def _load_waiting(
    buffered, fresh, order, row, first, position, DIM: tl.constexpr, WIDTH: tl.constexpr, BUFFER: tl.constexpr
):
    """[WIDTH] key or value of the waiting token at `position`."""
    channel = tl.arange(0, WIDTH)
    place = tl.minimum(position, BUFFER - 1)
    old = buffered + (row * BUFFER + place) * DIM + channel
    old = tl.load(old, mask=channel < tl.where(position < BUFFER, DIM, 0), other=0.0)
    token = tl.load(order + first + position - BUFFER, mask=position >= BUFFER, other=0)
    new = fresh + token * DIM + channel
    new = tl.load(new, mask=channel < tl.where(position < BUFFER, 0, DIM), other=0.0)
    return old + new


@triton.jit
def _merge_kernel(
    pivot_keys, pivot_values, weight_in, score_sum, members_in, buffer_keys, buffer_values, buffer_score,
    new_pivot_keys, new_pivot_values, new_weight, new_score_sum, new_members,
    new_buffer_keys, new_buffer_values, new_buffer_score,
    order, start, keys, values, score, score_left, counts,
    threshold, gate, heaviest,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PIVOTS: tl.constexpr, PIVOT_WIDTH: tl.constexpr,
    BUFFER: tl.constexpr, BUFFER_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(start + row)
    last = tl.load(start + row + 1)
    channel = tl.arange(0, WIDTH)
    pivot = tl.arange(0, PIVOT_WIDTH)
    real = pivot < PIVOTS
    at = (row * PIVOTS + pivot[:, None]) * DIM + channel[None]
    inside = real[:, None] & (channel[None] < DIM)
    mean_keys = tl.load(pivot_keys + at, mask=inside, other=0.0)
    mean_values = tl.load(pivot_values + at, mask=inside, other=0.0)
    weight = tl.load(weight_in + row * PIVOTS + pivot, mask=real, other=0.0)
    scores = tl.load(score_sum + row * PIVOTS + pivot, mask=real, other=0.0)
    members = tl.load(members_in + row * PIVOTS + pivot, mask=real, other=0.0)

    # 1. Join the most similar pivot, all against the pivots as they were.
    unit = _unit(mean_keys)
    present = members > 0
    pull_keys = tl.zeros([PIVOT_WIDTH, WIDTH], tl.float32)
    pull_values = tl.zeros([PIVOT_WIDTH, WIDTH], tl.float32)
    added = tl.zeros([PIVOT_WIDTH], tl.float32)
    merged = 0
    for i in range(first, last):
        token = tl.load(order + i)
        key = tl.load(keys + token * DIM + channel, mask=channel < DIM, other=0.0)
        value = tl.load(values + token * DIM + channel, mask=channel < DIM, other=0.0)
        own_score = tl.maximum(tl.load(score + token), LEAST)
        cosine = tl.sum(unit * _unit(key)[None], 1)
        cosine = tl.where(present, cosine, float("-inf"))
        best = tl.max(cosine, 0)
        joins = best >= threshold
        hit = pivot == tl.where(joins, tl.argmax(cosine, 0), -1)
        omega = tl.where(hit, tl.exp(best), 0.0)
        pull_keys += omega[:, None] * (key[None] - mean_keys)
        pull_values += omega[:, None] * (value[None] - mean_values)
        added += omega
        scores += tl.where(hit, own_score, 0.0)
        members += tl.where(hit, 1.0, 0.0)
        tl.store(score_left + i, tl.where(joins, float("-inf"), own_score))
        merged += joins.to(tl.int32)
    tl.debug_barrier()  # the scores left are read by other threads from here on
    weight += added
    mean_keys += pull_keys / tl.maximum(weight, LEAST)[:, None]
    mean_values += pull_values / tl.maximum(weight, LEAST)[:, None]

    # 2. Drop what scores too little beside what was merged here.
    total_members = tl.sum(members, 0)
    mean_score = tl.sum(scores, 0) / tl.maximum(total_members, 1.0)
    lowest = tl.where(total_members > 0, tl.maximum(gate * mean_score, 0.0), 0.0)
    passed = 0
    for begin in range(first, last, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        left = tl.load(score_left + places, mask=places < last, other=float("-inf"))
        passed += tl.sum((left > lowest).to(tl.int32), 0)
    slot = tl.arange(0, BUFFER_WIDTH)
    old_scores = tl.load(buffer_score + row * BUFFER + slot, mask=slot < BUFFER, other=float("-inf"))
    waiting = passed + tl.sum((old_scores > float("-inf")).to(tl.int32), 0)

    # 3. Full buffers become pivots, the best scored first.
    last_score = tl.full([], float("inf"), tl.float32)
    last_position = tl.full([], -1, tl.int32)
    remerged = 0
    for _ in range(0, waiting // BUFFER):
        sum_keys = tl.zeros([WIDTH], tl.float32)
        sum_values = tl.zeros([WIDTH], tl.float32)
        seed = tl.zeros([WIDTH], tl.float32)
        sum_weight, sum_score = 0.0, 0.0
        for member in range(0, BUFFER):
            last_score, last_position = _take_next(
                buffer_score, score_left, row, first, last, lowest, last_score, last_position,
                BUFFER, BUFFER_WIDTH, BLOCK,
            )  # fmt: skip
            key = _load_waiting(buffer_keys, keys, order, row, first, last_position, DIM, WIDTH, BUFFER)
            value = _load_waiting(buffer_values, values, order, row, first, last_position, DIM, WIDTH, BUFFER)
            seed = tl.where(member == 0, _unit(key), seed)
            omega = tl.exp(tl.sum(seed * _unit(key), 0))
            sum_keys += omega * key
            sum_values += omega * value
            sum_weight += omega
            sum_score += last_score

        # 4. A full row folds its lightest pivot into that one's nearest neighbour.
        free = real & (members == 0)
        full = tl.sum(free.to(tl.int32), 0) == 0
        victim = tl.argmin(tl.where(real, weight, float("inf")), 0)
        is_victim = pivot == victim
        victim_key = tl.sum(tl.where(is_victim[:, None], mean_keys, 0.0), 0)
        victim_value = tl.sum(tl.where(is_victim[:, None], mean_values, 0.0), 0)
        cosine = tl.sum(_unit(mean_keys) * _unit(victim_key)[None], 1)
        cosine = tl.where(real & (pivot != victim), cosine, float("-inf"))
        joining = tl.sum(tl.where(is_victim, weight, 0.0), 0) * tl.exp(tl.max(cosine, 0) - 1)
        nearest = pivot == tl.where(full, tl.argmax(cosine, 0), -1)
        share = tl.where(nearest, joining / (weight + joining), 0.0)
        mean_keys += share[:, None] * (victim_key[None] - mean_keys)
        mean_values += share[:, None] * (victim_value[None] - mean_values)
        weight += tl.where(nearest, joining, 0.0)
        scores += tl.where(nearest, tl.sum(tl.where(is_victim, scores, 0.0), 0), 0.0)
        members += tl.where(nearest, tl.sum(tl.where(is_victim, members, 0.0), 0), 0.0)
        remerged += full.to(tl.int32)

        slot_taken = tl.where(full, victim, tl.argmax(free.to(tl.int32), 0))
        taken = pivot == slot_taken
        mean_keys = tl.where(taken[:, None], (sum_keys / sum_weight)[None], mean_keys)
        mean_values = tl.where(taken[:, None], (sum_values / sum_weight)[None], mean_values)
        weight = tl.where(taken, sum_weight, weight)
        scores = tl.where(taken, sum_score, scores)
        members = tl.where(taken, 1.0 * BUFFER, members)

    tl.store(new_pivot_keys + at, mean_keys, mask=inside)
    tl.store(new_pivot_values + at, mean_values, mask=inside)
    tl.store(new_weight + row * PIVOTS + pivot, tl.minimum(weight, heaviest), mask=real)
    tl.store(new_score_sum + row * PIVOTS + pivot, scores, mask=real)
    tl.store(new_members + row * PIVOTS + pivot, members, mask=real)

    # What is left waits on; unused slots are cleared.
    for place in range(0, BUFFER):
        left_waiting = place < waiting % BUFFER
        next_score, next_position = _take_next(
            buffer_score, score_left, row, first, last, lowest, last_score, last_position,
            BUFFER, BUFFER_WIDTH, BLOCK,
        )  # fmt: skip
        last_score = tl.where(left_waiting, next_score, last_score)
        last_position = tl.where(left_waiting, next_position, last_position)
        key = _load_waiting(buffer_keys, keys, order, row, first, last_position, DIM, WIDTH, BUFFER)
        value = _load_waiting(buffer_values, values, order, row, first, last_position, DIM, WIDTH, BUFFER)
        target = (row * BUFFER + place) * DIM + channel
        tl.store(new_buffer_keys + target, tl.where(left_waiting, key, 0.0), mask=channel < DIM)
        tl.store(new_buffer_values + target, tl.where(left_waiting, value, 0.0), mask=channel < DIM)
        tl.store(new_buffer_score + row * BUFFER + place, tl.where(left_waiting, last_score, float("-inf")))

    tl.store(counts + row * 5, merged)
    tl.store(counts + row * 5 + 1, passed)
    tl.store(counts + row * 5 + 2, (last - first).to(tl.int32) - merged - passed)
    tl.store(counts + row * 5 + 3, waiting // BUFFER)
    tl.store(counts + row * 5 + 4, remerged)
