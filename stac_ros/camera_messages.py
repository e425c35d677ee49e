"""Messages as a camera driver sends them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from stac_ros.images import encode_image
from stac_ros.message_data import byte_array

_JPEG_QUALITY = 95


def image_message(pixels: NDArray[np.uint8], header: Header, compressed: bool) -> Image | CompressedImage:
    """RGB [H, W, 3] as a raw image, or as a JPEG."""
    if not compressed:
        return encode_image(pixels, "rgb8", header)
    done, encoded = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise ValueError(f"an image of {pixels.shape[1]}×{pixels.shape[0]} pixels cannot be written as JPEG")
    message = CompressedImage(header=header, format="rgb8; jpeg compressed bgr8")
    message.data = byte_array(encoded)
    return message


def calibration_message(
    intrinsics: NDArray[np.float64], height: int, width: int, header: Header
) -> CameraInfo:
    """A pinhole camera without distortion: intrinsics [3, 3] of images of this size."""
    info = CameraInfo(header=header, height=height, width=width, distortion_model="plumb_bob")
    info.d = [0.0] * 5
    info.k = intrinsics.ravel().tolist()
    info.r = np.eye(3).ravel().tolist()
    info.p = np.hstack([intrinsics, np.zeros((3, 1))]).ravel().tolist()
    return info
