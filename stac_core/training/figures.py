"""How good a reconstruction is, beside the answer "stand still, constant depth". Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stac_core.evaluation.alignment import align_points
from stac_core.evaluation.depth_metrics import depth_errors
from stac_core.evaluation.trajectory_metrics import rotation_angles


@dataclass(frozen=True)
class Figures:
    """Figures of one sequence, or their means over several; NaN where a sequence cannot tell."""

    depth: float  # AbsRel, one scale per sequence
    depth_still: float
    rotation_deg: float  # mean over frames 1.. of the turn against frame 0
    rotation_still_deg: float
    trajectory: float  # ATE after a Sim(3) fit, over the length of the path


def figures_of(depth: Tensor, world_from_camera: Tensor, true_depth: Tensor, true_poses: Tensor) -> Figures:
    """Compare S frames on the host: depth [S, H, W] (true 0 = unknown), poses world_from_camera [S, 4, 4]."""
    truth = true_poses.double().numpy()
    estimate = world_from_camera.double().numpy()
    standing = np.tile(np.eye(4), (len(truth), 1, 1))
    return Figures(
        depth=depth_error(depth.numpy(), true_depth.numpy()),
        depth_still=depth_error(np.ones_like(depth.numpy()), true_depth.numpy()),
        rotation_deg=turn_error(estimate, truth),
        rotation_still_deg=turn_error(standing, truth),
        trajectory=path_error(estimate, truth),
    )


def depth_error(depth: np.ndarray, truth: np.ndarray) -> float:
    """Mean |s·depth − truth| / truth over known pixels; s = median ratio, one for the whole sequence."""
    return depth_errors(list(depth), list(truth))["abs_rel"] if (truth > 0).any() else math.nan


def turn_error(world_from_camera: np.ndarray, truth: np.ndarray) -> float:
    """Mean angle in degrees by which frames 1.. are turned wrongly against frame 0. Poses [S, 4, 4]."""
    estimate, target = (
        poses[:1, :3, :3].swapaxes(1, 2) @ poses[1:, :3, :3] for poses in (world_from_camera, truth)
    )
    return float(rotation_angles(estimate.swapaxes(1, 2) @ target).mean())


def path_error(world_from_camera: np.ndarray, truth: np.ndarray) -> float:
    """ATE (root mean square after a Sim(3) fit) over the true path length. Poses [S, 4, 4].

    NaN where the true camera does not move; 1 where the estimated one does not.
    """
    estimate, target = world_from_camera[:, :3, 3], truth[:, :3, 3]
    length = np.linalg.norm(np.diff(target, axis=0), axis=1).sum()
    if length < 1e-6:
        return math.nan
    if np.ptp(estimate, axis=0).max() < 1e-9:
        return 1.0
    moved = align_points(estimate, target, with_scale=True).apply(estimate)
    return float(np.sqrt(((moved - target) ** 2).sum(1).mean()) / length)


def mean_figures(rows: list[Figures]) -> Figures:
    """Mean of each figure over the sequences that know it."""
    columns = zip(*(vars(row).values() for row in rows), strict=True)
    return Figures(*(_mean_known([value for value in column if math.isfinite(value)]) for column in columns))


def _mean_known(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
