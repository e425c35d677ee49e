"""Merging evicted tokens into voxel rows in Triton: one program per row, one launch per call.

A program has few lanes for many small steps, so what counts is how often they exchange numbers and wait for
memory. Cosines are taken with a token in four neighbouring lanes, means with a channel in each; tokens are
read a block at a time, values only of those that join or wait. Waiting tokens are not sorted: each finds its
rank by counting who comes before it, ties by age like the stable sort of the reference.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (Triton gives variables their types when it compiles; a tuple that grows has another one at every step)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stac_core.kernels.launch_triton import check_reachable
from stac_core.kernels.voxel_merge import LEAST_SCORE, LIKE, MergeRules, RowState, RowTokens, check_merge

LEAST = tl.constexpr(LEAST_SCORE)
CHANNELS = tl.constexpr(4)  # of a token, in one thread: as many in 16 bits as in 32 saves a change of layout
PIECE = tl.constexpr(16)  # channels of a token side by side: CHANNELS for each of four lanes
SMALLEST_NORM = tl.constexpr(1e-12)  # of torch.nn.functional.normalize
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
def _in_pieces(vectors, number, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Vectors [·, DIM] by number [T]: a tuple of their pieces, [T, PIECE] float32; zero where not inside."""
    pieces = ()
    for begin in tl.static_range(0, WIDTH, PIECE):
        channel = begin + tl.arange(0, PIECE)[None]
        at = tl.max_contiguous(number[:, None] * DIM + channel, [1, CHANNELS])
        piece = tl.load(vectors + at, mask=inside[:, None] & (channel < DIM), other=0.0)
        pieces = pieces + (piece.to(tl.float32),)  # noqa: RUF005, which Triton does not compile
    return pieces


@triton.jit
def _both(x, y):
    """The sum of two vectors in pieces."""
    pieces = ()
    for p in tl.static_range(len(x)):
        pieces = pieces + (x[p] + y[p],)  # noqa: RUF005
    return pieces


@triton.jit
def _dots(x, y):
    """Of vectors in pieces → [T]."""
    products = x[0] * y[0]
    for p in tl.static_range(1, len(x)):
        products += x[p] * y[p]
    return tl.sum(products, 1)


@triton.jit
def _lengths(x):
    """Of vectors in pieces → [T]."""
    return tl.maximum(tl.sqrt(_dots(x, x)), SMALLEST_NORM)


@triton.jit
def _either(x, y):
    return x | y


