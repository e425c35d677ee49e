"""The camera behind an image: calibrated where a calibration was received, else as predicted.

Without, or where `tracking.landmarks` is 0, the map lies where predicted intrinsics put it, since they belong
to the predicted poses.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from stac_ros.camera_messages import calibration_message

PATIENCE = 20  # chunks of images that may come before the first camera_info

logger = logging.getLogger(__name__)


class CameraCalibration:
    """The latest camera_info; it may come more rarely than the images."""

    def __init__(self) -> None:
        self._received: CameraInfo | None = None
        self.source = "predicted"  # or camera_info: what the last depth image was published with
        self._said: set[str] = set()
        self._unknown = 0  # chunks so far without a calibration

    def receive(self, message: CameraInfo) -> None:
        self._received = message

    def intrinsics(self, height: int, width: int) -> NDArray[np.float64] | None:
        """Intrinsics [3, 3] of images of this size, which are taken to be rectified; None = not known."""
        received = self._received
        if received is not None and self._fits(received, height, width):
            projection = np.array(received.p, np.float64).reshape(3, 4)[:, :3]  # of rectified images
            filled_in = np.isfinite(projection).all() and projection[0, 0] > 0 and projection[1, 1] > 0
            return projection if filled_in else np.array(received.k, np.float64).reshape(3, 3)
        self._unknown += received is None
        if self._unknown > PATIENCE:
            self._say_once(
                "images come without their camera_info: poses are as predicted, not refined; "
                "have the driver publish it, or remap camera_info to its topic"
            )
        return None

    def of_image(self, header: Header, height: int, width: int, predicted: NDArray[np.float64]) -> CameraInfo:
        """The calibration of an image of this size; `predicted` intrinsics [3, 3] where there is none."""
        received = self._received
        if received is None or not self._fits(received, height, width):
            self.source = "predicted"
            return calibration_message(predicted, height, width, header)
        self.source = "camera_info"
        return CameraInfo(
            header=header,
            height=height,
            width=width,
            distortion_model=received.distortion_model,
            d=received.d,
            k=received.k,
            r=received.r,
            p=received.p,
        )

    def _fits(self, received: CameraInfo, height: int, width: int) -> bool:
        if not (received.k[0] > 0 and received.k[4] > 0 and np.isfinite(received.k).all()):
            self._say_once("camera_info holds no calibration (focal length 0): intrinsics are predicted")
            return False
        if (received.height, received.width) != (height, width):
            size, own = f"{received.width}×{received.height}", f"{width}×{height}"
            self._say_once(f"camera_info is of {size} images, not of {own}: intrinsics are predicted")
            return False
        if any(received.d):
            self._say_once(
                "camera_info tells of a lens that distorts (d): fine if these images are rectified, else map "
                "rectified ones, such as image_rect"
            )
        return True

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)
