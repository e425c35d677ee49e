"""Quaternion ↔ rotation matrix: the only seam to a rotation library.

A ROS installation has `tf_transformations`; elsewhere `transforms3d`, the library it wraps, does
the same. Quaternions are in ROS order everywhere: x, y, z, w.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

try:
    import tf_transformations
except ImportError:
    tf_transformations = None
    from transforms3d import quaternions as _wxyz


def rotation_from_quaternion(xyzw: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 3×3 rotation of a quaternion [4]; its length is normalised first.

    Raises ValueError for a quaternion without direction (zero or not finite).
    """
    length = float(np.linalg.norm(xyzw))
    if not np.isfinite(length) or length < 1e-6:
        raise ValueError(f"quaternion {[float(part) for part in xyzw]} (x, y, z, w) is no rotation")
    unit = np.asarray(xyzw, dtype=np.float64) / length
    if tf_transformations:
        return np.asarray(tf_transformations.quaternion_matrix(unit))[:3, :3]
    return np.asarray(_wxyz.quat2mat(np.roll(unit, 1)))


def pose_matrix(translation: NDArray[np.float64], xyzw: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rigid 4×4 matrix of a translation [3] and a quaternion [4]."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_from_quaternion(xyzw)
    matrix[:3, 3] = translation
    return matrix


def quaternion_from_rotation(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """The unit quaternion [4] of a 3×3 rotation, w ≥ 0."""
    if tf_transformations:
        matrix = np.eye(4)
        matrix[:3, :3] = rotation
        xyzw = np.asarray(tf_transformations.quaternion_from_matrix(matrix))
    else:
        xyzw = np.roll(_wxyz.mat2quat(np.asarray(rotation, dtype=np.float64)), -1)
    return -xyzw if xyzw[3] < 0 else xyzw


def interpolate_quaternions(
    first: NDArray[np.float64], second: NDArray[np.float64], fraction: float
) -> NDArray[np.float64]:
    """Spherical linear interpolation along the shorter arc between two unit quaternions [4]."""
    cosine = float(np.dot(first, second))
    if cosine < 0:  # q and -q are the same rotation
        second, cosine = -second, -cosine
    angle = np.arccos(min(cosine, 1.0))
    if angle < 1e-6:  # sin(angle) would vanish; the straight line is exact to that order
        mixed = (1 - fraction) * first + fraction * second
    else:
        mixed = np.sin((1 - fraction) * angle) * first + np.sin(fraction * angle) * second
    return mixed / np.linalg.norm(mixed)
