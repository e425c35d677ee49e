"""Where the camera has been, compactly: 68 bytes per pose."""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from stac_core import Moves
from stac_core.stamps import stamp_text
from stac_ros.moving import STAYS, moved_poses
from stac_ros.quaternions import quaternion_from_rotation

_NUMBERS = 7  # translation x, y, z and quaternion x, y, z, w
_LINE = " ".join(["%.9g"] * _NUMBERS) + "\n"  # one operation for all of them: an autosave writes every pose
_AT_ONCE = 1000  # poses, which take a matrix each while they move


class Trajectory:
    """Poses of the camera in the map, in order of arrival; the oldest leave beyond `max_poses`.

    Loops close again and again on a long way. So moves are put together by submap, and poses follow where
    they are asked for.
    """

    def __init__(self, max_poses: int) -> None:
        self._max_poses = max_poses
        self.clear()

    def clear(self) -> None:
        self._stamps = array.array("q")
        self._numbers = array.array("d")
        self._submaps = array.array("i")
        self._moves = Moves.none(0)  # which the poses have yet to follow

    def __len__(self) -> int:
        return len(self._stamps)

    def add(self, stamp_ns: int, map_from_camera: NDArray[np.float64], submap: int) -> None:
        if 0 <= submap < len(self._moves):  # what moved the others does not move this one
            self._follow()
        self._stamps.append(stamp_ns)
        self._submaps.append(submap)
        self._numbers.extend(map_from_camera[:3, 3].tolist())
        self._numbers.extend(quaternion_from_rotation(map_from_camera[:3, :3]).tolist())
        if len(self) > self._max_poses:  # a tenth at once: to shift all of them for each pose would be slow
            leave = max(1, self._max_poses // 10)
            del self._stamps[:leave], self._submaps[:leave], self._numbers[: leave * _NUMBERS]

    def move(self, moves: Moves) -> None:
        """Each pose with its submap."""
        self._moves = self._moves.then(moves)

    def end_stream(self) -> None:
        """Nothing moves from here on but what is added later."""
        self._follow()
        self._submaps = array.array("i", [STAYS]) * len(self)

    def tum(self) -> Iterator[str]:
        """The lines of a TUM file: seconds, translation, quaternion xyzw."""
        self._follow()
        return tum_lines(self._stamps, zip(*[iter(self._numbers)] * _NUMBERS, strict=True))

    def _follow(self) -> None:
        """Let every pose be where its submap has moved to."""
        if not len(self._moves):
            return
        poses = np.frombuffer(self._numbers).reshape(-1, _NUMBERS)
        submaps = np.frombuffer(self._submaps, np.int32)
        for first in range(0, len(self), _AT_ONCE):
            some = np.s_[first : first + _AT_ONCE]
            poses[some] = moved_poses(self._moves, submaps[some], poses[some])
        self._moves = Moves.none(0)


def tum_lines(stamps_ns: Iterable[int], rows: Iterable[tuple[float, ...]]) -> Iterator[str]:
    """Lines of a TUM file. rows: translation and quaternion xyzw of each pose."""
    for stamp, row in zip(stamps_ns, rows, strict=True):
        yield f"{stamp_text(stamp)} {_LINE % row}"


def pose_rows(poses: Sequence[NDArray[np.float64]]) -> Iterator[tuple[float, ...]]:
    """The rows of poses [4, 4]; many at once, for one takes as long as a hundred among others."""
    for first in range(0, len(poses), _AT_ONCE):
        some = np.array(poses[first : first + _AT_ONCE])
        turns = Rotation.from_matrix(some[:, :3, :3]).as_quat()
        turns *= np.where(turns[:, 3:] < 0, -1, 1)  # w ≥ 0, as of poses that come one by one
        yield from map(tuple, np.hstack([some[:, :3, 3], turns]).tolist())
