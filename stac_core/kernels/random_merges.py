"""Random merges whose decisions do not hang on rounding, to compare backends of `voxel_merge` with."""

from __future__ import annotations

import torch

from stac_core.kernels.voxel_merge import MergeRules, RowState, RowTokens
from stac_core.kernels.voxel_merge_rows import cosines, group_by_row, only, rows_of

RULES = MergeRules(threshold=0.8, gate=0.2)
MARGIN = 1e-3  # of a cosine to the threshold, or between two cosines


def empty_state(rows: int, pivots: int, buffer: int, dim: int) -> RowState:
    keys, buffered = torch.zeros(rows, pivots, dim), torch.zeros(rows, buffer, dim)
    numbers = torch.zeros(rows, pivots)
    nothing = torch.full((rows, buffer), -torch.inf)
    return RowState(
        keys, keys.clone(), numbers, numbers.clone(), numbers.clone(), buffered, buffered.clone(), nothing
    )


def random_tokens(rows: int, count: int, dim: int, seed: int) -> RowTokens:
    """Tokens scattered around a few directions per row; row 0 gets none, row 1 a fifth of all."""
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(1, rows, (count,), generator=g)
    row[: count // 5] = 1
    directions = torch.randn(rows, 3, dim, generator=torch.Generator().manual_seed(7))
    pick = torch.randint(0, 3, (count,), generator=g)
    noise = torch.randn(count, dim, generator=g) * torch.rand(count, 1, generator=g)
    keys = (directions[row, pick] + noise) * (0.5 + torch.rand(count, 1, generator=g))
    score = torch.rand(count, generator=g) ** 2
    return group_by_row(row, rows, keys, torch.randn(count, dim, generator=g), score)


def in_16_bits(tokens: RowTokens) -> RowTokens:
    """As a stream of bfloat16 hands them over."""
    return tokens._replace(keys=tokens.keys.bfloat16(), values=tokens.values.bfloat16())


def decisive(state: RowState, tokens: RowTokens, rules: MergeRules = RULES) -> RowTokens:
    """Without the tokens whose pivot another rounding might choose differently."""
    row, keys = rows_of(tokens), tokens.keys[tokens.order].float()
    two = cosines(state, row, keys).topk(2).values
    clear = ((two[:, 0] - rules.threshold).abs() > MARGIN) & (
        (two[:, 0] - two[:, 1] > MARGIN) | (two[:, 0] < 0)
    )
    return only(tokens, clear)
