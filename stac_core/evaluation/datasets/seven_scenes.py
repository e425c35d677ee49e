"""7-Scenes: `frame-000000.{color.png,depth.png,pose.txt}` in one folder per sequence.

`depth.proj.png`, depth as the colour camera sees it, is what published evaluations compare with; where
it was made, it is read. Else the depth camera's nominal intrinsics stand for both cameras.
"""

from __future__ import annotations

from pathlib import Path

from stac_core.evaluation.datasets.sequence import (
    FRAME_PERIOD_NS,
    FileSequence,
    FrameFiles,
    pinhole,
    read_depth_png,
    read_matrix,
)

_DEPTH_CAMERA = pinhole(585.0, 585.0, 320.0, 240.0)
_COLOUR_CAMERA = pinhole(525.0, 525.0, 320.0, 240.0)
_NOT_MEASURED = 65535


def recognises(path: Path) -> bool:
    return path.is_dir() and next(path.glob("frame-*.color.png"), None) is not None


def read(path: Path) -> FileSequence:
    """One `seq-XX` folder: depth in millimetres, poses camera to world."""
    images = sorted(path.glob("frame-*.color.png"))
    if not images:
        raise ValueError(f"{path}: no frame-*.color.png; give the folder of one sequence, such as seq-01")
    frames = [_frame(image, index) for index, image in enumerate(images)]
    name = f"{path.parent.name}_{path.name}" if path.name.startswith("seq-") else path.name
    return FileSequence(name, frames, lambda file: read_depth_png(file, 1000.0, invalid=_NOT_MEASURED))


def _frame(image: Path, index: int) -> FrameFiles:
    stem = image.name.removesuffix(".color.png")
    pose = read_matrix(image.with_name(stem + ".pose.txt"), 4, 4)
    projected = image.with_name(stem + ".depth.proj.png")
    if projected.is_file():
        return FrameFiles(image, index * FRAME_PERIOD_NS, projected, pose, _COLOUR_CAMERA)
    measured = image.with_name(stem + ".depth.png")
    return FrameFiles(image, index * FRAME_PERIOD_NS, measured, pose, _DEPTH_CAMERA)
