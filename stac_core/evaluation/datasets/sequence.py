"""What every dataset looks like to the evaluation: a list of frames with whatever truth exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_OUT_OF_PROPORTION = 0.02  # ScanNet's colour, 1296×968, is by 0.004 beside its depth, 640×480
FRAME_PERIOD_NS = 33_333_333  # for sources that record no time


@dataclass(frozen=True)
class Frame:
    """One camera frame. Camera axes are OpenCV's: x right, y down, z forward."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    stamp_ns: int
    world_from_camera: Array | None = None  # [4, 4], metres where the dataset is metric
    depth_m: NDArray[np.float32] | None = None  # [H, W] along the optical axis; 0 = not measured
    intrinsics: Array | None = None  # [3, 3] of the image


class Sequence(Protocol):
    """One scene, oldest frame first. Frames are read when asked for and not kept."""

    @property
    def name(self) -> str: ...

    @property
    def max_depth_m(self) -> float:
        """True depth beyond this is not judged."""

    def __len__(self) -> int: ...

    def frame(self, index: int) -> Frame:
        """Read one frame. Raises ValueError or OSError that names the file."""

    def cloud(self) -> Array | None:
        """The true surface [N, 3] in the world of the poses, where the dataset ships one."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image file to RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise _unreadable(path, "an image")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def read_depth_png(path: Path, units_per_metre: float, invalid: int = 0) -> NDArray[np.float32]:
    """Decode 16-bit depth to metres; the value `invalid` means, as 0 does, not measured."""
    raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if raw is None:
        raise _unreadable(path, "a depth map")
    if raw.ndim != 2 or raw.dtype != np.uint16:
        raise ValueError(f"{path}: expected one 16-bit channel, got {raw.dtype} {raw.shape}")
    depth = raw.astype(np.float32) / np.float32(units_per_metre)
    return np.where(raw == invalid, np.float32(0), depth)


def _unreadable(path: Path, what: str) -> OSError:
    if not path.exists():
        return FileNotFoundError(f"{path}: missing; the dataset is incomplete, fetch it again")
    return OSError(f"{path}: cannot be decoded as {what}; the file is damaged or of another kind")


def read_matrix(path: Path, rows: int, columns: int) -> Array:
    """Read a matrix of text numbers. Raises ValueError where the count differs."""
    if not path.exists():
        raise _unreadable(path, "a matrix")
    try:
        numbers = [float(word) for word in path.read_text().split()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected {rows}×{columns} numbers") from error
    if len(numbers) != rows * columns:
        raise ValueError(f"{path}: {len(numbers)} numbers; expected {rows}×{columns}")
    return np.array(numbers).reshape(rows, columns)


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Array:
    """Intrinsic matrix [3, 3]."""
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder, 2 before 10. Raises ValueError for an empty folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of images")
    images = sorted(filter(is_image, folder.iterdir()), key=natural_key)
    if not images:
        raise ValueError(f"{folder}: no image in it (looked for {' '.join(IMAGE_SUFFIXES)})")
    return images


def is_image(path: Path) -> bool:
    """Whether it looks like one by its name; hidden files are what systems keep beside them."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def natural_key(path: Path) -> list[tuple[int, str]]:
    """Sort key that orders img2 before img10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def require_equal(name: str, counts: dict[str, int]) -> None:
    """Raise ValueError where the lists of one scene have different lengths."""
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise ValueError(f"{name}: {listed}; the counts must match, the scene is incomplete")


@dataclass(frozen=True)
class FrameFiles:
    """Where one frame lies on disk."""

    image: Path
    stamp_ns: int
    depth: Path | None = None
    world_from_camera: Array | None = None
    intrinsics: Array | None = None


def _no_depth(path: Path) -> NDArray[np.float32]:
    raise ValueError(f"{path}: this sequence was opened without a depth decoder")


@dataclass(frozen=True)
class FileSequence:
    """A sequence whose frames are files; most datasets are this plus a way to list them."""

    name: str
    frames: list[FrameFiles]
    read_depth: Callable[[Path], NDArray[np.float32]] = field(default=_no_depth)
    max_depth_m: float = np.inf
    cloud_file: Path | None = None
    cloud_units_per_metre: float = 1.0

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, index: int) -> Frame:
        """Read one frame; a colour image of another size than the depth maps takes theirs."""
        files = self.frames[index]
        depth = None if files.depth is None else self.read_depth(files.depth)
        size = self._depth_size if depth is None else depth.shape
        image, intrinsics = fit_to_depth(read_image(files.image), files.intrinsics, size)
        return Frame(image, files.stamp_ns, _finite(files.world_from_camera), depth, intrinsics)

    @cached_property
    def _depth_size(self) -> tuple[int, ...] | None:
        """What a frame without depth takes: all images of a stream have one size."""
        first = next((files.depth for files in self.frames if files.depth), None)
        return None if first is None else self.read_depth(first).shape

    def cloud(self) -> Array | None:
        if self.cloud_file is None:
            return None
        import open3d  # heavy, and only this path needs it

        points = np.asarray(open3d.io.read_point_cloud(self.cloud_file).points)
        if not len(points):
            raise ValueError(f"{self.cloud_file}: no points could be read")
        return points / self.cloud_units_per_metre


def fit_to_depth(
    image: NDArray[np.uint8], intrinsics: Array | None, size: tuple[int, ...] | None
) -> tuple[NDArray[np.uint8], Array | None]:
    """Image and intrinsics in the size [2] of the depth maps; unchanged where views differ."""
    if size is None or size == image.shape[:2] or not same_view(image.shape, size):
        return image, intrinsics
    height, width = size
    small = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    if intrinsics is None:
        return small, None
    scaled = intrinsics.copy()
    scaled[0] *= width / image.shape[1]
    scaled[1] *= height / image.shape[0]
    return small, scaled


def same_view(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether images of these shapes (height, width, …) can show the same: their sides are in proportion."""
    return abs(first[0] * second[1] / (first[1] * second[0]) - 1) < _OUT_OF_PROPORTION


def _finite(pose: Array | None) -> Array | None:
    """Datasets write a lost pose as infinities or NaN."""
    return pose if pose is not None and np.isfinite(pose).all() else None
