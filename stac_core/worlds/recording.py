"""What is written of one frame, whatever the file format."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Camera:
    """A pinhole without distortion."""

    width: int
    height: int
    matrix: NDArray[np.float64]  # [3, 3] pixels


@dataclass(frozen=True)
class RecordedFrame:
    """One frame and its truth."""

    index: int
    stamp_ns: int
    image: NDArray[np.uint8]  # [H, W, 3] RGB
    depth: NDArray[np.float32]  # [H, W] metres, 0 = nothing there
    world_from_camera: NDArray[np.float64]  # [4, 4], OpenCV camera axes

    def encode(self, suffix: str, quality: int) -> NDArray[np.uint8]:
        """The image as bytes of a `jpg` or `png` file."""
        flags = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == "jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 2]
        return encode_image(cv2.cvtColor(self.image, cv2.COLOR_RGB2BGR), suffix, flags)


def encode_image(pixels: NDArray, suffix: str, flags: list[int]) -> NDArray[np.uint8]:
    """File bytes of an image whose colours are in OpenCV's order."""
    done, data = cv2.imencode(f".{suffix}", pixels, flags)
    if not done:
        raise RuntimeError(f"OpenCV could not encode a {pixels.shape} image as {suffix}")
    return np.asarray(data, np.uint8).reshape(-1)


def millimetres(depth: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Depth in 16 bits; what lies beyond 65.535 m is written as 0, not measured."""
    rounded = np.rint(depth * 1000.0)
    return np.where(rounded <= np.iinfo(np.uint16).max, rounded, 0).astype(np.uint16)
