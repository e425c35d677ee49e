"""Where the camera has been, compactly: 68 bytes per pose."""

from __future__ import annotations

import array

import numpy as np
from numpy.typing import NDArray

from stac_core import Moves
from stac_core.stamps import stamp_text
from stac_ros.moving import STAYS, moved_poses
from stac_ros.quaternions import quaternion_from_rotation

_NUMBERS = 7  # translation x, y, z and quaternion x, y, z, w
_LINE = " ".join(["%.9g"] * _NUMBERS) + "\n"  # one operation for all of them: an autosave writes every pose


class Trajectory:
    """Poses of the camera in the map, in order of arrival; the oldest leave beyond `max_poses`."""

    def __init__(self, max_poses: int) -> None:
        self._max_poses = max_poses
        self.clear()

    def clear(self) -> None:
        self._stamps = array.array("q")
        self._numbers = array.array("d")
        self._submaps = array.array("i")

    def __len__(self) -> int:
        return len(self._stamps)

    def add(self, stamp_ns: int, map_from_camera: NDArray[np.float64], submap: int) -> None:
        self._stamps.append(stamp_ns)
        self._submaps.append(submap)
        self._numbers.extend(map_from_camera[:3, 3].tolist())
        self._numbers.extend(quaternion_from_rotation(map_from_camera[:3, :3]).tolist())
        if len(self) > self._max_poses:  # a tenth at once: to shift all of them for each pose would be slow
            leave = max(1, self._max_poses // 10)
            del self._stamps[:leave], self._submaps[:leave], self._numbers[: leave * _NUMBERS]

    def move(self, moves: Moves) -> None:
        """Each pose with its submap."""
        poses = np.frombuffer(self._numbers).reshape(-1, _NUMBERS)
        poses[:] = moved_poses(moves, np.frombuffer(self._submaps, np.int32), poses)

    def end_stream(self) -> None:
        """Nothing moves from here on but what is added later."""
        self._submaps = array.array("i", [STAYS]) * len(self)

    def tum(self) -> str:
        """The lines of a TUM file: seconds, translation, quaternion xyzw."""
        poses = zip(*[iter(self._numbers)] * _NUMBERS, strict=True)
        return "".join(
            f"{stamp_text(stamp)} {_LINE % pose}" for stamp, pose in zip(self._stamps, poses, strict=True)
        )
