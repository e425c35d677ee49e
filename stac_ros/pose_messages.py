"""Poses as messages, with their covariances."""

from __future__ import annotations

import numpy as np
from geometry_msgs.msg import (
    Point,
    Pose,
    PoseWithCovariance,
    Quaternion,
    Twist,
    TwistWithCovariance,
    Vector3,
)
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from std_msgs.msg import Header

from stac_ros.covariances import Variance, covariance, no_velocity
from stac_ros.quaternions import quaternion_from_rotation
from stac_ros.stamps import stamp_nanoseconds


def pose_message(parent_from_child: NDArray[np.float64]) -> Pose:
    """A rigid 4×4 matrix as geometry_msgs/Pose."""
    x, y, z = map(float, parent_from_child[:3, 3])
    qx, qy, qz, qw = map(float, quaternion_from_rotation(parent_from_child[:3, :3]))
    return Pose(position=Point(x=x, y=y, z=z), orientation=Quaternion(x=qx, y=qy, z=qz, w=qw))


def pose_with_covariance(pose: Pose, variance: Variance | None) -> PoseWithCovariance:
    return PoseWithCovariance(pose=pose, covariance=covariance(variance))


class OdometryMessages:
    """Odometry out of successive poses: the velocity is that between two images, in the camera's frame."""

    def __init__(self) -> None:
        self._last_ns: int | None = None  # stamp of the last image

    def next(
        self,
        header: Header,
        child: str,
        pose: PoseWithCovariance,
        last_from_camera: NDArray[np.float64] | None,
        step_variance: Variance | None = None,
    ) -> Odometry:
        """The message of the next image; header: its stamp, in the frame of the pose.

        last_from_camera: the motion from the last image to this one [4, 4], and step_variance of it; None =
        unknown.
        """
        twist = TwistWithCovariance(covariance=no_velocity(step_variance))
        stamp_ns = stamp_nanoseconds(header.stamp)
        if last_from_camera is not None and self._last_ns is not None and stamp_ns > self._last_ns:
            seconds = (stamp_ns - self._last_ns) / 1e9
            twist.twist = _twist(last_from_camera, seconds)
            twist.covariance = covariance(None if step_variance is None else step_variance / seconds**2)
        message = Odometry(header=header, child_frame_id=child, pose=pose, twist=twist)
        self._last_ns = stamp_ns
        return message


def _twist(last_from_camera: NDArray[np.float64], seconds: float) -> Twist:
    """Constant velocity that makes this step, seen from the camera's present pose."""
    rotation = last_from_camera[:3, :3]
    linear = rotation.T @ last_from_camera[:3, 3] / seconds
    quaternion = quaternion_from_rotation(rotation)  # w ≥ 0: the shorter way round
    sine = float(np.linalg.norm(quaternion[:3]))
    angle = 2 * np.arctan2(sine, quaternion[3])
    angular = quaternion[:3] * (angle / sine if sine > 1e-12 else 2.0) / seconds
    return Twist(linear=_vector(linear), angular=_vector(angular))


def _vector(values: NDArray[np.float64]) -> Vector3:
    x, y, z = map(float, values)
    return Vector3(x=x, y=y, z=z)
