"""Rigid and similarity transforms between two worlds, estimated from corresponding points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Similarity:
    """target = scale · rotation · source + translation."""

    rotation: Array  # [3, 3]
    translation: Array  # [3]
    scale: float = 1.0

    def apply(self, points: Array) -> Array:
        """Move points [..., 3] of the source world into the target world."""
        return self.scale * points @ self.rotation.T + self.translation

    def apply_poses(self, world_from_camera: Array) -> Array:
        """Move camera poses [N, 4, 4]; they stay rigid, only their centres are scaled."""
        moved = world_from_camera.copy()
        moved[:, :3, :3] = self.rotation @ world_from_camera[:, :3, :3]
        moved[:, :3, 3] = self.apply(world_from_camera[:, :3, 3])
        return moved

    def after(self, first: Similarity) -> Similarity:
        """The transform that applies `first` and then this one."""
        return Similarity(
            self.rotation @ first.rotation, self.apply(first.translation), self.scale * first.scale
        )


IDENTITY = Similarity(np.eye(3), np.zeros(3))


def align_points(source: Array, target: Array, with_scale: bool) -> Similarity:
    """Least-squares transform of source [N, 3] onto target [N, 3] (row i belongs to row i).

    Points on one line leave the turn about that line free; any of the equally good turns is
    returned. Raises ValueError for unequal shapes, non-finite values, or points that all coincide.
    Source: S. Umeyama, IEEE TPAMI 13(4), 1991, equations 34-43.
    """
    _check_pairs(source, target)
    source_mean, target_mean = source.mean(0), target.mean(0)
    source_centred, target_centred = source - source_mean, target - target_mean
    covariance = target_centred.T @ source_centred / len(source)
    u, singular, vt = np.linalg.svd(covariance)
    if singular[0] <= np.finfo(np.float64).eps * np.abs(target).max() * np.abs(source).max():
        raise ValueError(
            "cannot align: all points of one side coincide (a zero-length trajectory?); "
            "use more frames or align='none'"
        )
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = float(singular @ sign / source_centred.var(0).sum()) if with_scale else 1.0
    return Similarity(rotation, target_mean - scale * rotation @ source_mean, scale)


def _check_pairs(source: Array, target: Array) -> None:
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 3:
        raise ValueError(
            f"source {source.shape} and target {target.shape}: expected two equal shapes [N, 3]; "
            "associate the two before aligning them"
        )
    if len(source) < 2:
        raise ValueError(f"cannot align {len(source)} point(s): at least 2 pairs are needed")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("cannot align: a point is NaN or infinite; drop such pairs first")
