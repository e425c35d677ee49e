"""DTU in the MVSNet layout: `images/`, `cams/00000000_cam.txt`, `depths/` (npy or pfm), masks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from stac_core.evaluation.datasets.sequence import (
    FRAME_PERIOD_NS,
    Array,
    FileSequence,
    FrameFiles,
    list_images,
    require_equal,
)

_UNITS_PER_METRE = 1000.0  # of poses, depth and scanned surface alike


def recognises(path: Path) -> bool:
    return (path / "cams").is_dir() and (path / "images").is_dir()


def read(path: Path) -> FileSequence:
    """One scan, millimetres turned into metres; `binary_masks/` blanks the background's depth."""
    images = list_images(path / "images")
    cameras = sorted((path / "cams").glob("*_cam.txt"))
    require_equal(str(path), {"images": len(images), "cameras": len(cameras)})
    frames = []
    for index, (image, camera_file) in enumerate(zip(images, cameras, strict=True)):
        pose, intrinsics = _camera(camera_file)
        frames.append(FrameFiles(image, index * FRAME_PERIOD_NS, _depth_file(image), pose, intrinsics))
    surface = path / "points.ply"
    return FileSequence(
        path.name,
        frames,
        _read_depth,
        cloud_file=surface if surface.is_file() else None,
        cloud_units_per_metre=_UNITS_PER_METRE,
    )


def _camera(path: Path) -> tuple[Array, Array]:
    """world_from_camera in metres and intrinsics of one camera file."""
    words = path.read_text().split()
    try:
        extrinsic, intrinsic = words.index("extrinsic") + 1, words.index("intrinsic") + 1
        camera_from_world = np.array(words[extrinsic : extrinsic + 16], float).reshape(4, 4)
        intrinsics = np.array(words[intrinsic : intrinsic + 9], float).reshape(3, 3)
    except ValueError as error:
        raise ValueError(f"{path}: expected 'extrinsic' 4×4 and 'intrinsic' 3×3 ({error})") from error
    camera_from_world[:3, 3] /= _UNITS_PER_METRE
    return np.linalg.inv(camera_from_world), intrinsics


def _depth_file(image: Path) -> Path | None:
    folder = image.parent.parent / "depths"
    candidates = [folder / f"{image.stem}{suffix}" for suffix in (".npy", ".pfm")]
    return next((file for file in candidates if file.is_file()), candidates[0] if folder.is_dir() else None)


def _read_depth(path: Path) -> NDArray[np.float32]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the dataset is incomplete, fetch it again")
    if path.suffix == ".npy":
        depth = np.load(path, allow_pickle=False)
    else:
        depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if depth is None or depth.ndim != 2:
        raise OSError(f"{path}: cannot be decoded as a depth map")
    mask_file = path.parent.parent / "binary_masks" / f"{path.stem}.png"
    mask = cv2.imread(str(mask_file), cv2.IMREAD_GRAYSCALE) if mask_file.is_file() else None
    if mask is not None:
        depth = depth * (cv2.resize(mask, depth.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0)
    return depth.astype(np.float32) / np.float32(_UNITS_PER_METRE)
