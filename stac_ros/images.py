"""Image message ↔ array.

What the libraries behind `image_library` leave out is here: padded rows, foreign byte order, invalid
depth, compressed images, and a refusal that names cause and cure.
"""

from __future__ import annotations

import sys
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from stac_ros.image_library import image_library
from stac_ros.message_data import byte_array

# OpenCV's type names say nothing about colour: such images were made in OpenCV's own order.
_ALIASES = {"8UC1": "mono8", "8UC3": "bgr8", "8UC4": "bgra8", "uyvy": "yuv422", "yuyv": "yuv422_yuy2"}
COLOUR_ENCODINGS = (
    "rgb8", "bgr8", "rgba8", "bgra8", "mono8", "mono16", "bayer_rggb8", "bayer_bggr8", "bayer_gbrg8",
    "bayer_grbg8", "yuv422", "yuv422_yuy2", *_ALIASES,
)  # fmt: skip
_PAIRED = ("yuv422", "yuv422_yuy2", "uyvy", "yuyv")  # 4:2:2, two pixels share a colour
DEPTH_ENCODINGS = ("16UC1", "32FC1")  # millimetres and metres (REP-118)
_ENCODED = {"mono8": (np.uint8, 1), "rgb8": (np.uint8, 3), "16UC1": (np.uint16, 1), "32FC1": (np.float32, 1)}
# A decoder fills what is missing with grey and says nothing, so the end itself is looked for.
# What follows it is of no interest: drivers pad, and streams may carry more.
_ENDINGS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND\xae\x42\x60\x82"}
_BRIGHTEST_OF_12_BITS = 16  # in 8 of 16 bits


class ImageError(ValueError):
    """An image message that cannot be used; `cause` is one word for statistics."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def decode_colour(message: Image | CompressedImage) -> NDArray[np.uint8]:
    """A colour or grey image as RGB [height, width, 3]; it may be a view of the message.

    16-bit grey is scaled to 8 bits. Raises ImageError for anything that is no such image.
    """
    if isinstance(message, CompressedImage):
        return _decode_compressed(message)
    encoding = message.encoding
    if encoding in DEPTH_ENCODINGS:
        raise ImageError("encoding", f"encoding {encoding!r} is depth, not colour: remap `image`")
    _check_encoding(encoding, COLOUR_ENCODINGS)
    pixels = _decode(_plain(message, _ALIASES.get(encoding, encoding)), "rgb8")
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def wastes_bits(message: Image | CompressedImage, decoded: NDArray[np.uint8]) -> bool:
    """Whether an image of 16 bits uses at most its lowest 12, so that it came out nearly black.

    decoded: the same image by `decode_colour`.
    """
    if isinstance(message, CompressedImage):
        head = bytes(message.data[:25])  # a PNG tells its bits in the byte after the size
        sixteen_bits = head.startswith(b"\x89PNG") and head[-1] == 16
    else:
        sixteen_bits = message.encoding == "mono16"
    return sixteen_bits and int(decoded.max()) <= _BRIGHTEST_OF_12_BITS


def decode_depth(message: Image) -> NDArray[np.float32]:
    """A depth image as metres [height, width]; NaN where it holds no measurement (0, negative, ∞, NaN).

    Raises ImageError for anything that is no depth image.
    """
    _check_encoding(message.encoding, DEPTH_ENCODINGS)
    depth = _decode(_plain(message, message.encoding), None).astype(np.float32)
    if message.encoding == "16UC1":
        depth /= 1000
    depth[~(np.isfinite(depth) & (depth > 0))] = np.nan
    return depth


def encode_image(pixels: NDArray[Any], encoding: str, header: Header) -> Image:
    """An array [height, width] or [height, width, 3] as a message; mono8, rgb8, 16UC1 or 32FC1."""
    dtype, channels = _ENCODED[encoding]
    expected = pixels.shape[:2] if channels == 1 else (*pixels.shape[:2], channels)
    if pixels.dtype != dtype or pixels.shape != expected:
        kind = f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"encoding {encoding!r} needs {np.dtype(dtype)} {list(expected)}, got {kind}")
    message = Image(header=header, encoding=encoding, height=pixels.shape[0], width=pixels.shape[1])
    message.step = pixels.shape[1] * channels * pixels.dtype.itemsize
    message.is_bigendian = int(sys.byteorder == "big")
    message.data = byte_array(pixels)
    return message


def _check_encoding(encoding: str, known: tuple[str, ...]) -> None:
    if encoding not in known:
        choices = ", ".join(known)
        raise ImageError("encoding", f"encoding {encoding!r} is not supported: publish one of {choices}")


def _plain(message: Image, encoding: str) -> Image:
    """The message under another encoding, with tight rows in this computer's byte order."""
    dtype, channels = image_library().pixel(encoding)
    row = message.width * channels * dtype.itemsize
    needed = _check_sizes(message, row)
    foreign = dtype.itemsize > 1 and bool(message.is_bigendian) != (sys.byteorder == "big")
    if message.encoding == encoding and message.step == row and len(message.data) == needed and not foreign:
        return message
    rows = np.lib.stride_tricks.as_strided(
        np.frombuffer(message.data, np.uint8), (message.height, row), (message.step, 1), writeable=False
    )
    pixels = np.ascontiguousarray(rows).view(dtype)
    plain = Image(header=message.header, height=message.height, width=message.width, encoding=encoding)
    plain.step, plain.is_bigendian = row, int(sys.byteorder == "big")
    plain.data = byte_array(pixels.byteswap() if foreign else pixels)
    return plain


