"""Fixed worlds that no run ever trains on, and the figures a network reaches on them."""

from __future__ import annotations

import torch

from stac_core.cache.one_pass import OnePass
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.training.clips import height_of, held_out_seed
from stac_core.training.figures import Figures, figures_of, mean_figures
from stac_core.training.sequences import Sequences
from stac_core.worlds import World, WorldConfig


def held_out_worlds(first: int, count: int, frames: int, width: int) -> list[Sequences]:
    """The first frames of held-out worlds first … first + count − 1, 4:3, one sequence each."""
    height = height_of(width)
    worlds = (
        World(held_out_seed(first + i), WorldConfig()).render(0, frames, height, width) for i in range(count)
    )
    return [Sequences(**vars(world)) for world in worlds]


@torch.inference_mode()
def measure(network: CausalVGGT, sequences: list[Sequences]) -> Figures:
    """Mean figures of one causal pass per sequence, in the network's own precision."""
    device = next(network.parameters()).device
    rows = []
    for sequence in sequences:
        prediction = network(sequence.images.to(device), OnePass("causal")).to_host()
        estimate = prediction.depth[0], prediction.world_from_camera[0]
        rows.append(figures_of(*estimate, sequence.depth[0], sequence.world_from_camera[0]))
    return mean_figures(rows)
