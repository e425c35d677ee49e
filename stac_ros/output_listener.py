"""What the mapping node has said so far, for those who show it or keep it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Pose, PoseWithCovarianceStamped
from nav_msgs.msg import Path
from numpy.typing import NDArray
from rclpy.node import Node
from rclpy.serialization import deserialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_msgs.msg import Header

from stac_ros.clouds import cloud_points
from stac_ros.images import ImageError, decode_colour, decode_depth
from stac_ros.listen import subscribe
from stac_ros.quaternions import pose_matrix
from stac_ros.stamps import stamp_nanoseconds
from stac_ros.topics import (
    COMPRESSED_IMAGE,
    DEPTH,
    DEPTH_INFO,
    DIAGNOSTICS,
    IMAGE,
    MAP_POINTS,
    NODE_NAME,
    PATH,
    POSE,
    Topic,
)

LEVELS = ("OK", "warning", "error", "stale")  # of diagnostics
_IMAGES_KEPT = 32  # camera images that wait for their depth
_DEPTH = 100  # messages that may wait while this process is busy writing or drawing
_MAPS = 3  # large; but an empty one tells that a stream has ended, and must not be pushed out by the next


@dataclass(frozen=True)
class View:
    """One camera image with its depth."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    depth: NDArray[np.float32]  # [H, W], NaN = invalid


@dataclass(frozen=True)
class Health:
    """One part of the node's diagnostics."""

    level: int  # index into LEVELS
    message: str
    values: dict[str, str]


@dataclass(frozen=True)
class MemorySample:
    """The cache at one moment."""

    seconds: float  # since the first one
    cache_bytes: int
    frames: int  # mapped so far


@dataclass
class Seen:
    """The newest of everything; empty until it has been heard."""

    stamps_ns: list[int] = field(default_factory=list)
    map_from_camera: list[NDArray[np.float64]] = field(default_factory=list)  # [4, 4] each
    path_stamp_ns: int = -1
    corrections: int = 0  # times that a path has told of poses again
    map_stamp_ns: int = -1
    map_positions: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 3), np.float32))
    map_colours: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 3), np.uint8))
    view: View | None = None
    intrinsics: NDArray[np.float64] | None = None  # [3, 3] of the depth image
    health: dict[str, Health] = field(default_factory=dict)  # by part: input, inference, memory, map
    memory: list[MemorySample] = field(default_factory=list)

    def told(self, part: str, key: str) -> str | None:
        """One value of diagnostics."""
        return self.health[part].values.get(key) if part in self.health else None

    @property
    def weights(self) -> str:
        return self.told("inference", "weights") or "unknown, no diagnostics were heard"


