"""Merging evicted tokens into voxel rows in Triton: one program per row, one launch per call.

The program keeps the pivots of its row in registers and reads tokens a block at a time, so that it waits for
memory a few times per row and not once per token. Waiting tokens are never sorted: each step looks for the
best score behind the one taken last, which for the few tokens of a row is cheaper, and breaks ties like the
stable sort of the reference.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.attend_triton import check_reachable, require
from stac_core.kernels.voxel_merge import LEAST_SCORE, LIKE, MergeRules, RowState, RowTokens, check_merge

__all__ = ["require", "voxel_merge"]

LEAST = tl.constexpr(LEAST_SCORE)
CHANNELS = tl.constexpr(4)  # of a token, in one thread: as many in 16 bits as in 32 saves a change of layout
SMALLEST_NORM = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
BLOCK = 32  # scores looked at together
TOKENS = 8  # merged together
WARPS = 1  # of one row
REGISTERS = 120  # of a thread: about the fewest without spilling on any GPU, so that most rows run at once


def voxel_merge(state: RowState, tokens: RowTokens, rules: MergeRules) -> tuple[RowState, Tensor]:
    """The contract of `voxel_merge.py`."""
    check_merge(state, tokens)
    check_reachable(LIKE, tokens.order)
    state = RowState(*(part.contiguous() for part in state))
    start, order, keys, values, score = (part.contiguous() for part in tokens)
    after = RowState(*(torch.empty_like(part) for part in state))
    rows, pivots, dim = state.pivot_keys.shape
    score_left = torch.empty_like(order, dtype=score.dtype)
    counts = torch.empty(rows, 5, dtype=torch.int32, device=order.device)
    if rows:
        with torch.cuda.device_of(order):  # Triton launches on the current device
            _merge_kernel[(rows,)](
                *state, *after, order, start, keys, values, score, score_left, counts,
                rules.threshold, rules.gate, rules.inertia or float("inf"),
                DIM=dim, WIDTH=triton.next_power_of_2(dim), PIVOTS=pivots,
                PIVOT_WIDTH=triton.next_power_of_2(pivots), BUFFER=state.buffer_score.shape[1],
                BUFFER_WIDTH=triton.next_power_of_2(state.buffer_score.shape[1]), BLOCK=BLOCK, TOKENS=TOKENS,
                num_warps=WARPS, maxnreg=REGISTERS,
            )  # fmt: skip
    return after, counts.sum(0)


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
    old_scores, score_left, first, last, lowest, last_score, last_position,
    BUFFER: tl.constexpr, BUFFER_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score and position of the next waiting token; buffered ones come first, then the row's own."""
    slot = tl.arange(0, BUFFER_WIDTH)
    nothing = tl.full([], float("-inf"), tl.float32)
    best, position = _best_after(old_scores, slot, nothing, last_position, last_score, last_position)
    for begin in range(first, last, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        fresh = tl.load(score_left + i, mask=i < last, other=float("-inf"))
        fresh = tl.where(fresh > lowest, fresh, float("-inf"))
        best, position = _best_after(
            fresh, (i - first + BUFFER).to(tl.int32), best, position, last_score, last_position
        )
    return best, position


@triton.jit
def _take_several(
    count, old_scores, score_left, first, last, lowest, last_score, last_position,
    BUFFER: tl.constexpr, BUFFER_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[BUFFER_WIDTH] scores and positions of the next `count` waiting tokens; the last ones by themselves.

    Beyond `count`: −inf and −1.
    """
    slot = tl.arange(0, BUFFER_WIDTH)
    scores = tl.full([BUFFER_WIDTH], float("-inf"), tl.float32)
    positions = tl.full([BUFFER_WIDTH], -1, tl.int32)
    for taken in range(0, count):
        last_score, last_position = _take_next(
            old_scores, score_left, first, last, lowest, last_score, last_position,
            BUFFER, BUFFER_WIDTH, BLOCK,
        )  # fmt: skip
        scores = tl.where(slot == taken, last_score, scores)
        positions = tl.where(slot == taken, last_position, positions)
    return scores, positions, last_score, last_position


@triton.jit
def _load_waiting(
    buffered,
    fresh,
    order,
    row,
    first,
    positions,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BUFFER: tl.constexpr,
):
    """[BUFFER_WIDTH, WIDTH] keys or values of waiting tokens; zero where the position is −1."""
    channel = tl.arange(0, WIDTH)
    in_buffer, is_fresh = (positions >= 0) & (positions < BUFFER), positions >= BUFFER
    old = (row * BUFFER + positions)[:, None] * DIM + channel[None]
    old = tl.load(buffered + old, mask=in_buffer[:, None] & (channel[None] < DIM), other=0.0)
    token = tl.load(order + first + positions - BUFFER, mask=is_fresh, other=0)
    new = tl.max_contiguous(token[:, None] * DIM + channel[None], [1, CHANNELS])
    new = tl.load(fresh + new, mask=is_fresh[:, None] & (channel[None] < DIM), other=0.0)
    return old + new.to(tl.float32)


@triton.jit
def _merge_kernel(
    pivot_keys, pivot_values, weight_in, score_sum, members_in, buffer_keys, buffer_values, buffer_score,
    new_pivot_keys, new_pivot_values, new_weight, new_score_sum, new_members,
    new_buffer_keys, new_buffer_values, new_buffer_score,
    order, start, keys, values, score, score_left, counts,
    threshold, gate, heaviest,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PIVOTS: tl.constexpr, PIVOT_WIDTH: tl.constexpr,
    BUFFER: tl.constexpr, BUFFER_WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(start + row)
    last = tl.load(start + row + 1)
    channel = tl.arange(0, WIDTH)
    pivot = tl.arange(0, PIVOT_WIDTH)
    real = pivot < PIVOTS
    at = (row * PIVOTS + pivot[:, None]) * DIM + channel[None]
    inside = real[:, None] & (channel[None] < DIM)
    weight = tl.load(weight_in + row * PIVOTS + pivot, mask=real, other=0.0)
    scores = tl.load(score_sum + row * PIVOTS + pivot, mask=real, other=0.0)
    members = tl.load(members_in + row * PIVOTS + pivot, mask=real, other=0.0)

    # 1. Join the most similar pivot, all against the pivots as they were.
    sum_keys = tl.zeros([PIVOT_WIDTH, WIDTH], tl.float32)
    sum_values = tl.zeros([PIVOT_WIDTH, WIDTH], tl.float32)
    added = tl.zeros([PIVOT_WIDTH], tl.float32)
    merged = 0
    for begin in range(first, last, TOKENS):
        i = begin + tl.arange(0, TOKENS)
        token = tl.load(order + i, mask=i < last, other=0)
        at_token = tl.max_contiguous(token[:, None] * DIM + channel[None], [1, CHANNELS])
        in_token = (i < last)[:, None] & (channel[None] < DIM)
        key = tl.load(keys + at_token, mask=in_token, other=0.0).to(tl.float32)
        value = tl.load(values + at_token, mask=in_token, other=0.0).to(tl.float32)
        own_score = tl.maximum(tl.load(score + token, mask=i < last, other=0.0), LEAST)
        length = tl.maximum(tl.sqrt(tl.sum(key * key, 1)), SMALLEST_NORM)
        best = tl.full([TOKENS], float("-inf"), tl.float32)
        nearest = tl.full([TOKENS], -1, tl.int32)
        for g in tl.static_range(PIVOTS):
            old_mean = tl.load(pivot_keys + (row * PIVOTS + g) * DIM + channel, mask=channel < DIM, other=0.0)
            present = tl.load(members_in + row * PIVOTS + g) > 0
            cosine = tl.sum(key * _unit(old_mean)[None], 1) / length
            cosine = tl.where(present, cosine, float("-inf"))
            closer = cosine > best
            nearest = tl.where(closer, g, nearest)
            best = tl.where(closer, cosine, best)
        joins = (i < last) & (best >= threshold)
        omega = tl.where(joins, tl.exp(best), 0.0)
        nearest = tl.where(joins, nearest, -1)
        for g in tl.static_range(PIVOTS):
            share = tl.where(nearest == g, omega, 0.0)[:, None]
            is_g = (pivot == g)[:, None]
            sum_keys += tl.where(is_g, tl.sum(share * key, 0)[None], 0.0)
            sum_values += tl.where(is_g, tl.sum(share * value, 0)[None], 0.0)
        hit = pivot[:, None] == nearest[None]
        added += tl.sum(tl.where(hit, omega[None], 0.0), 1)
        scores += tl.sum(tl.where(hit, own_score[None], 0.0), 1)
        members += tl.sum(hit.to(tl.float32), 1)
        tl.store(score_left + i, tl.where(joins, float("-inf"), own_score), mask=i < last)
        merged += tl.sum(joins.to(tl.int32), 0)
    tl.debug_barrier()  # the scores left are read by other threads from here on
    weight += added
    mean_keys = tl.load(pivot_keys + at, mask=inside, other=0.0)
    mean_values = tl.load(pivot_values + at, mask=inside, other=0.0)
    mean_keys += (sum_keys - added[:, None] * mean_keys) / tl.maximum(weight, LEAST)[:, None]
    mean_values += (sum_values - added[:, None] * mean_values) / tl.maximum(weight, LEAST)[:, None]

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
        taken_scores, positions, last_score, last_position = _take_several(
            BUFFER, old_scores, score_left, first, last, lowest, last_score, last_position,
            BUFFER, BUFFER_WIDTH, BLOCK,
        )  # fmt: skip
        key = _load_waiting(buffer_keys, keys, order, row, first, positions, DIM, WIDTH, BUFFER)
        value = _load_waiting(buffer_values, values, order, row, first, positions, DIM, WIDTH, BUFFER)
        direction = _unit(key)
        seed = tl.sum(tl.where((slot == 0)[:, None], direction, 0.0), 0)
        omega = tl.where(slot < BUFFER, tl.exp(tl.sum(seed[None] * direction, 1)), 0.0)
        sum_weight = tl.sum(omega, 0)
        new_key = tl.sum(omega[:, None] * key, 0) / sum_weight
        new_value = tl.sum(omega[:, None] * value, 0) / sum_weight
        sum_score = tl.sum(tl.where(slot < BUFFER, taken_scores, 0.0), 0)

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
        mean_keys = tl.where(taken[:, None], new_key[None], mean_keys)
        mean_values = tl.where(taken[:, None], new_value[None], mean_values)
        weight = tl.where(taken, sum_weight, weight)
        scores = tl.where(taken, sum_score, scores)
        members = tl.where(taken, 1.0 * BUFFER, members)

    tl.store(new_pivot_keys + at, mean_keys, mask=inside)
    tl.store(new_pivot_values + at, mean_values, mask=inside)
    tl.store(new_weight + row * PIVOTS + pivot, tl.minimum(weight, heaviest), mask=real)
    tl.store(new_score_sum + row * PIVOTS + pivot, scores, mask=real)
    tl.store(new_members + row * PIVOTS + pivot, members, mask=real)

    # What is left waits on; unused slots are cleared.
    left_scores, positions, last_score, last_position = _take_several(
        waiting % BUFFER, old_scores, score_left, first, last, lowest, last_score, last_position,
        BUFFER, BUFFER_WIDTH, BLOCK,
    )  # fmt: skip
    key = _load_waiting(buffer_keys, keys, order, row, first, positions, DIM, WIDTH, BUFFER)
    value = _load_waiting(buffer_values, values, order, row, first, positions, DIM, WIDTH, BUFFER)
    target = (row * BUFFER + slot)[:, None] * DIM + channel[None]
    in_buffer = (slot < BUFFER)[:, None] & (channel[None] < DIM)
    tl.store(new_buffer_keys + target, key, mask=in_buffer)
    tl.store(new_buffer_values + target, value, mask=in_buffer)
    tl.store(new_buffer_score + row * BUFFER + slot, left_scores, mask=slot < BUFFER)

    tl.store(counts + row * 5, merged)
    tl.store(counts + row * 5 + 1, passed)
    tl.store(counts + row * 5 + 2, (last - first).to(tl.int32) - merged - passed)
    tl.store(counts + row * 5 + 3, waiting // BUFFER)
    tl.store(counts + row * 5 + 4, remerged)
