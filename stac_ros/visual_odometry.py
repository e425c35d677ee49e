"""Where the camera is by its own motion alone: an odometry frame, in which no pose ever jumps (REP-105)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from stac_ros.covariances import Variance
from stac_ros.mapped_frame import MappedFrame


class VisualOdometry:
    """The steps from image to image, put together. What a closed loop takes back in the map is kept here.

    The frame lies in the map as the first image does; from there on it drifts against it.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The next image is the first one."""
        self._odom_from_camera: NDArray[np.float64] | None = None
        self.variance: Variance | None = None  # of the latest pose, as far as steps err independently

    def next(self, frame: MappedFrame) -> NDArray[np.float64]:
        """odom_from_camera [4, 4] of the next image; where no step leads to it, the camera has not moved."""
        if self._odom_from_camera is None:
            self._odom_from_camera, self.variance = frame.map_from_camera, frame.pose_variance
        elif frame.last_from_camera is not None:
            self._odom_from_camera = _rigid(self._odom_from_camera @ frame.last_from_camera)
            steps = self.variance, frame.step_variance
            self.variance = None if steps[0] is None or steps[1] is None else steps[0] + steps[1]
        return self._odom_from_camera


def _rigid(pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without what rounding adds to a rotation over many steps."""
    pose = pose.copy()
    pose[:3, :3] = Rotation.from_matrix(pose[:3, :3]).as_matrix()
    return pose
