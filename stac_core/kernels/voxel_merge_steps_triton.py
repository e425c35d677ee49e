"""The steps of merging tokens into one row of a voxel memory, in Triton; numbered as in `voxel_merge.py`.

A row's own tokens are given as (order, keys, values): the i-th is number order[i]. What waits has a place:
the buffer comes first, then the row's own tokens.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton gives the arguments of a kernel their types when it compiles it)

from __future__ import annotations

import triton
import triton.language as tl

from stac_core.kernels.vectors_triton import (
    both,
    dots,
    in_pieces,
    in_rows,
    lengths,
    number_of,
    row_lengths,
    row_of,
)
from stac_core.kernels.voxel_merge import LEAST_SCORE

LEAST = tl.constexpr(LEAST_SCORE)


@triton.jit
def _either(x, y):
    return x | y


@triton.jit
def _most_similar(
    key, pivot_keys, pivot_lengths, members, i, DIM: tl.constexpr, WIDTH: tl.constexpr, PIVOTS: tl.constexpr
):
    """The nearest pivot to each of the tokens i, whose keys come in pieces, and the cosine to it: [T]."""
    length, pivot = lengths(key), tl.arange(0, pivot_lengths.shape[0])
    best = tl.full([i.shape[0]], float("-inf"), tl.float32)
    nearest = tl.full([i.shape[0]], 0, tl.int32)
    for g in tl.static_range(PIVOTS):
        if tl.load(members + g) > 0:
            mean = in_pieces(pivot_keys, 0 * i + g, i >= 0, DIM, WIDTH)
            cosine = dots(key, mean) / (length * number_of(pivot_lengths, pivot == g))
            closer = cosine > best
            nearest = tl.where(closer, g, nearest)
            best = tl.where(closer, cosine, best)
    return nearest, best


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
def join(
    tokens, count, score, score_left, pivot_keys, old_members, scores, members, threshold,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PIVOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Step 1, for all tokens against the pivots as they were. Leaves the scores of those that do not join.

    → by pivot, of those that join: sums of keys and of values times ω [PIVOT_WIDTH, WIDTH], sum of ω
    [PIVOT_WIDTH]; score sums and members with them [PIVOT_WIDTH]; how many they are.
    """
    order, keys, values = tokens
    pivot = tl.arange(0, scores.shape[0])
    pivot_lengths = row_lengths(in_rows(pivot_keys, pivot, pivot < PIVOTS, DIM, WIDTH))
    sum_keys = tl.zeros([scores.shape[0], WIDTH], tl.float32)
    sum_values = tl.zeros([scores.shape[0], WIDTH], tl.float32)
    added = tl.zeros([scores.shape[0]], tl.float32)
    merged = 0
    for begin in range(0, count, TOKENS):
        i = begin + tl.arange(0, TOKENS)
        token = tl.load(order + i, mask=i < count, other=0)
        own_score = tl.maximum(tl.load(score + token, mask=i < count, other=0.0), LEAST)
        key = in_pieces(keys, token, i < count, DIM, WIDTH)
        nearest, cosine = _most_similar(key, pivot_keys, pivot_lengths, old_members, i, DIM, WIDTH, PIVOTS)
        joins = (i < count) & (cosine >= threshold)
        tl.store(score_left + i, tl.where(joins, float("-inf"), own_score), mask=i < count)
        found = tl.reduce(tl.where(joins, 1 << (nearest & 31), 0), 0, _either)  # a bit for every 32nd pivot
        if found != 0:
            omega = tl.where(joins, tl.exp(cosine), 0.0)
            nearest = tl.where(joins, nearest, -1)
            joining = in_rows(keys, token, joins, DIM, WIDTH)
            sum_keys = _add_shares(sum_keys, joining, nearest, omega, found, PIVOTS)
            joining = in_rows(values, token, joins, DIM, WIDTH)
            sum_values = _add_shares(sum_values, joining, nearest, omega, found, PIVOTS)
            hit = pivot[:, None] == nearest[None]
            added += tl.sum(tl.where(hit, omega[None], 0.0), 1)
            scores += tl.sum(tl.where(hit, own_score[None], 0.0), 1)
            members += tl.sum(hit.to(tl.float32), 1)
            merged += tl.sum(joins.to(tl.int32), 0)
    return sum_keys, sum_values, added, scores, members, merged


@triton.jit
def lowest_score(scores, members, gate):
    """Step 2: what tokens that have not joined must score more than; scores, members [PIVOT_WIDTH]."""
    total_members = tl.sum(members, 0)
    mean_score = tl.sum(scores, 0) / tl.maximum(total_members, 1.0)
    return tl.where(total_members > 0, tl.maximum(gate * mean_score, 0.0), 0.0)


@triton.jit
def scores_waiting(buffer_score, score_left, place, count, lowest, BUFFER: tl.constexpr):
    """By place: the buffer comes first, then the row's own tokens. −inf where none waits."""
    in_buffer = (place >= 0) & (place < BUFFER)
    is_fresh = (place >= BUFFER) & (place < BUFFER + count)
    old = tl.load(buffer_score + place, mask=in_buffer, other=float("-inf"))
    new = tl.load(score_left + place - BUFFER, mask=is_fresh, other=float("-inf"))
    return tl.maximum(old, tl.where(new > lowest, new, float("-inf")))


