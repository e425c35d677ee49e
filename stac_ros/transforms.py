"""Transforms to and from ROS: the only seam to tf2.

Transforms are looked up by `tf2_ros` where it is installed, elsewhere by the `TransformTree` of this
package. They are sent without it: on /tf and with the QoS of tf2, so every other node understands them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable

import numpy as np
from geometry_msgs.msg import Transform, TransformStamped
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.time import Time
from tf2_msgs.msg import TFMessage

from stac_ros.quaternions import pose_matrix, quaternion_from_rotation
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.topics import TF, qos_profile
from stac_ros.transform_tree import KEPT_S, Sample, StampError, TransformError, TransformTree

try:
    import tf2_ros
except ImportError:
    tf2_ros = None

LIBRARY = "tf2_ros" if tf2_ros else "stac_ros"
LATEST = 200  # transforms on /tf among which a node may want to know its own
STATIC_QOS = qos_profile("latched", 100)


def transform_message(parent_from_child: NDArray[np.float64]) -> Transform:
    """A rigid 4×4 matrix as geometry_msgs/Transform."""
    message = Transform()
    message.translation.x, message.translation.y, message.translation.z = map(float, parent_from_child[:3, 3])
    x, y, z, w = map(float, quaternion_from_rotation(parent_from_child[:3, :3]))
    message.rotation.x, message.rotation.y, message.rotation.z, message.rotation.w = x, y, z, w
    return message


def transform_matrix(message: Transform) -> NDArray[np.float64]:
    """geometry_msgs/Transform as a rigid 4×4 matrix, parent_from_child.

    Raises ValueError for a quaternion that is no rotation.
    """
    return pose_matrix(*_numbers(message))


def stamped_transform(  # type: ignore[no-untyped-def]
    parent_from_child: NDArray[np.float64], parent: str, child: str, stamp
) -> TransformStamped:
    """The message that places `child` in `parent` at a builtin_interfaces/Time."""
    message = TransformStamped(child_frame_id=child, transform=transform_message(parent_from_child))
    message.header.frame_id = parent
    message.header.stamp = stamp
    return message


def frame_name(told: str) -> str:
    """A frame as tf2 knows it: without the slash that ROS 1 put in front."""
    return told.removeprefix("/")


class TransformBroadcaster:
    """Sends moving transforms on /tf; any thread may do so."""

    def __init__(self, node: Node) -> None:
        self._publisher = node.create_publisher(TF.type, TF.name, TF.qos())
        self._sent: deque[Hashable] = deque(maxlen=2 * LATEST)  # some may be on their way
        self._lock = threading.Lock()

    def send(self, transform: TransformStamped) -> None:
        with self._lock:
            self._sent.append(_identity(transform))
        self._publisher.publish(TFMessage(transforms=[transform]))

    def has_sent(self, transform: TransformStamped) -> bool:
        """Whether one of the `LATEST` transforms on /tf is from here."""
        with self._lock:
            return _identity(transform) in self._sent


class _OwnBuffer(TransformTree):
    """Filled from /tf and /tf_static."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._logger = node.get_logger()
        node.create_subscription(TF.type, TF.name, self._hear_moving, TF.qos())
        node.create_subscription(TFMessage, "/tf_static", self._hear_static, STATIC_QOS)

    def _hear_moving(self, message: TFMessage) -> None:
        self._hear(message, static=False)

    def _hear_static(self, message: TFMessage) -> None:
        self._hear(message, static=True)

    def _hear(self, message: TFMessage, static: bool) -> None:
        for transform in message.transforms:
            parent, child = frame_name(transform.header.frame_id), frame_name(transform.child_frame_id)
            translation, quaternion = _numbers(transform.transform)
            length = float(np.linalg.norm(quaternion))
            named = parent and child and parent != child
            if not named or not np.isfinite(translation).all() or not 0.9 < length < 1.1:
                self._logger.warning(
                    f"ignored a transform {parent!r} → {child!r}: not between two frames, not finite, or its "
                    "quaternion is not of unit length",
                    throttle_duration_sec=10.0,
                )
                continue
            sample = Sample(parent, translation, quaternion / length)
            self.add(child, stamp_nanoseconds(transform.header.stamp), sample, static)


class _Tf2Buffer:
    """`tf2_ros.Buffer` behind the same methods."""

    def __init__(self, node: Node) -> None:
        self._buffer = tf2_ros.Buffer(cache_time=Duration(seconds=KEPT_S), node=node)
        self._listener = tf2_ros.TransformListener(self._buffer, node)
        self.clear = self._buffer.clear

    def lookup(self, target: str, source: str, stamp_ns: int = 0) -> NDArray[np.float64]:
        try:
            found = self._buffer.lookup_transform(target, source, Time(nanoseconds=stamp_ns))
        except tf2_ros.ExtrapolationException as error:
            raise StampError(str(error), self._ahead_s(target, source, stamp_ns)) from error
        except tf2_ros.TransformException as error:
            raise TransformError(f"no transform between {target!r} and {source!r}: {error}") from error
        return transform_matrix(found.transform)

    def _ahead_s(self, target: str, source: str, stamp_ns: int) -> float:
        """How far a stamp lies after the newest time known; tf2 does not tell the oldest."""
        try:
            newest = self._buffer.lookup_transform(target, source, Time()).header.stamp
        except tf2_ros.TransformException:  # the links of the chain have no time in common
            return 0.0
        return (stamp_ns - stamp_nanoseconds(newest)) / 1e9


TransformBuffer = _OwnBuffer | _Tf2Buffer


def transform_buffer(node: Node) -> TransformBuffer:
    """Transforms asked for by frame names and stamp: the static ones, and the last `KEPT_S` of others."""
    return _Tf2Buffer(node) if tf2_ros else _OwnBuffer(node)


def _identity(transform: TransformStamped) -> Hashable:
    """What two nodes are not likely to have in common."""
    place = transform.transform.translation
    return transform.child_frame_id, stamp_nanoseconds(transform.header.stamp), place.x, place.y, place.z


def _numbers(message: Transform) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    t, q = message.translation, message.rotation
    return np.array([t.x, t.y, t.z]), np.array([q.x, q.y, q.z, q.w])