@triton.jit
def _in_rows(vectors, number, inside, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The same as [T, WIDTH] float32."""
    channel = tl.arange(0, WIDTH)[None]
    at = tl.max_contiguous(number[:, None] * DIM + channel, [1, CHANNELS])
    return tl.load(vectors + at, mask=inside[:, None] & (channel < DIM), other=0.0).to(tl.float32)


@triton.jit
def _row_lengths(x):
    """[T, WIDTH] → [T]."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, 1)), SMALLEST_NORM)


@triton.jit
def _add_shares(sums, vectors, nearest, omega, found, PIVOTS: tl.constexpr):
    """sums [PIVOT_WIDTH, WIDTH] and what vectors [T, WIDTH] add to pivots, none but those `found`."""
    pivot = tl.arange(0, sums.shape[0])[:, None]
    for g in tl.static_range(PIVOTS):
        if (found >> (g & 31)) & 1:
            share = tl.where(nearest == g, omega, 0.0)[:, None]
            sums += tl.where(pivot == g, tl.sum(share * vectors, 0)[None], 0.0)
    return sums


@triton.jit
def _scores_waiting(buffer_score, score_left, place, count, lowest, BUFFER: tl.constexpr):
    """By place: the buffer comes first, then the row's own tokens. −inf where none waits."""
    in_buffer = (place >= 0) & (place < BUFFER)
    is_fresh = (place >= BUFFER) & (place < BUFFER + count)
    old = tl.load(buffer_score + place, mask=in_buffer, other=float("-inf"))
    new = tl.load(score_left + place - BUFFER, mask=is_fresh, other=float("-inf"))
    return tl.maximum(old, tl.where(new > lowest, new, float("-inf")))


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
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(start + row)
    count = (tl.load(start + row + 1) - first).to(tl.int32)
    order += first
    score_left += first
    ranked += first + row * BUFFER
    pivot_keys += row * PIVOTS * DIM
    pivot_values += row * PIVOTS * DIM
    members_in += row * PIVOTS
    buffer_keys += row * BUFFER * DIM
    buffer_values += row * BUFFER * DIM
    buffer_score += row * BUFFER
    pivot = tl.arange(0, PIVOT_WIDTH)
    real = pivot < PIVOTS
    weight = tl.load(weight_in + row * PIVOTS + pivot, mask=real, other=0.0)
    scores = tl.load(score_sum + row * PIVOTS + pivot, mask=real, other=0.0)
    members = tl.load(members_in + pivot, mask=real, other=0.0)
    old_keys = _in_rows(pivot_keys, pivot, real, DIM, WIDTH)
    pivot_lengths = _row_lengths(old_keys)

    # 1. Join the most similar pivot, all against the pivots as they were.
    sum_keys = tl.zeros([PIVOT_WIDTH, WIDTH], tl.float32)
    sum_values = tl.zeros([PIVOT_WIDTH, WIDTH], tl.float32)
    added = tl.zeros([PIVOT_WIDTH], tl.float32)
    merged = 0
    for begin in range(0, count, TOKENS):
        i = begin + tl.arange(0, TOKENS)
        token = tl.load(order + i, mask=i < count, other=0)
        own_score = tl.maximum(tl.load(score + token, mask=i < count, other=0.0), LEAST)
        key = _in_pieces(keys, token, i < count, DIM, WIDTH)
        length = _lengths(key)
        best = tl.full([TOKENS], float("-inf"), tl.float32)
        nearest = tl.full([TOKENS], 0, tl.int32)
        for g in tl.static_range(PIVOTS):
            if tl.load(members_in + g) > 0:
                mean = _in_pieces(pivot_keys, 0 * i + g, i >= 0, DIM, WIDTH)
                cosine = _dots(key, mean) / (length * tl.sum(tl.where(pivot == g, pivot_lengths, 0.0), 0))
                closer = cosine > best
                nearest = tl.where(closer, g, nearest)
                best = tl.where(closer, cosine, best)
        joins = (i < count) & (best >= threshold)
        tl.store(score_left + i, tl.where(joins, float("-inf"), own_score), mask=i < count)
        found = tl.reduce(tl.where(joins, 1 << (nearest & 31), 0), 0, _either)  # a bit for every 32nd pivot
        if found != 0:
            omega = tl.where(joins, tl.exp(best), 0.0)
            nearest = tl.where(joins, nearest, -1)
            joining = _in_rows(keys, token, joins, DIM, WIDTH)
            sum_keys = _add_shares(sum_keys, joining, nearest, omega, found, PIVOTS)
            joining = _in_rows(values, token, joins, DIM, WIDTH)
            sum_values = _add_shares(sum_values, joining, nearest, omega, found, PIVOTS)
            hit = pivot[:, None] == nearest[None]
            added += tl.sum(tl.where(hit, omega[None], 0.0), 1)
            scores += tl.sum(tl.where(hit, own_score[None], 0.0), 1)
            members += tl.sum(hit.to(tl.float32), 1)
            merged += tl.sum(joins.to(tl.int32), 0)
    tl.debug_barrier()  # the scores left are read by other threads from here on
    weight += added
    mean_keys = _in_rows(pivot_keys, pivot, real, DIM, WIDTH)
    mean_values = _in_rows(pivot_values, pivot, real, DIM, WIDTH)
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
    total_members = tl.sum(members, 0)
    mean_score = tl.sum(scores, 0) / tl.maximum(total_members, 1.0)
    lowest = tl.where(total_members > 0, tl.maximum(gate * mean_score, 0.0), 0.0)
    waiting = 0
    passed = 0
    for begin in range(0, BUFFER + count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        own = _scores_waiting(buffer_score, score_left, place, count, lowest, BUFFER)
        rank = tl.zeros([BLOCK], tl.int32)
        for rival_begin in range(0, BUFFER + count, BLOCK):
            rival = rival_begin + tl.arange(0, BLOCK)
            other = _scores_waiting(buffer_score, score_left, rival, count, lowest, BUFFER)[:, None]
            ahead = (other > own[None]) | ((other == own[None]) & (rival[:, None] < place[None]))
            rank += tl.sum(ahead.to(tl.int32), 0)
        waits = own > float("-inf")
        tl.store(ranked + rank, place, mask=waits)
        waiting += tl.sum(waits.to(tl.int32), 0)
        passed += tl.sum((waits & (place >= BUFFER)).to(tl.int32), 0)
    tl.debug_barrier()  # other threads read the ranks, and write into the pivots

    # 3. Full buffers become pivots, the best scored first.
    slot = tl.arange(0, BUFFER_WIDTH)
    remerged = 0
    for turn in range(0, waiting // BUFFER):
        place = tl.load(ranked + turn * BUFFER + slot, mask=slot < BUFFER, other=-1)
        seed = tl.load(ranked + turn * BUFFER)
        in_buffer, is_fresh = (place >= 0) & (place < BUFFER), place >= BUFFER
        token = tl.load(order + place - BUFFER, mask=is_fresh, other=0)
        old_key = _in_pieces(buffer_keys, place, in_buffer, DIM, WIDTH)
        key = _both(old_key, _in_pieces(keys, token, is_fresh, DIM, WIDTH))
        if seed < BUFFER:
            first_key = _in_pieces(buffer_keys, 0 * slot + seed, slot >= 0, DIM, WIDTH)
        else:
            seed_token = tl.load(order + seed - BUFFER)
            first_key = _in_pieces(keys, 0 * slot + seed_token, slot >= 0, DIM, WIDTH)
        omega = tl.exp(_dots(key, first_key) / (_lengths(key) * _lengths(first_key)))
        omega = tl.where(slot < BUFFER, omega, 0.0)
        sum_weight = tl.sum(omega, 0)
        part = (omega / sum_weight)[:, None]
        new_key = tl.sum(part * _in_rows(buffer_keys, place, in_buffer, DIM, WIDTH), 0)
        new_key += tl.sum(part * _in_rows(keys, token, is_fresh, DIM, WIDTH), 0)
        new_value = tl.sum(part * _in_rows(buffer_values, place, in_buffer, DIM, WIDTH), 0)
        new_value += tl.sum(part * _in_rows(values, token, is_fresh, DIM, WIDTH), 0)
        taken_scores = _scores_waiting(buffer_score, score_left, place, count, lowest, BUFFER)
        sum_score = tl.sum(tl.where(slot < BUFFER, taken_scores, 0.0), 0)

        # 4. A full row folds its lightest pivot into that one's nearest neighbour.
        free = real & (members == 0)
        slot_taken = tl.argmax(free.to(tl.int32), 0)
        if tl.sum(free.to(tl.int32), 0) == 0:
            tl.debug_barrier()  # the pivots have been written by other threads
            slot_taken = tl.argmin(tl.where(real, weight, float("inf")), 0)
            is_victim = pivot == slot_taken
            all_keys = _in_rows(new_pivot_keys, pivot, real, DIM, WIDTH)
            all_values = _in_rows(new_pivot_values, pivot, real, DIM, WIDTH)
            victim_key = tl.sum(tl.where(is_victim[:, None], all_keys, 0.0), 0)
            victim_value = tl.sum(tl.where(is_victim[:, None], all_values, 0.0), 0)
            lengths = _row_lengths(all_keys)
            victim_length = tl.sum(tl.where(is_victim, lengths, 0.0), 0)
            alike = tl.sum(all_keys * victim_key[None], 1) / (lengths * victim_length)
            alike = tl.where(real & (pivot != slot_taken), alike, float("-inf"))
            adding = tl.sum(tl.where(is_victim, weight, 0.0), 0) * tl.exp(tl.max(alike, 0) - 1)
            heir = pivot == tl.argmax(alike, 0)
            pull = tl.where(heir, adding / (weight + adding), 0.0)[:, None]
            into_heir = inside & heir[:, None]
            tl.debug_barrier()  # nobody still reads what is written now
            all_keys += pull * (victim_key[None] - all_keys)
            all_values += pull * (victim_value[None] - all_values)
            tl.store(new_pivot_keys + at, all_keys, mask=into_heir)
            tl.store(new_pivot_values + at, all_values, mask=into_heir)
            weight += tl.where(heir, adding, 0.0)
            scores += tl.where(heir, tl.sum(tl.where(is_victim, scores, 0.0), 0), 0.0)
            members += tl.where(heir, tl.sum(tl.where(is_victim, members, 0.0), 0), 0.0)
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
    in_buffer, is_fresh = (place >= 0) & (place < BUFFER), place >= BUFFER
    token = tl.load(order + place - BUFFER, mask=is_fresh, other=0)
    at, inside = slot[:, None] * DIM + channel[None], (slot < BUFFER)[:, None] & (channel[None] < DIM)
    key = _in_rows(buffer_keys, place, in_buffer, DIM, WIDTH) + _in_rows(keys, token, is_fresh, DIM, WIDTH)
    tl.store(new_buffer_keys + row * BUFFER * DIM + at, key, mask=inside)
    value = _in_rows(buffer_values, place, in_buffer, DIM, WIDTH)
    value += _in_rows(values, token, is_fresh, DIM, WIDTH)
    tl.store(new_buffer_values + row * BUFFER * DIM + at, value, mask=inside)
    left_scores = _scores_waiting(buffer_score, score_left, place, count, lowest, BUFFER)
    tl.store(new_buffer_score + row * BUFFER + slot, left_scores, mask=slot < BUFFER)

    counts += row * 5
    tl.store(counts, merged)
    tl.store(counts + 1, passed)
    tl.store(counts + 2, count - merged - passed)
    tl.store(counts + 3, full)
    tl.store(counts + 4, remerged)
