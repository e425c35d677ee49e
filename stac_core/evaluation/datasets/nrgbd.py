"""Neural RGB-D: `images/img0.png`, `depth/depth0.png` (mm), `poses.txt` (OpenGL), `focal.txt`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stac_core.evaluation.datasets.sequence import (
    FRAME_PERIOD_NS,
    Array,
    FileSequence,
    FrameFiles,
    list_images,
    pinhole,
    read_depth_png,
    read_image,
    read_matrix,
    require_equal,
)

_OPENGL_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # y down, z forward ← y up, z backward


def recognises(path: Path) -> bool:
    return (path / "focal.txt").is_file() and (path / "poses.txt").is_file()


def read(path: Path) -> FileSequence:
    """One scene; the principal point is the image's centre, lost poses are written as NaN."""
    images, depths = list_images(path / "images"), list_images(path / "depth")
    poses = _poses(path / "poses.txt")
    require_equal(str(path), {"images": len(images), "depth maps": len(depths), "poses": len(poses)})
    height, width = read_image(images[0]).shape[:2]
    focal = read_matrix(path / "focal.txt", 1, 1)[0, 0]
    camera = pinhole(focal, focal, width / 2, height / 2)
    frames = [
        FrameFiles(image, index * FRAME_PERIOD_NS, depth, pose @ _OPENGL_FROM_OPENCV, camera)
        for index, (image, depth, pose) in enumerate(zip(images, depths, poses, strict=True))
    ]
    return FileSequence(path.name, frames, lambda file: read_depth_png(file, 1000.0))


def _poses(path: Path) -> list[Array]:
    rows = [line for line in path.read_text().splitlines() if line.strip()]
    if len(rows) % 4:
        raise ValueError(f"{path}: {len(rows)} lines; expected four per pose")
    try:
        numbers = [[float(word) for word in row.split()] for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if any(len(row) != 4 for row in numbers):
        raise ValueError(f"{path}: every line must hold four numbers")
    return list(np.array(numbers).reshape(-1, 4, 4))
