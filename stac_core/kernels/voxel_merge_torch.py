"""Merging evicted tokens into voxel rows in plain PyTorch: the specification, and a path for any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.kernels.voxel_merge import LEAST_SCORE, MergeRules, RowState, RowTokens, check_merge
from stac_core.kernels.voxel_merge_rows import cosines, in_use, rows_of


class Tokens(NamedTuple):
    """N tokens, one by one."""

    row: Tensor  # [N] int64
    keys: Tensor  # [N, D] float32
    values: Tensor  # [N, D] float32
    score: Tensor  # [N] float32


def voxel_merge(state: RowState, grouped: RowTokens, rules: MergeRules) -> tuple[RowState, Tensor]:
    """The contract of `voxel_merge.py`."""
    check_merge(state, grouped)
    state = RowState(*(part.clone() for part in state))
    tokens = laid_out(grouped)
    joined = _join_pivots(state, tokens, rules)
    passed = ~joined & _pass_gate(state, tokens, rules.gate)
    waiting = _waiting(state, _select(tokens, passed))
    rank, fill = _ranks(waiting)
    state, pivots = _fill_buffers(state, waiting, rank, fill)
    remerged = _found_pivots(state, *pivots)
    if rules.inertia:
        state.weight.clamp_(max=rules.inertia)
    merged, buffered = int(joined.sum()), int(passed.sum())
    gated = len(joined) - merged - buffered
    counts = [merged, buffered, gated, len(pivots[0]), remerged]
    return state, torch.tensor(counts, device=joined.device)


def laid_out(grouped: RowTokens) -> Tokens:
    """The tokens in the order of their rows."""
    grouped = in_use(grouped)
    keys, values, score = (part[grouped.order].float() for part in grouped[2:])
    return Tokens(rows_of(grouped), keys, values, score.clamp_min(LEAST_SCORE))


def fold_in(state: RowState, rows: Tensor, pivot: RowState) -> int:
    """Give one more pivot to each of the rows [n], all different, in place; → how many had no slot free.

    pivot: state of n rows with one pivot each; where it has no members nothing happens.
    """
    present = pivot.members[:, 0] > 0
    rows, pivot = rows[present], RowState(*(part[present] for part in pivot))
    slot, full = _free_slot(state, rows)
    slot[full] = _fold_lightest(state, rows[full])
    for part, new in zip(state[:5], pivot[:5], strict=True):
        part[rows, slot] = new[:, 0]
    return int(full.sum())


def _join_pivots(state: RowState, tokens: Tokens, rules: MergeRules) -> Tensor:
    """Step 1, in place; → which tokens have joined a pivot [N]."""
    best, pivot = cosines(state, tokens.row, tokens.keys).max(-1)
    joined = best >= rules.threshold
    row, pivot, omega = tokens.row[joined], pivot[joined], best[joined].exp()
    place = row * state.weight.shape[1] + pivot
    added = torch.zeros_like(state.weight).flatten().index_add_(0, place, omega).view_as(state.weight)
    total = state.weight + added
    for mean, part in ((state.pivot_keys, tokens.keys), (state.pivot_values, tokens.values)):
        pull = torch.zeros_like(mean).flatten(0, 1)
        pull.index_add_(0, place, omega[:, None] * (part[joined] - mean[row, pivot]))
        mean.add_(pull.view_as(mean) / total.clamp_min(LEAST_SCORE)[..., None])
    state.weight.copy_(total)
    state.score_sum.view(-1).index_add_(0, place, tokens.score[joined])
    state.members.view(-1).index_add_(0, place, torch.ones_like(omega))
    return joined


def _pass_gate(state: RowState, tokens: Tokens, gate: float) -> Tensor:
    """Step 2: tokens [N] that score enough, or whose row has no pivot yet."""
    mean_score = state.score_sum.sum(-1) / state.members.sum(-1)  # NaN without pivots: nothing is below it
    return ~(tokens.score <= gate * mean_score[tokens.row])


def _waiting(state: RowState, tokens: Tokens) -> Tokens:
    """Buffered tokens and new ones together, by row and by falling score, older first among equals."""
    row, slot = (state.buffer_score > -torch.inf).nonzero().unbind(-1)
    buffered = Tokens(
        row, state.buffer_keys[row, slot], state.buffer_values[row, slot], state.buffer_score[row, slot]
    )
    both = Tokens(*(torch.cat(parts) for parts in zip(buffered, tokens, strict=True)))
    by_score = both.score.sort(descending=True, stable=True).indices
    return _select(both, by_score[both.row[by_score].sort(stable=True).indices])


def _ranks(waiting: Tokens) -> tuple[Tensor, Tensor]:
    """Place of each token within its row [N], and how many its row has [N]."""
    row = waiting.row
    _, index, length = row.unique_consecutive(return_inverse=True, return_counts=True)
    start = length.cumsum(0) - length
    return torch.arange(len(row), device=row.device) - start[index], length[index]


def _fill_buffers(
    state: RowState, waiting: Tokens, rank: Tensor, fill: Tensor
) -> tuple[RowState, tuple[Tensor, Tensor, RowState]]:
    """Step 3 → the state with new buffers; and row, ordinal in the row and content of the new pivots."""
    capacity = state.buffer_score.shape[1]
    full = (rank // capacity + 1) * capacity <= fill
    rest, slot = _select(waiting, ~full), (rank % capacity)[~full]
    buffers = [torch.zeros_like(state.buffer_keys), torch.zeros_like(state.buffer_values)]
    buffers.append(torch.full_like(state.buffer_score, -torch.inf))
    for buffer, part in zip(buffers, rest[1:], strict=True):
        buffer[rest.row, slot] = part
    state = state._replace(buffer_keys=buffers[0], buffer_values=buffers[1], buffer_score=buffers[2])
    groups = Tokens(*(part[full].unflatten(0, (-1, capacity)) for part in waiting))
    return state, (groups.row[:, 0], rank[full][::capacity] // capacity, _aggregate(groups))


def _aggregate(groups: Tokens) -> RowState:
    """Groups of B tokens [n, B, …], best first → one pivot each."""
    unit = F.normalize(groups.keys, dim=-1)
    omega = (unit @ unit[:, 0, :, None])[..., 0].exp()  # [n, B]
    weight = omega.sum(1, keepdim=True)
    share = (omega / weight)[:, None]
    keys, values = share @ groups.keys, share @ groups.values
    count = torch.full_like(weight, omega.shape[1])
    return RowState(
        keys,
        values,
        weight,
        groups.score.sum(1, keepdim=True),
        count,
        keys[:, :0],
        values[:, :0],
        weight[:, :0],
    )


def _found_pivots(state: RowState, row: Tensor, ordinal: Tensor, pivots: RowState) -> int:
    """Step 4, in place, one new pivot per row at a time; → how often one was folded."""
    remerged = 0
    for turn in range(int(ordinal.max()) + 1 if len(ordinal) else 0):
        now = ordinal == turn
        remerged += fold_in(state, row[now], RowState(*(part[now] for part in pivots)))
    return remerged


def _free_slot(state: RowState, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first free pivot slot of each row [n], and which rows have none [n]."""
    free = state.members[rows] == 0
    return free.to(torch.uint8).argmax(-1), ~free.any(-1)


def _fold_lightest(state: RowState, rows: Tensor) -> Tensor:
    """Fold the pivot of least weight of each row into its nearest neighbour; → the slots made free [n]."""
    index = torch.arange(len(rows), device=rows.device)
    weight = state.weight[rows]
    victim = weight.argmin(-1)
    unit = F.normalize(state.pivot_keys[rows], dim=-1)
    cosine = (unit @ unit[index, victim, :, None])[..., 0]
    cosine[index, victim] = -torch.inf
    cosine, nearest = cosine.max(-1)
    joining = weight[index, victim] * (cosine - 1).exp()
    total = weight[index, nearest] + joining
    share = (joining / total)[:, None]
    for mean in (state.pivot_keys, state.pivot_values):
        mean[rows, nearest] = torch.lerp(mean[rows, nearest], mean[rows, victim], share)
    state.weight[rows, nearest] = total
    for tally in (state.score_sum, state.members):
        tally[rows, nearest] += tally[rows, victim]
    return victim


def _select(tokens: Tokens, index: Tensor) -> Tokens:
    return Tokens(*(part[index] for part in tokens))
