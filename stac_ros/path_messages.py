"""The camera's path as messages: the latest poses, each of which moves with its submap."""

from __future__ import annotations

from collections import deque

import numpy as np
from geometry_msgs.msg import Point, Pose, PoseStamped, Quaternion

from stac_core import Moves
from stac_ros.moving import STAYS, moved_poses


class PathMessages:
    """At most `length` poses in the map, in order of arrival; the oldest leave."""

    def __init__(self, length: int) -> None:
        self._poses: deque[PoseStamped] = deque(maxlen=length)
        self._submaps: deque[int] = deque(maxlen=length)

    def clear(self) -> None:
        self._poses.clear()
        self._submaps.clear()

    def add(self, pose: PoseStamped, submap: int) -> None:
        self._poses.append(pose)
        self._submaps.append(submap)

    def move(self, moves: Moves) -> None:
        """Each pose with its submap."""
        poses = np.array([_numbers(stamped.pose) for stamped in self._poses]).reshape(-1, 7)
        poses = moved_poses(moves, np.array(self._submaps, np.int32), poses)
        for stamped, (x, y, z, qx, qy, qz, qw) in zip(self._poses, poses.tolist(), strict=True):
            stamped.pose = Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=qw))

    def end_stream(self) -> None:
        """Nothing moves from here on but what is added later."""
        self._submaps = deque([STAYS] * len(self._poses), self._submaps.maxlen)

    def messages(self) -> list[PoseStamped]:
        return list(self._poses)


def _numbers(pose: Pose) -> list[float]:
    """Translation x, y, z and quaternion x, y, z, w."""
    place, turn = pose.position, pose.orientation
    return [place.x, place.y, place.z, turn.x, turn.y, turn.z, turn.w]
