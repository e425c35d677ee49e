"""TUM RGB-D and, in the same layout, Bonn RGB-D Dynamic: lists of files by stamp.

`rgb.txt`, `depth.txt` (stamp, file) and `groundtruth.txt` (stamp, pose) are joined by nearest stamp.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stac_core.evaluation.datasets.sequence import (
    Array,
    FileSequence,
    FrameFiles,
    pinhole,
    read_depth_png,
)
from stac_core.evaluation.trajectory import Stamps, join_images, parse_stamp, read_tum, text_lines

_MAX_GAP_NS = 20_000_000  # the benchmark's own tool joins within 20 ms
_UNITS_PER_METRE = 5000.0
_TUM_CAMERAS = {
    "freiburg1": pinhole(517.3, 516.5, 318.6, 255.3),
    "freiburg2": pinhole(520.9, 521.0, 325.1, 249.7),
    "freiburg3": pinhole(535.4, 539.2, 320.1, 247.6),
}
_BONN_CAMERA = pinhole(542.822841, 542.576870, 315.593520, 237.756098)


def recognises(path: Path) -> bool:
    return (path / "rgb.txt").is_file() and "bonn" not in path.name


def recognises_bonn(path: Path) -> bool:
    return (path / "rgb.txt").is_file() and "bonn" in path.name


def read(path: Path) -> FileSequence:
    """One TUM sequence; the camera follows from `freiburg1..3` in the folder's name."""
    camera = next((k for name, k in _TUM_CAMERAS.items() if name in path.name), None)
    return _read(path, camera)


def read_bonn(path: Path) -> FileSequence:
    """One Bonn sequence. Its poses are those of the motion-capture body, not of the lens."""
    return _read(path, _BONN_CAMERA)


def _read(path: Path, camera: Array | None) -> FileSequence:
    stamps, images = _read_list(path / "rgb.txt")
    depths, poses = _depths(path, stamps), _poses(path, stamps)
    frames = [
        FrameFiles(path / image, int(stamp), depths.get(i), poses.get(i), camera)
        for i, (stamp, image) in enumerate(zip(stamps, images, strict=True))
    ]
    return FileSequence(path.name, frames, lambda file: read_depth_png(file, _UNITS_PER_METRE))


def _depths(path: Path, stamps: Stamps) -> dict[int, Path]:
    if not (path / "depth.txt").is_file():
        return {}
    depth_stamps, files = _read_list(path / "depth.txt")
    joined = join_images(stamps, depth_stamps, _MAX_GAP_NS, str(path / "depth.txt"))
    return {image: path / files[depth] for image, depth in joined.items()}


def _poses(path: Path, stamps: Stamps) -> dict[int, Array]:
    if not (path / "groundtruth.txt").is_file():
        return {}
    truth = read_tum(path / "groundtruth.txt")
    joined = join_images(stamps, truth.stamps_ns, _MAX_GAP_NS, str(path / "groundtruth.txt"))
    return {image: truth.world_from_camera[pose] for image, pose in joined.items()}


def _read_list(path: Path) -> tuple[Stamps, list[str]]:
    stamps, files = [], []
    for place, line in text_lines(path):
        fields = line.split(maxsplit=1)  # a file's name may hold spaces
        if len(fields) < 2:
            raise ValueError(f"{place}: expected 'stamp file', got {line!r}")
        try:
            stamps.append(parse_stamp(fields[0]))
        except ValueError as error:
            raise ValueError(f"{place}: {error}, in {line!r}") from error
        files.append(fields[1])
    if not files:
        raise ValueError(f"{path}: lists no image")
    order = np.argsort(np.array(stamps, np.int64), kind="stable")
    return np.array(stamps, np.int64)[order], [files[i] for i in order]
