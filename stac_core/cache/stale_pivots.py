"""Merging that is stricter where a pivot has not been touched for long: what was there may have moved.

Source: STAC (arXiv 2603.20284) admits that a moving object smears a voxel; the guard is ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stac_core.kernels.voxel_merge import MergeCounts, MergeRules, RowState, RowTokens, VoxelMerge

NEVER = 2.0  # a cosine that no token reaches


def merge_guarded(
    merge: VoxelMerge, state: RowState, tokens: RowTokens, rules: MergeRules, stale: Tensor, strict: float
) -> tuple[RowState, MergeCounts]:
    """`merge`, but a token less alike than `strict` does not join a stale pivot; it follows the others.

    stale: bool [R, G].
    """
    doubtful = _doubtful(state, tokens, stale, strict)
    state, counts = merge(state, RowTokens(*(part[~doubtful] for part in tokens)), rules)
    apart = RowTokens(*(part[doubtful] for part in tokens))
    state, more = merge(state, apart, replace(rules, threshold=NEVER))
    return state, MergeCounts(*(a + b for a, b in zip(counts, more, strict=True)))


def _doubtful(state: RowState, tokens: RowTokens, stale: Tensor, strict: float) -> Tensor:
    """Tokens [N] whose most similar pivot is stale and not similar enough."""
    unit = F.normalize(state.pivot_keys, dim=-1)[tokens.row]
    cosine = (unit @ F.normalize(tokens.keys, dim=-1)[..., None])[..., 0]
    best, pivot = cosine.masked_fill(state.members[tokens.row] == 0, -torch.inf).max(-1)
    return stale[tokens.row, pivot] & (best < strict)
