"""Errors of a camera path: absolute (ATE) and relative (RPE)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stac_core.evaluation.alignment import IDENTITY, Similarity, align_points
from stac_core.evaluation.trajectory import Trajectory

Array = NDArray[np.float64]
POSE_ALIGNMENTS = ("sim3", "se3", "none")


def align_trajectory(estimate: Trajectory, truth: Trajectory, align: str) -> Similarity:
    """The transform that best moves the estimated camera centres onto the true ones.

    align: "sim3" (with scale, for streams without a metric unit), "se3", or "none". Raises ValueError for
    paths that do not match pose by pose, and for fewer than three poses, which say nothing once aligned.
    """
    if align not in POSE_ALIGNMENTS:
        raise ValueError(f"align = {align!r}: choose one of {', '.join(POSE_ALIGNMENTS)}")
    if len(estimate) != len(truth):
        raise ValueError(f"{len(estimate)} estimated and {len(truth)} true poses: pair them by stamp first")
    if align == "none":
        return IDENTITY
    if len(estimate) < 3:
        raise ValueError(
            f"cannot align paths of {len(estimate)} poses: at least 3 are needed, or align='none'"
        )
    return align_points(estimate.centres, truth.centres, with_scale=align == "sim3")


def absolute_errors(estimate: Trajectory, truth: Trajectory, align: str = "sim3") -> tuple[Array, Array]:
    """Distance of the centres [N], in the unit of truth, and angle of the axes [N], in degrees.

    Source: J. Sturm et al., A Benchmark for the Evaluation of RGB-D SLAM Systems, IROS 2012.
    """
    moved = align_trajectory(estimate, truth, align).apply_poses(estimate.world_from_camera)
    distance = np.linalg.norm(moved[:, :3, 3] - truth.centres, axis=1)
    difference = np.swapaxes(truth.world_from_camera[:, :3, :3], 1, 2) @ moved[:, :3, :3]
    return distance, rotation_angles(difference)


def relative_errors(
    estimate: Trajectory, truth: Trajectory, delta: int = 1, align: str = "sim3"
) -> tuple[Array, Array]:
    """Drift between every two poses `delta` apart: length [N - delta] and angle in degrees.

    Alignment matters only through its scale.
    """
    if not 1 <= delta < len(estimate):
        raise ValueError(
            f"delta = {delta}: must lie between 1 and {len(estimate) - 1} for {len(estimate)} poses"
        )
    moved = align_trajectory(estimate, truth, align).apply_poses(estimate.world_from_camera)
    ours = np.linalg.inv(moved[:-delta]) @ moved[delta:]
    theirs = np.linalg.inv(truth.world_from_camera[:-delta]) @ truth.world_from_camera[delta:]
    error = np.linalg.inv(theirs) @ ours
    return np.linalg.norm(error[:, :3, 3], axis=1), rotation_angles(error[:, :3, :3])


def rotation_angles(rotation: Array) -> Array:
    """Angle in degrees of rotations [N, 3, 3], exact at both small and large angles."""
    skew = rotation - np.swapaxes(rotation, 1, 2)
    sine = np.linalg.norm(np.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], 1), axis=1) / 2
    cosine = (np.trace(rotation, axis1=1, axis2=2) - 1) / 2
    return np.degrees(np.arctan2(sine, cosine))


def summarise(errors: Array) -> dict[str, float]:
    """Root mean square, mean, median and largest of an error per frame."""
    return {
        "rmse": float(np.sqrt(np.mean(errors**2))),
        "mean": float(errors.mean()),
        "median": float(np.median(errors)),
        "max": float(errors.max()),
    }


def pose_errors(estimate: Trajectory, truth: Trajectory, align: str = "sim3") -> dict[str, float]:
    """The pose columns of a result row; lengths in the unit of truth, angles in degrees.

    Raises ValueError for paths that do not match frame by frame or have no extent to align.
    """
    ate, ate_angle = absolute_errors(estimate, truth, align)
    rpe, rpe_angle = relative_errors(estimate, truth, align=align)
    return {
        **{f"ate_{name}": value for name, value in summarise(ate).items()},
        "ate_rotation_rmse_deg": summarise(ate_angle)["rmse"],
        "rpe_rmse": summarise(rpe)["rmse"],
        "rpe_rotation_rmse_deg": summarise(rpe_angle)["rmse"],
        "scale": align_trajectory(estimate, truth, align).scale,
        "path_length": truth.length,
        "poses": float(len(truth)),
    }
