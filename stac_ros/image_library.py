"""Which library turns image messages into arrays: the only seam to `cv_bridge` and `rosbags.image`.

A ROS installation has `cv_bridge`; it is used if it passes a check, because against a newer numpy it
may fail to load or decode wrongly. Elsewhere `rosbags.image` does the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import Image

from stac_ros.message_data import byte_array

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageLibrary:
    """The two things asked of a library."""

    name: str  # for people: with the reason why another one is not in use
    decode: Callable[[Image, str | None], NDArray[Any]]  # message, colour wanted (None = as it is)
    pixel: Callable[[str], tuple[np.dtype[Any], int]]  # encoding → type and number of a pixel's values


@cache
def image_library() -> ImageLibrary:
    """The library in use; chosen once. ModuleNotFoundError if there is none."""
    try:
        library = _cv_bridge()
        _check(library)
        return library
    except ModuleNotFoundError:
        return _rosbags_image("not installed")
    except Exception as error:  # a binary built for another numpy fails in any way
        logger.warning("cv_bridge is installed but unusable (%s); rosbags.image takes over", error)
        return _rosbags_image("unusable")


def _cv_bridge() -> ImageLibrary:
    from cv_bridge import CvBridge

    bridge = CvBridge()

    def pixel(encoding: str) -> tuple[np.dtype[Any], int]:
        dtype, channels = bridge.encoding_to_dtype_with_channels(encoding)
        return np.dtype(dtype), int(channels)

    def decode(message: Image, colour: str | None) -> NDArray[Any]:
        return bridge.imgmsg_to_cv2(message, colour or "passthrough")

    return ImageLibrary("cv_bridge", decode, pixel)


def _rosbags_image(why: str) -> ImageLibrary:
    try:
        from rosbags.image import message_to_cvimage
        from rosbags.image.image import to_cvtype
    except ModuleNotFoundError as error:
        cure = "install ros-$ROS_DISTRO-cv-bridge, or pip install rosbags-image[opencv-headless]"
        raise ModuleNotFoundError(f"no image library: cv_bridge {why}, {error}; {cure}") from error

    def pixel(encoding: str) -> tuple[np.dtype[Any], int]:
        _, _, dtype, channels = to_cvtype(encoding)
        return np.dtype(dtype), channels

    return ImageLibrary(f"rosbags.image (cv_bridge {why})", message_to_cvimage, pixel)


def _check(library: ImageLibrary) -> None:
    """Raise RuntimeError unless known images come out as they should."""
    for encoding, wanted, values in (
        ("rgb8", "bgr8", np.arange(48, dtype=np.uint8).reshape(4, 4, 3)),
        ("16UC1", None, np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000),
    ):
        image = Image(height=4, width=4, encoding=encoding, step=values.nbytes // 4)
        image.data = byte_array(values)
        expected = values[:, :, ::-1] if wanted else values
        if not np.array_equal(library.decode(image, wanted), expected):
            raise RuntimeError(f"it decodes {encoding} wrongly")
