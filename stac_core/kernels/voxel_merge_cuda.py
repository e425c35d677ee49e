"""Merging evicted tokens into voxel rows by the kernel of `cuda_ext/`: one warp per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stac_core.kernels.cuda_library import check_on_cuda
from stac_core.kernels.voxel_merge import LIKE, MergeRules, RowState, RowTokens, check_merge
from stac_core.kernels.voxel_merge_rows import in_use

MOST_PIVOTS, MOST_CHANNELS = 32, 128  # of a row: a lane each, and four channels per lane


def voxel_merge(state: RowState, tokens: RowTokens, rules: MergeRules) -> tuple[RowState, Tensor]:
    """The contract of `voxel_merge.py`, for up to 32 pivots per row and heads up to 128 wide."""
    check_merge(state, tokens)
    _, pivots, dim = state.pivot_keys.shape
    if pivots > MOST_PIVOTS or dim > MOST_CHANNELS:
        limits = f"at most {MOST_PIVOTS} and {MOST_CHANNELS}"
        raise ValueError(f"state.pivot_keys: {pivots} pivots of {dim} channels, this backend has {limits}")
    check_on_cuda(LIKE, tokens.order)
    start, order, *tokens_of = in_use(tokens)
    keys, values, score = (part[order].float() for part in tokens_of)  # the kernel reads float32 in one piece
    *after, counts = torch.ops.stac.voxel_merge(
        [part.contiguous() for part in state], torch.arange(len(order), device=order.device), start,
        keys, values, score, rules.threshold, rules.gate, rules.inertia or math.inf,
    )  # fmt: skip
    return RowState(*after), counts.sum(0)
