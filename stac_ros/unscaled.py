"""The warning that metres of odometry meet a map in a unit of its own."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

MOVED_M = 0.05  # beyond what a camera on a shaking mount or odometry at rest makes

logger = logging.getLogger(__name__)


class UnscaledOdometry:
    """Warns once, when odom → camera is seen to move. The frames of the camera's own driver never do."""

    def __init__(self) -> None:
        self._first: NDArray[np.float64] | None = None  # position [3]
        self._warned = False

    def see(self, odom_from_camera: NDArray[np.float64]) -> None:
        """The camera [4, 4] of the next image."""
        position = odom_from_camera[:3, 3]
        if self._first is None:
            self._first = position.copy()
        if not self._warned and np.linalg.norm(position - self._first) > MOVED_M:
            self._warned = True
            logger.warning(
                "the camera moves in frames.odom, in metres, but scale.mode is none: the map is in its own "
                "unit, so map → odom cannot fit; set scale.mode to odometry, or to fixed with scale.factor"
            )
