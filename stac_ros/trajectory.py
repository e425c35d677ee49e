"""Where the camera has been, compactly: 64 bytes per pose."""

from __future__ import annotations

import array

import numpy as np
from numpy.typing import NDArray

from stac_core.stamps import stamp_text
from stac_ros.quaternions import quaternion_from_rotation
from stac_ros.rescaling import Rescaling

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

    def __len__(self) -> int:
        return len(self._stamps)

    def add(self, stamp_ns: int, map_from_camera: NDArray[np.float64]) -> None:
        self._stamps.append(stamp_ns)
        self._numbers.extend(map_from_camera[:3, 3].tolist())
        self._numbers.extend(quaternion_from_rotation(map_from_camera[:3, :3]).tolist())
        if len(self) > self._max_poses:  # a tenth at once: to shift all of them for each pose would be slow
            leave = max(1, self._max_poses // 10)
            del self._stamps[:leave], self._numbers[: leave * _NUMBERS]

    def rescale(self, rescaling: Rescaling) -> None:
        positions = np.frombuffer(self._numbers).reshape(-1, _NUMBERS)[:, :3]
        positions[:] = rescaling.of(positions)

    def tum(self) -> str:
        """The lines of a TUM file: seconds, translation, quaternion xyzw."""
        poses = zip(*[iter(self._numbers)] * _NUMBERS, strict=True)
        return "".join(
            f"{stamp_text(stamp)} {_LINE % pose}" for stamp, pose in zip(self._stamps, poses, strict=True)
        )
