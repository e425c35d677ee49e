"""What a node answered to a replayed bag, read back from the recording of its topics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stac_core.evaluation.datasets.bag_file import (
    BagFile,
    MessageList,
    decode_depth,
    header_stamp,
    pose_matrix,
)
from stac_core.evaluation.trajectory import Stamps, Trajectory

IMAGE_SENT = "/evaluation/image_sent"  # std_msgs/Header of each image, recorded when it was sent
_NODE = "stac_mapping"  # other nodes may be in the recording too, with topics that end alike
_POSE_TYPES = {
    "nav_msgs/msg/Odometry": f"/{_NODE}/odom",
    "geometry_msgs/msg/PoseWithCovarianceStamped": f"/{_NODE}/pose",
}
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Cloud:
    points: NDArray[np.float64]  # [N, 3] in the map frame
    colours: NDArray[np.float64] | None  # [N, 3] in [0, 1]


@dataclass(frozen=True)
class Diagnostics:
    """What the node said about itself; values are named "status: key"."""

    seconds: dict[str, list[float]]  # of numbers, since the first recorded message
    numbers: dict[str, list[float]]
    texts: dict[str, str]  # the last of every value

    def matching(self, *words: str) -> dict[str, tuple[list[float], list[float]]]:
        """Series whose name contains one of the words and that are not zero throughout."""
        chosen = [name for name, values in self.numbers.items() if any(values) and _has(name, words)]
        return {name: (self.seconds[name], self.numbers[name]) for name in chosen}


def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name.partition(": ")[2].lower() for word in words)


class BagResult:
    """A recorded answer to the images of a topic.

    Raises ValueError where the recording holds no answer at all.
    """

    def __init__(self, path: Path, image_topic: str) -> None:
        self._bag = BagFile(path)
        self.sent_ns = _departures(self._bag, image_topic)
        self.pose_topic = self._find(_POSE_TYPES)
        said, self.pose_logged_ns = _read_poses(self._bag, self.pose_topic)
        later = self._bag.last(self._find({"nav_msgs/msg/Path": f"/{_NODE}/path"}))
        self.trajectory = said if later is None else _corrected(said, later)
        if not len(self.trajectory):
            topics = ", ".join(self._bag.all_topics()) or "none"
            raise ValueError(
                f"{path}: holds no pose of the mapping node (topics: {topics}); "
                "did the node start and receive images?"
            )
        self.depth_topic = self._find({"sensor_msgs/msg/Image": f"/{_NODE}/depth"})
        self.depth_stamps_ns, recorded = self._bag.header_stamps(self.depth_topic)
        self._depths = MessageList(self._bag, self.depth_topic, recorded)
        self._depth_of = {int(stamp): index for index, stamp in enumerate(self.depth_stamps_ns)}

    def _find(self, endings: dict[str, str]) -> str:
        """The first topic with one of these types and endings, "" where there is none."""
        for kind, ending in endings.items():
            for topic in self._bag.topics(kind):
                if topic.endswith(ending):
                    return topic
        return ""

    def depth(self, stamp_ns: int) -> NDArray[np.float32]:
        """The last depth [H, W] published for a stamp of `depth_stamps_ns`, in the node's unit."""
        return decode_depth(self._depths[self._depth_of[stamp_ns]], self.depth_topic)

    def map_cloud(self) -> Cloud | None:
        """The last whole map."""
        topic = self._find({"sensor_msgs/msg/PointCloud2": f"/{_NODE}/map_points"})
        last = self._bag.last(topic)
        return read_cloud(last) if last is not None else None

    def latency_ms(self) -> dict[int, float]:
        """Stamp → time from sending the image to hearing its pose, on one clock."""
        return {
            stamp: (logged - self.sent_ns[stamp]) / 1e6
            for stamp, logged in self.pose_logged_ns.items()
            if stamp in self.sent_ns
        }

    def diagnostics(self) -> Diagnostics:
        found = Diagnostics({}, {}, {})
        start: int | None = None
        for item in self._bag.messages(*self._bag.topics("diagnostic_msgs/msg/DiagnosticArray")):
            start = item.recorded_ns if start is None else start
            for status in item.message.status:
                node, _, part = status.name.rpartition(": ")
                for pair in status.values if node.endswith(_NODE) else ():
                    name = f"{part}: {pair.key}"
                    found.texts[name] = pair.value
                    if _NUMBER.fullmatch(pair.value):
                        found.seconds.setdefault(name, []).append((item.recorded_ns - start) / 1e9)
                        found.numbers.setdefault(name, []).append(float(pair.value))
        return found


def read_cloud(message: Any) -> Cloud:
    """x, y, z and, where present, packed rgb of a PointCloud2; non-finite points left out."""
    formats = {f.name: ("<f4" if f.name != "rgb" else "<u4", f.offset) for f in message.fields}
    missing = [axis for axis in "xyz" if axis not in formats]
    if missing:
        raise ValueError(
            f"a point cloud without field {', '.join(missing)}; it has {', '.join(formats) or 'none'}"
        )
    names = [name for name in ("x", "y", "z", "rgb") if name in formats]
    layout = np.dtype(
        {
            "names": names,
            "formats": [formats[name][0] for name in names],
            "offsets": [formats[name][1] for name in names],
            "itemsize": message.point_step,
        }
    )
    table = np.frombuffer(message.data.tobytes(), layout, count=message.width * message.height)
    points = np.stack([table[axis] for axis in "xyz"], 1).astype(np.float64)
    keep = np.isfinite(points).all(1)
    colours = None
    if "rgb" in names:
        packed = table["rgb"][keep]
        colours = np.stack([packed >> 16 & 255, packed >> 8 & 255, packed & 255], 1) / 255.0
    return Cloud(points[keep], colours)


def _departures(bag: BagFile, image_topic: str) -> dict[int, int]:
    """Stamp of each image → when it was sent, or else when the recorder heard it."""
    departures = {}
    for item in bag.messages(IMAGE_SENT):
        stamp = item.message.stamp
        departures[int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)] = item.recorded_ns
    if not departures:
        stamps, recorded = bag.header_stamps(image_topic)
        departures = dict(zip(stamps.tolist(), recorded.tolist(), strict=True))
    return departures


def _read_poses(bag: BagFile, topic: str) -> tuple[Trajectory, dict[int, int]]:
    """The last pose published for each stamp, and when the first was."""
    poses: dict[int, NDArray] = {}
    logged: dict[int, int] = {}
    for item in bag.messages(topic):
        stamp = header_stamp(item.message)
        poses[stamp] = pose_matrix(item.message.pose.pose)
        logged.setdefault(stamp, item.recorded_ns)
    stamps: Stamps = np.array(sorted(poses), np.int64)
    matrices = np.array([poses[stamp] for stamp in stamps]).reshape(-1, 4, 4)
    return Trajectory(stamps, matrices), logged


def _corrected(said: Trajectory, path: Any) -> Trajectory:
    """Poses as a later path tells them again: a loop that closes moves what came before it."""
    told = {header_stamp(stamped): pose_matrix(stamped.pose) for stamped in path.poses}
    both = zip(said.stamps_ns.tolist(), said.world_from_camera, strict=True)
    poses = np.array([told.get(stamp, pose) for stamp, pose in both]).reshape(-1, 4, 4)
    return Trajectory(said.stamps_ns, poses)
