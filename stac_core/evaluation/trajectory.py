"""A camera path with stamps, its TUM text form, and the pairing of two paths by stamp."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from stac_core.files import write_whole
from stac_core.stamps import stamp_text

logger = logging.getLogger(__name__)
Array = NDArray[np.float64]
Stamps = NDArray[np.int64]
_MOST_SECONDS = 9_000_000_000  # in nanoseconds they fit into 64 bits; the year 2255
_LARGEST_GAP_S = 0.01  # between two poses of one moment


@dataclass(frozen=True)
class Trajectory:
    """N camera poses in one world, oldest first."""

    stamps_ns: Stamps  # [N]
    world_from_camera: Array  # [N, 4, 4]

    def __post_init__(self) -> None:
        if self.world_from_camera.shape != (len(self.stamps_ns), 4, 4):
            raise ValueError(
                f"{len(self.stamps_ns)} stamps and poses {self.world_from_camera.shape}: expected [N, 4, 4]"
            )

    def __len__(self) -> int:
        return len(self.stamps_ns)

    @property
    def centres(self) -> Array:
        """Camera centres in the world, [N, 3]."""
        return self.world_from_camera[:, :3, 3]

    @property
    def length(self) -> float:
        """Length of the path through all camera centres."""
        return float(np.linalg.norm(np.diff(self.centres, axis=0), axis=1).sum())

    def take(self, index: NDArray[np.intp]) -> Trajectory:
        return Trajectory(self.stamps_ns[index], self.world_from_camera[index])


def poses_from_quaternions(translations: Array, quaternions_xyzw: Array) -> Array:
    """[N, 3] and [N, 4] (any length but zero) to poses [N, 4, 4]."""
    poses = np.tile(np.eye(4), (len(translations), 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(quaternions_xyzw).as_matrix()
    poses[:, :3, 3] = translations
    return poses


def parse_stamp(text: str) -> int:
    """Seconds as text to nanoseconds, exactly (a float would lose about 200 ns).

    Raises ValueError for what is no number, and for what is no time in seconds.
    """
    try:
        seconds = Decimal(text)
    except InvalidOperation as error:
        raise ValueError(f"{text!r} is not a number") from error
    if seconds.is_nan() or abs(seconds) > _MOST_SECONDS:
        raise ValueError(f"{text!r} is no stamp in seconds (in nanoseconds? divide by 1e9)")
    return round(seconds * 1_000_000_000)


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line is, for messages, and its text without what follows a `#`; no empty ones.

    Raises ValueError for a file that is no text.
    """
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text ({error})") from error
    for number, line in enumerate(lines, 1):
        if content := line.partition("#")[0].strip():
            yield f"{path}:{number}", content


def read_tum(path: Path) -> Trajectory:
    """Read `stamp tx ty tz qx qy qz qw` lines; `#` starts a comment; sorted by stamp.

    Raises ValueError with the line.
    """
    stamps: list[int] = []
    numbers: list[list[float]] = []
    for place, line in text_lines(path):
        fields = line.replace(",", " ").split()
        try:
            stamps.append(parse_stamp(fields[0]))
            numbers.append([float(field) for field in fields[1:]])
        except ValueError as error:
            raise ValueError(f"{place}: {error}, in {line!r}") from error
        if len(fields) != 8 or not np.isfinite(numbers[-1]).all() or not any(numbers[-1][3:]):
            raise ValueError(f"{place}: expected 'stamp tx ty tz qx qy qz qw', got {line!r}")
    table = np.array(numbers, np.float64).reshape(-1, 7)
    order = np.argsort(np.array(stamps, np.int64), kind="stable")
    poses = poses_from_quaternions(table[:, :3], table[:, 3:]) if len(table) else np.empty((0, 4, 4))
    return Trajectory(np.array(stamps, np.int64)[order], poses[order])


def write_tum(path: Path, trajectory: Trajectory) -> None:
    """Write TUM text with full precision, whole or not at all."""
    quaternions = Rotation.from_matrix(trajectory.world_from_camera[:, :3, :3]).as_quat()
    lines = []
    for stamp, centre, quaternion in zip(trajectory.stamps_ns, trajectory.centres, quaternions, strict=True):
        values = " ".join(f"{value:.17g}" for value in (*centre, *quaternion))
        lines.append(f"{stamp_text(int(stamp))} {values}\n")
    write_whole(path, "".join(lines))


def associate(
    first: Stamps, second: Stamps, max_difference_ns: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pair each stamp of the shorter side with the nearest of the longer, at most once each.

    Both sides sorted. Returns indices into first and second, in time order. A stamp claimed twice
    stays with its nearest partner.
    """
    if len(first) > len(second):
        theirs, ours = associate(second, first, max_difference_ns)
        return ours, theirs
    if not len(first):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    right = np.clip(np.searchsorted(second, first), 1, max(len(second) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(second) - 1)
    nearest = np.where(np.abs(second[right] - first) < np.abs(first - second[left]), right, left)
    gap = np.abs(second[nearest] - first)
    best = np.lexsort((gap, nearest))  # grouped by partner, nearest first
    is_winner = np.ones(len(best), bool)
    is_winner[1:] = nearest[best][1:] != nearest[best][:-1]
    kept = np.sort(best[is_winner & (gap[best] <= max_difference_ns)])
    return kept, nearest[kept]


def join_images(images: Stamps, others: Stamps, max_difference_ns: int, name: str) -> dict[int, int]:
    """Number of an image → number of what was measured at its moment; neither need be sorted by stamp.

    name: of what was measured, for a warning where it lies apart from all images.
    """
    order, other_order = np.argsort(images, kind="stable"), np.argsort(others, kind="stable")
    first, second = associate(images[order], others[other_order], max_difference_ns)
    if len(others) and not len(first):
        logger.warning(
            "%s: none of %d stamps lies within %g s of an image: different clocks?",
            name, len(others), max_difference_ns / 1e9,
        )  # fmt: skip
    return {int(order[i]): int(other_order[j]) for i, j in zip(first, second, strict=True)}


def pair_by_stamp(estimate: Trajectory, truth: Trajectory) -> tuple[Trajectory, Trajectory]:
    """The poses of both that share a moment. Raises ValueError where fewer than two do."""
    ours, theirs = associate(estimate.stamps_ns, truth.stamps_ns, round(1e9 * _LARGEST_GAP_S))
    if len(ours) < 2:
        raise ValueError(
            f"only {len(ours)} of {len(estimate)} estimated and {len(truth)} true poses lie within "
            f"{_LARGEST_GAP_S} s of each other: different clocks?"
        )
    return estimate.take(ours), truth.take(theirs)