class OutputListener:
    """Subscribes a node to the mapping node's outputs and to the camera, and keeps the newest.

    Must be spun by one thread.
    """

    def __init__(
        self, node: Node, on_depth: Callable[[Image], None] = lambda message: None, most: int = 0
    ) -> None:
        """on_depth: is given every depth image, also one whose camera image was not heard.

        most: so many poses and samples of memory are kept, the newest; 0 = all.
        """
        self._keep_depth, self._most = on_depth, most
        self.seen = Seen()
        self.heard_at = time.monotonic()  # the last message that an image caused
        self._logger = node.get_logger()
        self._first = 0.0  # when diagnostics were first heard
        self._images: OrderedDict[int, Image | CompressedImage] = OrderedDict()
        self._subscriptions: list[tuple[Topic, Subscription]] = []
        self._node = node
        self._own_name = node.resolve_topic_name(NODE_NAME).lstrip("/")  # of the mapping node listened to
        self._listens_to_camera = False
        self._path: bytes | None = None  # the newest ~/path, unless it has been read
        for topic, callback in (
            (POSE, self._on_pose),
            (MAP_POINTS, self._on_map),
            (DEPTH, self._on_depth),
            (DEPTH_INFO, self._on_depth_info),
            (DIAGNOSTICS, self._on_diagnostics),
        ):
            self._subscribe(topic, callback, _MAPS if topic is MAP_POINTS else _DEPTH)
        self._subscribe(PATH, self._on_path, raw=True)

    def listen_only_to_the_whole(self) -> None:
        """To map and path; what is said of new frames is no longer of interest."""
        for topic, subscription in self._subscriptions:
            if topic not in (MAP_POINTS, PATH):
                self._node.destroy_subscription(subscription)

    def correct_poses(self) -> None:
        """What the newest path tells of poses again is true.

        Places change where the node closes a loop, and lengths where it learns its scale. Reading a long path
        takes a tenth of a second; so it is left to those who need the poses.
        """
        raw, self._path = self._path, None
        if raw is None:
            return
        self.seen.corrections += 1
        known = {stamp_ns: index for index, stamp_ns in enumerate(self.seen.stamps_ns)}
        for stamped in deserialize_message(raw, Path).poses:
            index = known.get(stamp_nanoseconds(stamped.header.stamp))
            if index is not None:
                self.seen.map_from_camera[index] = _matrix(stamped.pose)

    def _subscribe(
        self, topic: Topic, callback: Callable[[Any], None], depth: int = 0, raw: bool = False
    ) -> None:
        self._subscriptions.append((topic, subscribe(self._node, topic, callback, depth, raw)))

    def _listen_to_camera(self) -> None:
        """Only once the mapping node has been heard: a replay that waits for this subscription may then
        begin without a pose or a depth image being lost."""
        self._listens_to_camera = True
        for topic in (IMAGE, COMPRESSED_IMAGE):
            self._subscribe(topic, self._on_image, _DEPTH)

    def _on_image(self, message: Image | CompressedImage) -> None:
        self._images[stamp_nanoseconds(message.header.stamp)] = message
        if len(self._images) > _IMAGES_KEPT:
            self._images.popitem(last=False)

    def _on_pose(self, message: PoseWithCovarianceStamped) -> None:
        self.heard_at = time.monotonic()
        stamp_ns = stamp_nanoseconds(message.header.stamp)
        latest = self.seen.stamps_ns[-2:]
        if latest and stamp_ns < min(latest):  # else, if at all, a single stamp was far ahead
            self.seen.stamps_ns, self.seen.map_from_camera = [], []  # a new stream has begun
        self.seen.stamps_ns.append(stamp_ns)
        self.seen.map_from_camera.append(_matrix(message.pose.pose))
        if self._most:
            for poses in (self.seen.stamps_ns, self.seen.map_from_camera):
                del poses[: -self._most]

    def _on_path(self, raw: bytes) -> None:
        self._path = raw
        header = deserialize_message(raw, Header)  # which a path begins with; its poses are left unread
        self.seen.path_stamp_ns = stamp_nanoseconds(header.stamp)

    def _on_map(self, message: PointCloud2) -> None:
        self.heard_at = time.monotonic()
        self.seen.map_positions, self.seen.map_colours = cloud_points(message)
        self.seen.map_stamp_ns = stamp_nanoseconds(message.header.stamp)
        if not len(self.seen.map_positions):
            self._forget_up_to(self.seen.map_stamp_ns)

    def _forget_up_to(self, stamp_ns: int) -> None:
        """A stream has ended with the frame of this stamp; frames of the next may have been heard already."""
        if stamp_ns in self.seen.stamps_ns:
            gone = self.seen.stamps_ns.index(stamp_ns) + 1
            del self.seen.stamps_ns[:gone], self.seen.map_from_camera[:gone]

    def _on_depth(self, message: Image) -> None:
        self.heard_at = time.monotonic()
        self._keep_depth(message)
        image = self._images.get(stamp_nanoseconds(message.header.stamp))
        if image is None:
            return
        try:
            self.seen.view = View(decode_colour(image), decode_depth(message))
        except ImageError as error:
            self._logger.warning(f"an image cannot be shown: {error}", throttle_duration_sec=10.0)

    def _on_depth_info(self, message: CameraInfo) -> None:
        self.seen.intrinsics = np.array(message.k, np.float64).reshape(3, 3)

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        own = [(part, status) for node, part, status in _parts(message) if node == self._own_name]
        if not own:
            return  # of somebody else: /diagnostics is for all
        if not self._listens_to_camera:
            self._listen_to_camera()
        for part, status in own:
            values = {pair.key: pair.value for pair in status.values}
            self.seen.health[part] = Health(status.level[0], status.message, values)
        live, voxels = (self.seen.told("memory", f"cache.{name}_bytes") for name in ("live", "voxel"))
        if live is not None and voxels is not None:
            now = time.monotonic()
            self._first = self._first or now
            cache_bytes = int(live) + int(voxels)
            frames = len(self.seen.stamps_ns)
            self.seen.memory.append(MemorySample(now - self._first, cache_bytes, frames))
            if self._most:
                del self.seen.memory[: -self._most]


def _parts(message: DiagnosticArray) -> Iterator[tuple[str, str, DiagnosticStatus]]:
    """Of each status the node, its part, and the status itself."""
    for status in message.status:
        node, _, part = status.name.rpartition(": ")
        yield node, part, status


def _matrix(pose: Pose) -> NDArray[np.float64]:
    """[4, 4] as a pose message says."""
    place, turn = pose.position, pose.orientation
    return pose_matrix(np.array([place.x, place.y, place.z]), np.array([turn.x, turn.y, turn.z, turn.w]))
