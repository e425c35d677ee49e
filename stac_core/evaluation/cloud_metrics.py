"""Errors of a reconstructed point cloud against a true one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Array = NDArray[np.float64]
_NEIGHBOURS = 30  # for a normal; what the published reconstruction benchmarks use


def voxel_downsample(points: Array, voxel_size: float) -> Array:
    """One point, the mean, per occupied cell; [N, 3] to [M, 3]. Non-finite points are left out.

    The grid starts half a cell below the smallest corner, so that a cloud of one cell size apart
    keeps its points.
    """
    if not voxel_size > 0:
        raise ValueError(f"voxel_size = {voxel_size}: must be positive")
    finite = np.isfinite(points)
    if not finite.all():
        points = points[finite.all(1)]
    if not len(points):
        return points
    cell, occupied = _number_cells(points, voxel_size)
    count = np.bincount(cell, minlength=occupied)
    sums = [np.bincount(cell, weights=points[:, axis], minlength=occupied) for axis in range(3)]
    return np.stack(sums, 1) / count[:, None]


def _number_cells(points: Array, voxel_size: float) -> tuple[NDArray[np.int64], int]:
    """The number of each point's cell [N], counted from 0 without gaps, and how many there are.

    One integer per cell and one axis at a time: many times quicker than sorting triples.
    """
    flat = np.zeros(len(points), np.int64)
    if np.log2(np.ptp(points, 0) / voxel_size + 2).sum() >= 63:  # cells per axis, in one integer
        raise ValueError("the cloud spans too many cells: raise voxel_size or drop far outliers")
    for axis in range(3):
        column = points[:, axis]
        index = ((column - (column.min() - voxel_size / 2)) / voxel_size).astype(np.int64)
        flat = flat * (int(index.max()) + 1) + index
    order = np.argsort(flat)
    is_first = np.diff(flat[order], prepend=-1) != 0
    number = np.empty_like(flat)
    number[order] = np.cumsum(is_first) - 1
    return number, int(is_first.sum())


def estimate_normals(points: Array) -> Array:
    """Unit normal of the plane through each point's nearest neighbours, of either sign, [N, 3]."""
    if len(points) < 3:
        raise ValueError(f"normals of {len(points)} point(s): at least 3 are needed")
    _, nearest = cKDTree(points).query(points, k=min(_NEIGHBOURS, len(points)), workers=-1)
    normals = np.empty_like(points)
    for start in range(0, len(points), 100_000):  # bounds the [N, k, 3] array
        local = points[nearest[start : start + 100_000]]
        local = local - local.mean(1, keepdims=True)
        normals[start : start + 100_000] = np.linalg.eigh(np.swapaxes(local, 1, 2) @ local)[1][:, :, 0]
    return normals


@dataclass(frozen=True)
class CloudErrors:
    """Lengths in the unit of the truth; shares between 0 and 1."""

    accuracy_mean: float  # reconstruction → truth
    accuracy_median: float
    completeness_mean: float  # truth → reconstruction
    completeness_median: float
    normal_consistency: float  # mean |cos| over both directions
    precision: float  # share of the reconstruction within the threshold
    recall: float  # share of the truth within the threshold
    f_score: float


def cloud_errors(reconstruction: Array, truth: Array, threshold: float = 0.05) -> CloudErrors:
    """Compare clouds [N, 3] and [M, 3] that lie in one world and have similar density.

    Downsample both first: the time grows with the number of points, the answer hardly changes.
    threshold: the distance of the F-score. Raises ValueError for empty or non-finite clouds.
    Source: A. Knapitsch et al., Tanks and Temples, 2017 (F-score); D. Azinović et al., Neural
    RGB-D, 2022 (accuracy, completeness, normal consistency).
    """
    for name, cloud in (("reconstruction", reconstruction), ("truth", truth)):
        if not len(cloud) or not np.isfinite(cloud).all():
            raise ValueError(f"{name}: {len(cloud)} points; expected finite points [N, 3], at least 3")
    to_truth, true_partner = cKDTree(truth).query(reconstruction, workers=-1)
    to_ours, our_partner = cKDTree(reconstruction).query(truth, workers=-1)
    ours_normals, true_normals = estimate_normals(reconstruction), estimate_normals(truth)
    agreement = np.abs(np.sum(ours_normals * true_normals[true_partner], 1)).mean()
    agreement += np.abs(np.sum(true_normals * ours_normals[our_partner], 1)).mean()
    precision, recall = float(np.mean(to_truth < threshold)), float(np.mean(to_ours < threshold))
    return CloudErrors(
        accuracy_mean=float(to_truth.mean()),
        accuracy_median=float(np.median(to_truth)),
        completeness_mean=float(to_ours.mean()),
        completeness_median=float(np.median(to_ours)),
        normal_consistency=float(agreement / 2),
        precision=precision,
        recall=recall,
        f_score=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    )
