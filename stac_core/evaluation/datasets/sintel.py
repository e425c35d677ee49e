"""MPI Sintel: `training/final/<scene>`, with `depth/<scene>/*.dpt` and `camdata_left/<scene>/*.cam`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stac_core.evaluation.datasets.sequence import Array, FileSequence, FrameFiles, list_images

_TAG = np.float32(202021.25)  # opens both binary files; another value means another byte order
_PERIOD_NS = 1_000_000_000 // 24
_MAX_DEPTH_M = 70.0  # the published evaluations leave sky and far hills out


def recognises(path: Path) -> bool:
    return path.parent.name in ("final", "clean") and next(path.glob("frame_*.png"), None) is not None


def read(path: Path) -> FileSequence:
    """One scene of either rendering pass; truth is optional (the test split has none)."""
    frames = []
    for index, image in enumerate(list_images(path)):
        depth = _beside(image, "depth", ".dpt")
        camera = _beside(image, "camdata_left", ".cam")
        pose, intrinsics = _read_camera(camera) if camera else (None, None)
        frames.append(FrameFiles(image, index * _PERIOD_NS, depth, pose, intrinsics))
    return FileSequence(path.name, frames, _read_depth, max_depth_m=_MAX_DEPTH_M)


def _beside(image: Path, kind: str, suffix: str) -> Path | None:
    """The truth file of an image; a missing file is only fine where the whole kind is missing."""
    folder = image.parent.parent.parent / kind / image.parent.name
    return folder / f"{image.stem}{suffix}" if folder.is_dir() else None


def _payload(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the dataset is incomplete, fetch it again")
    data = path.read_bytes()
    if len(data) < 4 or np.frombuffer(data, "<f4", 1)[0] != _TAG:
        raise ValueError(f"{path}: does not begin with the Sintel tag {_TAG}; damaged or another format")
    return data[4:]


def _read_depth(path: Path) -> NDArray[np.float32]:
    data = _payload(path)
    width, height = np.frombuffer(data, "<i4", 2) if len(data) >= 8 else (0, 0)
    if len(data) != 8 + 4 * int(width) * int(height) or not len(data) > 8:
        raise ValueError(f"{path}: {len(data) + 4} bytes do not hold a {width}×{height} depth map")
    return np.frombuffer(data, "<f4", offset=8).reshape(height, width).astype(np.float32)


def _read_camera(path: Path) -> tuple[Array, Array]:
    data = _payload(path)
    if len(data) != 8 * 21:
        raise ValueError(f"{path}: {len(data) + 4} bytes; expected a tag, 3×3 and 3×4 doubles")
    numbers = np.frombuffer(data, "<f8").astype(np.float64)
    camera_from_world = np.vstack([numbers[9:].reshape(3, 4), [0, 0, 0, 1]])
    return np.linalg.inv(camera_from_world), numbers[:9].reshape(3, 3)
