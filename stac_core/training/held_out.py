"""Fixed worlds that no run ever trains on, and the figures a network reaches on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stac_core.cache.one_pass import OnePass
from stac_core.network.causal_vggt import CausalVGGT
from stac_core.training.clips import held_out_seed
from stac_core.training.config import PATCH
from stac_core.training.figures import depth_error, rotation_errors, trajectory_error, turns
from stac_core.training.sequences import Sequences, join, normalise
from stac_core.worlds import World, WorldConfig


@dataclass(frozen=True)
class Figures:
    """Means over sequences; each error beside that of standing still in front of constant depth."""

    depth: float  # AbsRel, one scale per sequence
    depth_still: float
    rotation_deg: float  # frame i against frame 0
    rotation_still_deg: float
    trajectory: float  # ATE after Sim(3), over the path length


def held_out_sequences(width: int, device: torch.device, count: int = 24, frames: int = 8) -> Sequences:
    """The first frames of the held-out worlds, normalised, 4:3."""
    height = round(0.75 * width / PATCH) * PATCH
    worlds = [World(held_out_seed(i), WorldConfig()).render(0, frames, height, width) for i in range(count)]
    parts = [Sequences(w.images, w.depth, w.world_from_camera, w.intrinsics) for w in worlds]
    return normalise(join(parts).to(device))


@torch.inference_mode()
def measure(network: CausalVGGT, sequences: Sequences) -> Figures:
    """One causal pass per sequence, in the network's own precision."""
    rows = [_measure_one(network, sequences.one(b)) for b in range(len(sequences.images))]
    return Figures(*[mean_known([row[i] for row in rows]) for i in range(5)])


def _measure_one(network: CausalVGGT, sequence: Sequences) -> tuple[float, float, float, float, float]:
    prediction = network(sequence.images, OnePass("causal")).to_host()
    depth, valid = sequence.depth[0].cpu(), sequence.valid[0].cpu()
    truth, estimate = sequence.world_from_camera[0].cpu(), prediction.world_from_camera[0]
    return (
        depth_error(prediction.depth[0], depth, valid),
        depth_error(torch.ones_like(depth), depth, valid),
        rotation_errors(estimate, truth).mean().item(),
        turns(truth).mean().item(),
        trajectory_error(estimate, truth),
    )


def mean_known(values: list[float]) -> float:
    """Mean of the values that are numbers; NaN if none is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
