"""What the intrinsics of a camera may be. NumPy alone: a caller may have no other need of PyTorch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Fields of view in radians, each side of the image. One of 0, where the network's activation (a ReLU) ends,
# would be an infinite focal length.
NARROWEST_VIEW, WIDEST_VIEW = 1e-2, math.pi - 1e-2


def check_intrinsics(intrinsics: ArrayLike, height: int, width: int) -> NDArray[np.float64]:
    """Intrinsics [3, 3] in pixels of images of height × width, as they are.

    ValueError where no camera has them: a focal length that is not positive, or absurd for this size.
    """
    known = np.asarray(intrinsics, np.float64)
    if known.shape != (3, 3) or not np.isfinite(known).all() or not (np.diag(known)[:2] > 0).all():
        raise ValueError(
            f"intrinsics = {known.tolist()}: expected [3, 3], finite, with positive focal lengths"
        )
    focal = np.diag(known)[:2]
    views = 2 * np.arctan(np.array([width, height]) / 2 / focal)
    if not ((views > NARROWEST_VIEW) & (views < WIDEST_VIEW)).all():
        raise ValueError(
            f"intrinsics = {known.tolist()}: with focal lengths of {focal[0]:g} and {focal[1]:g} pixels, "
            f"images of {width}×{height} would show {views[0]:.3g} and {views[1]:.3g} radians, expected "
            f"{NARROWEST_VIEW} … {WIDEST_VIEW:.2f}: give focal lengths in pixels of these images"
        )
    return known
