"""KITTI: odometry sequences (poses) and annotated depth, raw drives or gathered folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stac_core.evaluation.datasets.sequence import (
    FRAME_PERIOD_NS,
    Array,
    FileSequence,
    FrameFiles,
    list_images,
    read_depth_png,
    read_matrix,
    require_equal,
)

_UNITS_PER_METRE = 256.0


def recognises(path: Path) -> bool:
    return _is_odometry(path) or _is_drive(path) or _is_gathered(path)


def read(path: Path) -> FileSequence:
    """A folder `sequences/NN`, a raw drive `*_sync`, or `image_gathered/<drive>`."""
    if _is_odometry(path):
        return _read_odometry(path)
    if _is_drive(path):
        return _read_depth_drive(path, path / "image_02" / "data", path / "proj_depth/groundtruth/image_02")
    if _is_gathered(path):
        return _read_depth_drive(path, path, path.parent.parent / "groundtruth_depth_gathered" / path.name)
    raise ValueError(f"{path}: no KITTI layout (sequences/NN with image_2, a *_sync drive, image_gathered/)")


def _is_odometry(path: Path) -> bool:
    return (path / "image_2").is_dir() and (path / "calib.txt").is_file()


def _is_drive(path: Path) -> bool:
    return (path / "image_02" / "data").is_dir()


def _is_gathered(path: Path) -> bool:
    return path.parent.name == "image_gathered" and path.is_dir()


def _read_odometry(path: Path) -> FileSequence:
    images = list_images(path / "image_2")
    intrinsics, camera2_from_camera0 = _calibration(path / "calib.txt")
    poses_file = path.parent.parent / "poses" / f"{path.name}.txt"
    poses: list[Array] | None = None
    if poses_file.is_file():  # sequences 11-21 have none
        rows = np.loadtxt(poses_file, ndmin=2).reshape(-1, 3, 4)
        require_equal(str(path), {"images": len(images), "poses": len(rows)})
        poses = [np.vstack([row, [0, 0, 0, 1]]) @ np.linalg.inv(camera2_from_camera0) for row in rows]
    stamps = _stamps(path / "times.txt", len(images))
    frames = [
        FrameFiles(image, stamps[i], None, poses[i] if poses else None, intrinsics)
        for i, image in enumerate(images)
    ]
    return FileSequence(f"kitti_{path.name}", frames)


def _calibration(path: Path) -> tuple[Array, Array]:
    """Intrinsics of the left colour camera, and its place beside the grey camera of the poses."""
    for line in path.read_text().splitlines():
        if line.startswith("P2:"):
            projection = np.array(line.split()[1:], float).reshape(3, 4)
            offset = np.eye(4)
            offset[:3, 3] = np.linalg.inv(projection[:, :3]) @ projection[:, 3]
            return projection[:, :3], offset
    raise ValueError(f"{path}: no line 'P2:' with the left colour camera's projection")


def _stamps(path: Path, count: int) -> list[int]:
    if not path.is_file():
        return [index * FRAME_PERIOD_NS for index in range(count)]
    seconds = np.loadtxt(path, ndmin=1)
    require_equal(str(path), {"images": count, "times": len(seconds)})
    return [round(second * 1e9) for second in seconds]


def _read_depth_drive(path: Path, images: Path, depths: Path) -> FileSequence:
    """Frames without an annotation (the first and last five of a drive) are left out."""
    chosen = [image for image in list_images(images) if (depths / f"{image.stem}.png").is_file()]
    if not chosen:
        raise ValueError(f"{depths}: no annotated depth for the images of {images}")
    intrinsics_file = path / "intrinsics.txt"
    camera = read_matrix(intrinsics_file, 3, 3) if intrinsics_file.is_file() else None
    frames = [
        FrameFiles(image, index * FRAME_PERIOD_NS * 3, depths / f"{image.stem}.png", None, camera)
        for index, image in enumerate(chosen)
    ]
    return FileSequence(path.name, frames, lambda file: read_depth_png(file, _UNITS_PER_METRE))
