"""Merging that is stricter where a pivot has not been touched for long: what was there may have moved.

Source: STAC (arXiv 2603.20284) admits that a moving object smears a voxel; the guard is ours.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from stac_core.kernels.voxel_merge import MergeRules, RowState, RowTokens, VoxelMerge
from stac_core.kernels.voxel_merge_rows import cosines, in_use, only, rows_of

NEVER = 2.0  # a cosine that no token reaches


def merge_guarded(
    merge: VoxelMerge, state: RowState, tokens: RowTokens, rules: MergeRules, stale: Tensor, strict: float
) -> tuple[RowState, Tensor]:
    """`merge`, but a token less alike than `strict` does not join a stale pivot; it follows the others.

    stale: bool [R, G].
    """
    tokens = in_use(tokens)
    doubtful = _doubtful(state, tokens, stale, strict)
    state, counts = merge(state, only(tokens, ~doubtful), rules)
    state, more = merge(state, only(tokens, doubtful), replace(rules, threshold=NEVER))
    return state, counts + more


def _doubtful(state: RowState, tokens: RowTokens, stale: Tensor, strict: float) -> Tensor:
    """Tokens [N], by `order`, whose most similar pivot is stale and not similar enough."""
    row, keys = rows_of(tokens), tokens.keys[tokens.order].float()
    best, pivot = cosines(state, row, keys).max(-1)
    return stale[row, pivot] & (best < strict)
