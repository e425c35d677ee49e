"""Rotary position embedding in two dimensions (backbone tables of VGGT; RoPE, arXiv 2104.09864).

The first half of a head turns with the row, the second with the column. Frames have no position:
a rotated key never depends on when it was seen, so it may be kept, moved or averaged as it is.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BASE = 100.0


@cache  # for ever: recorded passes read these tables
@torch.inference_mode(False)  # a table first built while inferring must also serve training
def rotary_table(rows: int, columns: int, specials: int, head_width: int, device: torch.device) -> Tensor:
    """Cosines and sines [2, specials + rows·columns, head_width] of the tokens of one frame, float32.

    Patch (r, c) stands at (r + 1, c + 1); the special tokens in front stand at (0, 0), unrotated.
    """
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) + 1
    positions = torch.cat([torch.zeros(specials, 2, dtype=grid.dtype), grid])
    return rotary_angles(positions, head_width).to(device)


def rotary_angles(positions: Tensor, head_width: int) -> Tensor:
    """positions [P, 2] as (y, x) → cosines and sines [2, P, head_width], float32."""
    axis_width = head_width // 2
    frequencies = BASE ** (-torch.arange(0, axis_width, 2, dtype=torch.float32) / axis_width)
    angles = positions.float()[:, :, None] * frequencies  # [P, 2, axis_width / 2]
    angles = torch.cat([angles, angles], dim=-1).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys [..., P, head_width] by a table [2, P, head_width]; the result is float32.

    Within each axis half, element i pairs with element i + head_width / 4.
    """
    cosines, sines = table
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return x * cosines + turned * sines
