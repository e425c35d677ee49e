"""Raw image → the image of a pinhole camera: lens distortion is removed, as image_proc does it.

The new camera is P of the camera_info, or K where P is not filled in. Where the lens has not looked, at the
border of a wide P, the new image is black.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo

from stac_core import check_intrinsics

# Numbers of coefficients; OpenCV's polynomial has them all, the shorter ones end with zeros.
_POLYNOMIAL = (0, 4, 5, 8, 12, 14)
_COEFFICIENTS = {"plumb_bob": _POLYNOMIAL, "rational_polynomial": _POLYNOMIAL, "equidistant": (4,)}


class Rectifier:
    """Keeps the maps of the latest calibration. Not safe to share between threads."""

    def __init__(self) -> None:
        self._calibration: tuple[Any, ...] = ()
        self._maps: tuple[NDArray[Any], NDArray[Any]] | None = None

    def rectify(self, image: NDArray[np.uint8], info: CameraInfo) -> NDArray[np.uint8]:
        """Raw pixels [height, width, 3], of the size that `info` is of → rectified ones of the same size.

        ValueError where the calibration cannot be used.
        """
        calibration = _contents(info)
        if self._maps is None or calibration != self._calibration:
            self._maps, self._calibration = rectification_maps(info), calibration
        return np.asarray(cv2.remap(image, *self._maps, cv2.INTER_LINEAR), np.uint8)


def rectified_intrinsics(info: CameraInfo) -> NDArray[np.float64]:
    """Intrinsics [3, 3] of rectified images: those of P, or of K where P is not filled in; without skew."""
    projection = np.array(info.p, np.float64).reshape(3, 4)[:, :3]
    filled_in = np.isfinite(projection).all() and projection[0, 0] > 0 and projection[1, 1] > 0
    found = projection if filled_in else np.array(info.k, np.float64).reshape(3, 3)
    return np.array([[found[0, 0], 0, found[0, 2]], [0, found[1, 1], found[1, 2]], [0, 0, 1]])


def rectification_maps(info: CameraInfo) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where every rectified pixel comes from in the raw image, as `cv2.remap` takes it.

    ValueError where the lens is not known, K is that of no camera, or R no rotation.
    """
    model, coefficients = lens_distortion(info)
    k = check_intrinsics(np.array(info.k).reshape(3, 3), info.height, info.width)
    make = cv2.fisheye.initUndistortRectifyMap if model == "equidistant" else cv2.initUndistortRectifyMap
    size = (info.width, info.height)
    x, y = make(k, coefficients, rectifying_rotation(info), rectified_intrinsics(info), size, cv2.CV_32FC1)
    x += k[0, 1] / k[1, 1] * (y - k[1, 2])  # skew, which OpenCV leaves out of both
    maps: tuple[NDArray[Any], NDArray[Any]] = cv2.convertMaps(x, y, cv2.CV_16SC2)
    return maps


def lens_distortion(info: CameraInfo) -> tuple[str, NDArray[np.float64]]:
    """Model and coefficients; no name and no coefficient stand for a lens that does not distort.

    ValueError for a model that is not known, or coefficients that are not its own.
    """
    coefficients = np.array(info.d, np.float64)
    model = info.distortion_model or ("" if coefficients.any() else "plumb_bob")
    if model not in _COEFFICIENTS:
        raise ValueError(
            f"distortion_model {model!r} is not known: calibrate the camera with one of "
            f"{', '.join(_COEFFICIENTS)}, or map images that its driver has rectified"
        )
    if len(coefficients) not in _COEFFICIENTS[model] or not np.isfinite(coefficients).all():
        counts = ", ".join(map(str, _COEFFICIENTS[model]))
        raise ValueError(
            f"d = {coefficients.tolist()}: {model} takes {counts} finite coefficients; "
            "calibrate the camera anew"
        )
    return model, coefficients if len(coefficients) else np.zeros(4)


def rectifying_rotation(info: CameraInfo) -> NDArray[np.float64]:
    """R [3, 3]; the identity where it is not filled in. ValueError where it is no rotation."""
    rotation = np.array(info.r, np.float64).reshape(3, 3)
    if not rotation.any():
        return np.eye(3)
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"r = {rotation.tolist()} is no rotation: calibrate the camera anew; a single "
            "camera has the identity"
        )
    return rotation


def _contents(info: CameraInfo) -> tuple[Any, ...]:
    """All that the maps depend on."""
    numbers = (values.tobytes() for values in (info.d, info.k, info.r, info.p))
    return (info.height, info.width, info.distortion_model, *numbers)
