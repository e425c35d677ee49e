"""The YAML file that camera_calibration writes (ost.yaml), and camera drivers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from sensor_msgs.msg import CameraInfo

from stac_core import check_intrinsics
from stac_ros.rectify import lens_distortion, rectified_intrinsics, rectifying_rotation


def read_calibration(path: Path) -> CameraInfo:
    """The calibration in a file, its header still empty.

    Raises OSError where there is no such file, ValueError naming file, key and value where it is damaged.
    """
    content = _content(path)
    try:
        info = CameraInfo(
            height=_side(content, "image_height"),
            width=_side(content, "image_width"),
            distortion_model=str(_value(content, "distortion_model")),
            d=_numbers(content, "distortion_coefficients").tolist(),
            k=_numbers(content, "camera_matrix", (3, 3)),
            r=_numbers(content, "rectification_matrix", (3, 3)),
            p=_numbers(content, "projection_matrix", (3, 4)),
        )
        _check_camera(info)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return info


def _content(path: Path) -> Mapping[str, Any]:
    expected = "expected the YAML of camera_calibration, such as the ost.yaml in its archive"
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}): {expected}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds {type(content).__name__}: {expected}")
    return content


def _value(content: Mapping[str, Any], key: str) -> Any:
    if content.get(key) is None:
        raise ValueError(f"{key} is missing: calibrate the camera anew, or complete the file")
    return content[key]


def _side(content: Mapping[str, Any], key: str) -> int:
    pixels = _value(content, key)
    if not isinstance(pixels, int) or not 0 < pixels < 2**32:
        raise ValueError(f"{key} = {pixels!r}: expected the pixels of a side of the image")
    return pixels


def _numbers(
    content: Mapping[str, Any], key: str, shape: tuple[int, int] | None = None
) -> NDArray[np.float64]:
    """The numbers of a matrix, row by row.

    shape: None = a row of any length, whatever `cols` says: old versions of camera_calibration write 5 above
    eight coefficients.
    """
    matrix = _value(content, key)
    try:
        size, data = (int(matrix["rows"]), int(matrix["cols"])), matrix["data"]
        numbers = np.array([float(number) for number in data])  # 1e-5 is text to YAML
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{key} = {matrix!r}: expected rows, cols and data, all of them numbers") from error
    if shape is not None and size != shape:
        raise ValueError(f"{key} has {size[0]} rows and {size[1]} cols: expected {shape[0]} and {shape[1]}")
    count = len(numbers) if shape is None else shape[0] * shape[1]
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"{key}.data = {data}: expected {count} finite numbers")
    return numbers


def _check_camera(info: CameraInfo) -> None:
    """ValueError, naming the key, where no camera is like that."""
    size = info.height, info.width
    checks: dict[str, Callable[[], Any]] = {
        "camera_matrix": lambda: check_intrinsics(info.k.reshape(3, 3), *size),
        "projection_matrix": lambda: check_intrinsics(rectified_intrinsics(info), *size),
        "distortion_coefficients": lambda: lens_distortion(info),
        "rectification_matrix": lambda: rectifying_rotation(info),
    }
    for key, check in checks.items():
        try:
            check()
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
