"""Merging evicted tokens into voxel rows by the kernel of `cuda_ext/`: one warp per row."""

from __future__ import annotations

import math

import torch

from stac_core.kernels.cuda_library import check_on_cuda, require
from stac_core.kernels.voxel_merge import MergeCounts, MergeRules, RowState, RowTokens
from stac_core.kernels.voxel_merge_rows import group_by_row

__all__ = ["require", "voxel_merge"]

MOST_PIVOTS, MOST_CHANNELS = 32, 128  # of a row: a lane each, and four channels per lane


def voxel_merge(state: RowState, tokens: RowTokens, rules: MergeRules) -> tuple[RowState, MergeCounts]:
    """The contract of `voxel_merge.py`, for up to 32 pivots per row and heads up to 128 wide."""
    state, tokens, order, start = group_by_row(state, tokens)
    _, pivots, dim = state.pivot_keys.shape
    if pivots > MOST_PIVOTS or dim > MOST_CHANNELS:
        limits = f"at most {MOST_PIVOTS} and {MOST_CHANNELS}"
        raise ValueError(f"state.pivot_keys: {pivots} pivots of {dim} channels, this backend has {limits}")
    check_on_cuda("tokens.row", tokens.row)
    *after, counts = torch.ops.stac.voxel_merge(
        list(state), order, start, tokens.keys, tokens.values, tokens.score,
        rules.threshold, rules.gate, rules.inertia or math.inf,
    )  # fmt: skip
    return RowState(*after), MergeCounts(*counts.sum(0).tolist())
