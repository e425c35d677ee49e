"""A head start for correspondence, on top of the network's own random weights.

Motion becomes visible once a global block finds, for a patch, the same surface in another frame, and
once values tell where that patch lies. From plain random weights both take a small network
thousands of steps; here they hold, roughly, from the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stac_core.network.aggregator import Aggregator

POSITION_AMPLITUDE = 0.5  # about that of the patch projection's output
LONGEST_WAVE = 100.0  # ratio of the longest to the shortest wave of the position code


@torch.no_grad()
def prepare_for_matching(aggregator: Aggregator) -> None:
    """Positions start as sines of row and column; keys of the global blocks start half like queries."""
    encoder, width = aggregator.patch_embed, aggregator.config.width
    encoder.pos_embed[:, 1:] = POSITION_AMPLITUDE * sine_positions(aggregator.config.position_grid, width)
    for name, weight in aggregator.global_blocks.named_parameters():
        if name.endswith("attn.qkv.weight"):
            queries, keys, _ = weight.split(width)
            keys.copy_((keys + queries) / 2**0.5)


def sine_positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of rows (first half) and columns (second half), [grid², width] in [-1, 1]."""
    frequencies = LONGEST_WAVE ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(grid)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [grid, width / 2]
    rows, columns = axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)
    return torch.cat([rows, columns], 1)
