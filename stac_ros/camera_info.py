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

from stac_core import check_intrinsics
from stac_ros.camera_messages import calibration_message
from stac_ros.images import ImageError
from stac_ros.rectify import Rectifier, rectified_intrinsics

PATIENCE = 20  # chunks of images that may come before the first camera_info

logger = logging.getLogger(__name__)


class CameraCalibration:
    """The latest camera_info; it may come more rarely than the images.

    raw: the images come with the distortion of their lens, and `rectified` removes it; else they are taken to
    be rectified. Everything else is about rectified images.
    """

    def __init__(self, raw: bool = False) -> None:
        self._rectifier = Rectifier() if raw else None
        self._received: CameraInfo | None = None
        self.source = "predicted"  # or camera_info: what the intrinsics of the latest image are
        self._said: set[str] = set()
        self._unknown = 0  # chunks so far without a calibration

    def receive(self, message: CameraInfo) -> None:
        self._received = message

    def rectified(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The image [height, width, 3] without distortion. Only the inference thread may call it.

        ImageError where there is no calibration for it.
        """
        if self._rectifier is None:
            return image
        received = self._received
        if received is None:
            raise ImageError(
                "no camera_info",
                "an image came before its camera_info and cannot be rectified: have the driver publish it "
                "(stac-replay: --calibration; launch, stac-ros: calibration:=), set input.camera_info_qos if "
                "it is latched, remap camera_info to its topic, or set input.rectify to false",
            )
        try:
            usable_intrinsics(received, *image.shape[:2])
            return self._rectifier.rectify(image, received)
        except ValueError as error:
            text = f"{error}; until then images cannot be rectified, or set input.rectify to false"
            raise ImageError("camera_info", text) from error

    def intrinsics(self, height: int, width: int) -> NDArray[np.float64] | None:
        """Intrinsics [3, 3] of rectified images of this size; None = not known."""
        received = self._received
        self._unknown += received is None
        if received is None and self._unknown > PATIENCE:
            self._say_once(
                "images come without their camera_info: poses are as predicted, not refined; have the driver "
                "publish it (stac-replay: --calibration; launch, stac-ros: calibration:=), remap camera_info "
                "to its topic, or set input.camera_info_qos if it is latched"
            )
        return self._usable(received, height, width)

    def of_image(self, header: Header, height: int, width: int, predicted: NDArray[np.float64]) -> CameraInfo:
        """The calibration of an image of this size; `predicted` intrinsics [3, 3] where there is none."""
        received = self._received
        intrinsics = self._usable(received, height, width)
        if received is None or intrinsics is None:
            return calibration_message(predicted, height, width, header)
        if self._rectifier is not None:
            return calibration_message(intrinsics, height, width, header)
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

    def _usable(self, received: CameraInfo | None, height: int, width: int) -> NDArray[np.float64] | None:
        """Intrinsics [3, 3], where they fit."""
        found = self._fitting(received, height, width)
        self.source = "predicted" if found is None else "camera_info"
        return found

    def _fitting(self, received: CameraInfo | None, height: int, width: int) -> NDArray[np.float64] | None:
        """The same; why they do not fit, or what is doubtful about them, is said once."""
        if received is None:
            return None
        try:
            intrinsics = usable_intrinsics(received, height, width)
        except ValueError as error:
            self._say_once(f"{error}; until then intrinsics are predicted")
            return None
        if self._rectifier is None:
            self._tell_of_distortion(received)
        return intrinsics

    def _tell_of_distortion(self, received: CameraInfo) -> None:
        """A camera_info cannot say whether images are rectified: that of image_rect is that of image_raw."""
        if any(received.d) or received.distortion_model == "equidistant":
            self._say_once(
                "camera_info tells of a lens that distorts (d): fine if these images are rectified, such as "
                "image_rect; if they are raw, set input.rectify to true"
            )
        if received.k[1] or received.p[1]:
            self._say_once(
                "camera_info tells of skewed pixels (second number of k or p), which is ignored: fine if "
                "these images are rectified; if they are raw, set input.rectify to true, which removes it"
            )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)


def usable_intrinsics(info: CameraInfo, height: int, width: int) -> NDArray[np.float64]:
    """Intrinsics [3, 3] of rectified images of this size; ValueError, with the cure, where there are none."""
    if not (info.k[0] > 0 and info.k[4] > 0 and np.isfinite(info.k).all()):
        raise ValueError("camera_info holds no calibration (focal length 0): calibrate the camera")
    if (info.height, info.width) != (height, width):
        size, own = f"{info.width}×{info.height}", f"{width}×{height}"
        raise ValueError(
            f"camera_info is of {size} images, not of {own}{_cut(info)}: calibrate the camera in this size"
        )
    try:
        return check_intrinsics(rectified_intrinsics(info), height, width)
    except ValueError as error:
        raise ValueError(f"camera_info is refused: {error}, or calibrate the camera anew") from error


def _cut(info: CameraInfo) -> str:
    """K and P are of the whole sensor, and stay so where a driver sends less of it (REP-104)."""
    if max(info.binning_x, info.binning_y) > 1 or info.roi.width or info.roi.height:
        return " (binning and regions of interest are not supported: have the driver send whole images)"
    return ""
