"""What the core says of variances, as covariances of ROS: x, y, z, then about x, y, z."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNTOLD = 1e6  # m² and rad²: a filter takes nothing from a value of such a variance

Variance = NDArray[np.float64]  # [2] of a turn in radians², of a place in squared lengths, for each axis


def covariance(variance: Variance | None) -> NDArray[np.float64]:
    """[36] by rows, alike in all frames as it is alike along all axes; all zero = unknown."""
    if variance is None:
        return np.zeros(36)
    turn, place = np.nan_to_num(variance, nan=UNTOLD, posinf=UNTOLD).clip(max=UNTOLD)
    return np.diag(np.repeat([place, turn], 3)).ravel()


def no_velocity(variance: Variance | None) -> NDArray[np.float64]:
    """[36] where there is none to tell: not standing still for certain, where certainties are said at all."""
    return covariance(None if variance is None else np.full(2, UNTOLD))
