"""Transforms to and from ROS: the only seam to tf2.

Where `tf2_ros` is installed it does the work; elsewhere a publisher of tf2_msgs and the
`TransformTree` of this package. Both speak on /tf and /tf_static with the same QoS, so the two
kinds understand each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from geometry_msgs.msg import Transform, TransformStamped
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.time import Time
from tf2_msgs.msg import TFMessage

from stac_ros.quaternions import pose_matrix, quaternion_from_rotation
from stac_ros.transform_tree import Sample, TransformError, TransformTree

try:
    import tf2_ros
except ImportError:
    tf2_ros = None

LIBRARY = "tf2_ros" if tf2_ros else "stac_ros"
TF_QOS = QoSProfile(depth=100)
TF_STATIC_QOS = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
TF_STATIC_LISTENER_QOS = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)


def stamp_nanoseconds(stamp) -> int:  # type: ignore[no-untyped-def]
    """A builtin_interfaces/Time as whole nanoseconds."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


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


class TransformBroadcaster:
    """Sends moving transforms on /tf."""

    def __init__(self, node: Node) -> None:
        self._publisher = node.create_publisher(TFMessage, "/tf", TF_QOS)

    def send(self, transforms: Sequence[TransformStamped]) -> None:
        self._publisher.publish(TFMessage(transforms=list(transforms)))


class StaticTransformBroadcaster:
    """Sends transforms that never change on /tf_static, also to those who come later.

    Every message replaces the last one for late subscribers, so each holds all transforms sent so
    far.
    """

    def __init__(self, node: Node) -> None:
        self._publisher = node.create_publisher(TFMessage, "/tf_static", TF_STATIC_QOS)
        self._by_child: dict[str, TransformStamped] = {}

    def send(self, transforms: Sequence[TransformStamped]) -> None:
        self._by_child.update({transform.child_frame_id: transform for transform in transforms})
        self._publisher.publish(TFMessage(transforms=list(self._by_child.values())))


class StaticParents:
    """Who is whose parent on /tf_static, where the driver of a camera places its optical frame."""

    def __init__(self, node: Node) -> None:
        self._parents: dict[str, str] = {}
        node.create_subscription(TFMessage, "/tf_static", self._receive, TF_STATIC_LISTENER_QOS)

    def above(self, frame: str) -> list[str]:
        """The frame's parent, that one's parent, and so on; empty = it has none."""
        found: list[str] = []
        while (frame := self._parents.get(frame, "")) and frame not in found:
            found.append(frame)
        return found

    def _receive(self, message: TFMessage) -> None:
        self._parents |= {t.child_frame_id: t.header.frame_id for t in message.transforms}


class _OwnBuffer:
    """`TransformTree` filled from /tf and /tf_static."""

    def __init__(self, node: Node, seconds: float) -> None:
        self._logger = node.get_logger()
        self._tree = TransformTree(seconds)
        self.clear = self._tree.clear
        self.lookup = self._tree.lookup
        node.create_subscription(TFMessage, "/tf", self._moving, TF_QOS)
        node.create_subscription(TFMessage, "/tf_static", self._static, TF_STATIC_LISTENER_QOS)

    def _moving(self, message: TFMessage) -> None:
        self._add(message, static=False)

    def _static(self, message: TFMessage) -> None:
        self._add(message, static=True)

    def _add(self, message: TFMessage, static: bool) -> None:
        for transform in message.transforms:
            translation, quaternion = _numbers(transform.transform)
            length = float(np.linalg.norm(quaternion))
            if not np.isfinite(translation).all() or not 0.9 < length < 1.1:
                self._logger.warning(
                    f"ignored a transform {transform.header.frame_id!r} → {transform.child_frame_id!r}: "
                    "not finite, or its quaternion is not of unit length",
                    throttle_duration_sec=10.0,
                )
                continue
            sample = Sample(transform.header.frame_id, translation, quaternion / length)
            stamp_ns = stamp_nanoseconds(transform.header.stamp)
            self._tree.add(transform.child_frame_id, stamp_ns, sample, static)


class _Tf2Buffer:
    """`tf2_ros.Buffer` behind the same methods."""

    def __init__(self, node: Node, seconds: float) -> None:
        self._buffer = tf2_ros.Buffer(cache_time=Duration(seconds=seconds), node=node)
        self._listener = tf2_ros.TransformListener(self._buffer, node)
        self.clear = self._buffer.clear

    def lookup(self, target: str, source: str, stamp_ns: int = 0) -> NDArray[np.float64]:
        try:
            found = self._buffer.lookup_transform(target, source, Time(nanoseconds=stamp_ns))
        except tf2_ros.TransformException as error:
            raise TransformError(f"no transform between {target!r} and {source!r}: {error}") from error
        return transform_matrix(found.transform)


class TransformBuffer:
    """The transforms of the last `seconds`, asked by frame names and stamp."""

    def __init__(self, node: Node, seconds: float = 10.0) -> None:
        self._buffer = _Tf2Buffer(node, seconds) if tf2_ros else _OwnBuffer(node, seconds)

    def lookup(self, target: str, source: str, stamp_ns: int = 0) -> NDArray[np.float64]:
        """target_from_source [4, 4] at a stamp in nanoseconds; 0 = the newest common time.

        Raises TransformError naming the frames and the reason.
        """
        return self._buffer.lookup(target, source, stamp_ns)

    def clear(self) -> None:
        """Forget the moving transforms, e.g. after time jumped back."""
        self._buffer.clear()


def _numbers(message: Transform) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    t, q = message.translation, message.rotation
    return np.array([t.x, t.y, t.z]), np.array([q.x, q.y, q.z, q.w])