@triton.jit
def rank_waiting(ranked, buffer_score, score_left, count, lowest, BUFFER: tl.constexpr, BLOCK: tl.constexpr):
    """Places of what waits into `ranked`, the best scored first → how many wait, and of them new tokens."""
    waiting = 0
    passed = 0
    for begin in range(0, BUFFER + count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        own = scores_waiting(buffer_score, score_left, place, count, lowest, BUFFER)
        rank = tl.zeros([BLOCK], tl.int32)
        for rival_begin in range(0, BUFFER + count, BLOCK):
            rival = rival_begin + tl.arange(0, BLOCK)
            other = scores_waiting(buffer_score, score_left, rival, count, lowest, BUFFER)[:, None]
            ahead = (other > own[None]) | ((other == own[None]) & (rival[:, None] < place[None]))
            rank += tl.sum(ahead.to(tl.int32), 0)
        waits = own > float("-inf")
        tl.store(ranked + rank, place, mask=waits)
        waiting += tl.sum(waits.to(tl.int32), 0)
        passed += tl.sum((waits & (place >= BUFFER)).to(tl.int32), 0)
    return waiting, passed


@triton.jit
def find_waiting(order, place, BUFFER: tl.constexpr):
    """What waits at places [T] → its place, whether in the buffer; its number as a token, whether new."""
    in_buffer, is_fresh = (place >= 0) & (place < BUFFER), place >= BUFFER
    return place, in_buffer, tl.load(order + place - BUFFER, mask=is_fresh, other=0), is_fresh


@triton.jit
def _waiting_in_pieces(buffered, fresh, found, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Keys of what `find_waiting` has found."""
    place, in_buffer, token, is_fresh = found
    old = in_pieces(buffered, place, in_buffer, DIM, WIDTH)
    return both(old, in_pieces(fresh, token, is_fresh, DIM, WIDTH))


@triton.jit
def waiting_in_rows(buffered, fresh, found, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Keys or values of what `find_waiting` has found: [T, WIDTH]."""
    place, in_buffer, token, is_fresh = found
    old = in_rows(buffered, place, in_buffer, DIM, WIDTH)
    return old + in_rows(fresh, token, is_fresh, DIM, WIDTH)


@triton.jit
def _mean(part, buffered, fresh, found, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Of the same: [WIDTH]; each counts by its `part` [T, 1]."""
    place, in_buffer, token, is_fresh = found
    old = tl.sum(part * in_rows(buffered, place, in_buffer, DIM, WIDTH), 0)
    return old + tl.sum(part * in_rows(fresh, token, is_fresh, DIM, WIDTH), 0)


@triton.jit
def _seed_key(
    order, buffered, fresh, seed, slot, DIM: tl.constexpr, WIDTH: tl.constexpr, BUFFER: tl.constexpr
):
    """The key that waits at the place `seed`, in pieces, for every slot [T]."""
    if seed < BUFFER:
        key = in_pieces(buffered, 0 * slot + seed, slot >= 0, DIM, WIDTH)
    else:
        token = tl.load(order + seed - BUFFER)
        key = in_pieces(fresh, 0 * slot + token, slot >= 0, DIM, WIDTH)
    return key


@triton.jit
def aggregate(
    tokens, buffer, place, seed, slot, DIM: tl.constexpr, WIDTH: tl.constexpr, BUFFER: tl.constexpr
):
    """Step 3: a pivot of what waits at B places, of which `seed` has the best score.

    → its key and value [WIDTH], its weight.
    """
    order, keys, values = tokens
    buffer_keys, buffer_values = buffer
    found = find_waiting(order, place, BUFFER)
    key = _waiting_in_pieces(buffer_keys, keys, found, DIM, WIDTH)
    first_key = _seed_key(order, buffer_keys, keys, seed, slot, DIM, WIDTH, BUFFER)
    omega = tl.exp(dots(key, first_key) / (lengths(key) * lengths(first_key)))
    omega = tl.where(slot < BUFFER, omega, 0.0)
    weight = tl.sum(omega, 0)
    part = (omega / weight)[:, None]
    new_key = _mean(part, buffer_keys, keys, found, DIM, WIDTH)
    new_value = _mean(part, buffer_values, values, found, DIM, WIDTH)
    return new_key, new_value, weight


@triton.jit
def fold(
    pivot_keys, pivot_values, weight, scores, members, victim,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """Step 4: a pivot joins its most similar neighbour → weight, score sums, members [PIVOT_WIDTH]."""
    pivot, channel = tl.arange(0, weight.shape[0]), tl.arange(0, WIDTH)
    real = pivot < PIVOTS
    is_victim = pivot == victim
    keys = in_rows(pivot_keys, pivot, real, DIM, WIDTH)
    values = in_rows(pivot_values, pivot, real, DIM, WIDTH)
    victim_key, victim_value = row_of(keys, is_victim), row_of(values, is_victim)
    key_lengths = row_lengths(keys)
    victim_length = number_of(key_lengths, is_victim)
    cosine = tl.sum(keys * victim_key[None], 1) / (key_lengths * victim_length)
    cosine = tl.where(real & (pivot != victim), cosine, float("-inf"))
    joining = number_of(weight, is_victim) * tl.exp(tl.max(cosine, 0) - 1)
    heir = pivot == tl.argmax(cosine, 0)
    pull = tl.where(heir, joining / (weight + joining), 0.0)[:, None]
    at, inside = pivot[:, None] * DIM + channel[None], real[:, None] & (channel[None] < DIM)
    into_heir = inside & heir[:, None]
    tl.debug_barrier()  # nobody still reads what is written now
    keys += pull * (victim_key[None] - keys)
    values += pull * (victim_value[None] - values)
    tl.store(pivot_keys + at, keys, mask=into_heir)
    tl.store(pivot_values + at, values, mask=into_heir)
    weight += tl.where(heir, joining, 0.0)
    scores += tl.where(heir, number_of(scores, is_victim), 0.0)
    members += tl.where(heir, number_of(members, is_victim), 0.0)
    return weight, scores, members