def _check_sizes(message: Image, row: int) -> int:
    """The bytes that the image needs, with `row` bytes of pixels in each row."""
    size = f"{message.width}×{message.height}"
    if not message.height or not message.width:
        raise ImageError("size", f"image of {size} pixels is empty: check the camera driver")
    if message.step < row:
        raise ImageError(
            "size", f"step of {message.step} bytes, {size} {message.encoding!r} has rows of {row}: check both"
        )
    if message.encoding in _PAIRED and message.width % 2:
        raise ImageError(
            "size",
            f"image of {size} {message.encoding!r} has an odd width, though its pixels come in pairs: set an "
            "even one in the camera driver",
        )
    needed = message.step * (message.height - 1) + row  # the last row may come without its padding
    if len(message.data) < needed:
        raise ImageError(
            "truncated",
            f"buffer of {len(message.data)} bytes is truncated, {size} {message.encoding!r} needs {needed}: "
            "check the camera driver and the transport",
        )
    return needed


def _decode(message: Image, colour: str | None) -> NDArray[Any]:
    try:
        return image_library().decode(message, colour)
    except Exception as error:  # the libraries raise many kinds
        size = f"{message.width}×{message.height}"
        raise ImageError(
            "decode", f"{message.encoding!r} image of {size} cannot be decoded: {error}"
        ) from error


def _decode_compressed(message: CompressedImage) -> NDArray[np.uint8]:
    data = bytes(message.data)
    what = f"compressed image of {len(data)} bytes, format {message.format!r},"
    if "compressedDepth" in message.format:
        raise ImageError("encoding", f"{what} is depth, not colour: remap `image`")
    ending = next((end for start, end in _ENDINGS.items() if data.startswith(start)), None)
    if ending is None:
        raise ImageError("encoding", f"{what} is neither JPEG nor PNG: publish one of them")
    end = data.rfind(ending)  # the last one: a thumbnail has an end of its own
    if end < 0:
        raise ImageError("truncated", f"{what} is truncated: check the camera driver and the transport")
    # The stored orientation is ignored: calibration belongs to the sensor's own rows and columns.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(data[: end + len(ending)], np.uint8), flags)
    except cv2.error as error:
        raise ImageError("decode", f"{what} cannot be decoded: {error.err}") from error
    if pixels is None:
        raise ImageError("decode", f"{what} is damaged: check the camera driver and the transport")
    return np.ascontiguousarray(pixels[:, :, ::-1])
