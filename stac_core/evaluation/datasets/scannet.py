"""ScanNet as its own exporter writes it: `color/0.jpg`, `depth/0.png`, `pose/0.txt`, `intrinsic/`."""

from __future__ import annotations

from pathlib import Path

from stac_core.evaluation.datasets.sequence import (
    FRAME_PERIOD_NS,
    FileSequence,
    FrameFiles,
    list_images,
    read_depth_png,
    read_matrix,
)


def recognises(path: Path) -> bool:
    return (path / "color").is_dir() and (path / "pose").is_dir()


def read(path: Path) -> FileSequence:
    """One scan: depth in millimetres at 640×480 (colour is shrunk to it), lost poses are infinite."""
    camera = read_matrix(path / "intrinsic" / "intrinsic_color.txt", 4, 4)[:3, :3]
    frames = []
    for index, image in enumerate(list_images(path / "color")):
        depth = path / "depth" / f"{image.stem}.png"
        pose = read_matrix(path / "pose" / f"{image.stem}.txt", 4, 4)
        frames.append(FrameFiles(image, index * FRAME_PERIOD_NS, depth, pose, camera))
    return FileSequence(path.name, frames, lambda file: read_depth_png(file, 1000.0))
