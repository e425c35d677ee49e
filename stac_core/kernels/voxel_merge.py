"""Contract of merging evicted tokens into the rows of a voxel memory.

A row is one (voxel, layer, head). It holds up to G pivots, weighted means of tokens, and a buffer of
single tokens, always fewer than B. All rows of one call are independent of each other.

1. A token joins the most similar pivot of its row where their cosine reaches the threshold, weighted by
   exp(cosine). Similarities are those before the call, so the order of tokens does not matter.
2. Other tokens of rows with pivots are dropped below gate · (mean score of all that was merged there).
3. What remains waits in the buffer. While B or more wait, the B best scored become a pivot, weighted by
   exp(cosine to the best of them).
4. A pivot that finds its row full replaces the one of least weight W, which joins its most similar
   neighbour, cosine c, with weight W·exp(c − 1).

Source: STAC (arXiv 2603.20284), merging evicted tokens; rounds instead of leftovers are ours.
`voxel_merge_torch.voxel_merge` is the specification in code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stac_core.kernels.attend import DTYPES
from stac_core.kernels.checks import check_tensor

LEAST_SCORE = 1e-6
LIKE = "tokens.order"  # whose device all arguments share


class RowState(NamedTuple):
    """The content of R rows, in float32. Absent pivots have no members, absent buffered tokens score −inf."""

    pivot_keys: Tensor  # [R, G, D]
    pivot_values: Tensor  # [R, G, D]
    weight: Tensor  # [R, G]
    score_sum: Tensor  # [R, G]
    members: Tensor  # [R, G] tokens merged into the pivot
    buffer_keys: Tensor  # [R, B, D]
    buffer_values: Tensor  # [R, B, D]
    buffer_score: Tensor  # [R, B]


class RowTokens(NamedTuple):
    """Evicted tokens by row: those of row r are numbered `order[start[r]]` … `order[start[r + 1] − 1]`."""

    start: Tensor  # [R + 1] int64, places in `order`
    order: Tensor  # [N] int64, numbers of tokens, each less than M; of equal scores the first is the older
    keys: Tensor  # [M, D] float32 or of 16 bits
    values: Tensor  # [M, D] like the keys
    score: Tensor  # [M] float32


@dataclass(frozen=True)
class MergeRules:
    """Thresholds of the steps above."""

    threshold: float
    gate: float
    inertia: float = 0.0  # largest weight of a pivot; 0 = none


class MergeCounts(NamedTuple):
    """What happened to the tokens, and how often pivots were made and folded."""

    merged: int
    buffered: int
    gated: int
    aggregated: int
    remerged: int

    @property
    def tokens(self) -> int:
        """All that there were."""
        return self.merged + self.buffered + self.gated


class VoxelMerge(Protocol):
    """One implementation of the contract."""

    def __call__(self, state: RowState, tokens: RowTokens, rules: MergeRules) -> tuple[RowState, Tensor]:
        """The state after the call, and the numbers of `MergeCounts` [5] int64; the given state stays."""


def check_merge(state: RowState, tokens: RowTokens) -> None:
    """Raise ValueError for the first argument outside the contract, before anything is launched."""
    if state.pivot_keys.ndim != 3 or state.buffer_score.ndim != 2:
        shapes = f"{list(state.pivot_keys.shape)} and {list(state.buffer_score.shape)}"
        raise ValueError(f"state: expected pivot_keys [R, G, D] and buffer_score [R, B], got {shapes}")
    rows, pivots, dim = state.pivot_keys.shape
    buffer, count, device = state.buffer_score.shape[-1], len(tokens.score), tokens.order.device
    expected = [[rows, pivots, dim]] * 2 + [[rows, pivots]] * 3 + [[rows, buffer, dim]] * 2 + [[rows, buffer]]
    for name, part, shape in zip(state._fields, state, expected, strict=True):
        check_tensor(f"state.{name}", part, shape, torch.float32, device, LIKE)
    if tokens.keys.dtype not in DTYPES:
        raise ValueError(f"tokens.keys: expected float32, bfloat16 or float16, got {tokens.keys.dtype}")
    dtype = tokens.keys.dtype
    for name, part, shape, kind in (
        ("start", tokens.start, [rows + 1], torch.int64),
        ("order", tokens.order, [len(tokens.order)], torch.int64),
        ("keys", tokens.keys, [count, dim], dtype),
        ("values", tokens.values, [count, dim], dtype),
        ("score", tokens.score, [count], torch.float32),
    ):
        check_tensor(f"tokens.{name}", part, shape, kind, device, LIKE)
    if pivots < 2 or buffer < 2:
        raise ValueError(
            f"state: a row needs at least 2 pivots and 2 buffered tokens, got {pivots} and {buffer}"
        )
