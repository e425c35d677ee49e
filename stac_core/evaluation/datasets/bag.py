"""A rosbag2 recording as a sequence: images, and whatever truth is recorded with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from stac_core.evaluation.datasets.bag_file import (
    FILE_TYPES,
    IMAGE_TYPES,
    INFO_TYPE,
    BagFile,
    MessageList,
    decode_depth,
    decode_image,
    is_depth,
)
from stac_core.evaluation.datasets.bag_truth import read_truth
from stac_core.evaluation.datasets.sequence import Array, Frame, fit_to_depth
from stac_core.evaluation.trajectory import Trajectory, join_images

_MAX_GAP_NS = 20_000_000
_SUFFIXES = (*FILE_TYPES, ".bag")  # are no part of a recording's name; other dots are


def recognises(path: Path) -> bool:
    return (path / "metadata.yaml").is_file() or path.suffix in FILE_TYPES


@dataclass(frozen=True)
class BagOptions:
    """Which topics to read; empty = find the only one."""

    topic: str = ""
    depth_topic: str = ""
    truth: str = ""  # a topic, a TUM file, or "none"

    def told(self) -> list[str]:
        """What was named, for people and result rows: "truth=gt.tum"."""
        return [f"{name}={value}" for name, value in asdict(self).items() if value]


DEFAULTS = BagOptions()


def read(path: Path, options: BagOptions = DEFAULTS) -> BagSequence:
    """Open a bag.

    Raises ValueError naming the topics where there is no image topic, or several to choose from.
    """
    return BagSequence(BagFile(path), options)


class BagSequence:
    """Images of one topic with their depth, poses and intrinsics, joined by header stamp."""

    max_depth_m = np.inf

    def __init__(self, bag: BagFile, options: BagOptions) -> None:
        name = bag.path.name or bag.path.resolve().name
        self.name = Path(name).stem if bag.path.suffix in _SUFFIXES else name
        self._bag = bag
        self.topic = choose_image_topic(bag, options.topic)
        self.stamps_ns, recorded = bag.header_stamps(self.topic)
        self._images = MessageList(bag, self.topic, recorded)
        self.camera_frame = bag.first(self.topic).header.frame_id
        self.intrinsics = _intrinsics(bag, self.topic)
        self.truth: Trajectory | None = read_truth(bag, options.truth, self.camera_frame, self.stamps_ns)
        self.depth_topic = _choose_depth_topic(bag, options.depth_topic)
        self._depths: MessageList | None = None
        self._depth_of: dict[int, int] = {}
        if self.depth_topic:
            depth_stamps, recorded = bag.header_stamps(self.depth_topic)
            self._depths = MessageList(bag, self.depth_topic, recorded)
            self._depth_of = join_images(self.stamps_ns, depth_stamps, _MAX_GAP_NS, self.depth_topic)
        self._pose_of: dict[int, int] = {}
        if self.truth:
            path = f"{bag.path}: camera path"
            self._pose_of = join_images(self.stamps_ns, self.truth.stamps_ns, _MAX_GAP_NS, path)

    def __len__(self) -> int:
        return len(self.stamps_ns)

    def frame(self, index: int) -> Frame:
        """One frame; an image of another size than the depth maps takes theirs."""
        image = decode_image(self._images[index], self.topic)
        image, intrinsics = fit_to_depth(image, self.intrinsics, self._depth_size)
        return Frame(image, int(self.stamps_ns[index]), self.pose(index), self.depth(index), intrinsics)

    def pose(self, index: int) -> Array | None:
        """True world_from_camera [4, 4] of one image, or None."""
        if self.truth is None or index not in self._pose_of:
            return None
        return self.truth.world_from_camera[self._pose_of[index]]

    def has_depth(self, index: int) -> bool:
        return index in self._depth_of

    def depth(self, index: int) -> np.ndarray | None:
        """True depth in metres of one image, or None."""
        if self._depths is None or index not in self._depth_of:
            return None
        return decode_depth(self._depths[self._depth_of[index]], self.depth_topic)

    @cached_property
    def _depth_size(self) -> tuple[int, ...] | None:
        first = self.depth(min(self._depth_of)) if self._depth_of else None
        return None if first is None else first.shape

    @cached_property
    def depth_intrinsics(self) -> Array | None:
        """Intrinsics in the size of the depth maps, None without either."""
        return self.frame(min(self._depth_of)).intrinsics if self._depth_of else None

    def cloud(self) -> Array | None:
        return None


def choose_image_topic(bag: BagFile, topic: str = "") -> str:
    """The given image topic, or the only one. ValueError lists what there is."""
    firsts = {name: bag.first(name) for name in bag.topics(*IMAGE_TYPES) if "depth" not in name.lower()}
    images = [name for name, first in firsts.items() if first is not None and not is_depth(first)]
    if topic:
        if topic not in images:
            raise ValueError(
                f"{bag.path}: no image topic {topic!r}; image topics: {', '.join(images) or 'none'}"
            )
        return topic
    if len(images) == 1:
        return images[0]
    if images:
        raise ValueError(f"{bag.path}: several image topics, choose one with --topic: {', '.join(images)}")
    listed = ", ".join(f"{name} ({kind})" for name, kind in sorted(bag.all_topics().items()))
    raise ValueError(f"{bag.path}: no image topic (sensor_msgs Image or CompressedImage); it has {listed}")


def choose_info_topic(image_topic: str, infos: list[str]) -> str | None:
    """Of topics of CameraInfo the one beside an image topic, at any level above it, or the only one."""
    parts = image_topic.split("/")
    beside = ["/".join([*parts[:end], "camera_info"]) for end in range(len(parts) - 1, 0, -1)]
    return next((topic for topic in beside if topic in infos), infos[0] if len(infos) == 1 else None)


def _choose_depth_topic(bag: BagFile, topic: str) -> str:
    """The given topic of depth images, or the only one, "" without any. ValueError lists what there is."""
    images = bag.topics("sensor_msgs/msg/Image")
    depths = [t for t in images if is_depth(bag.first(t))]
    if topic and topic not in images:  # some depth is recorded as mono16
        raise ValueError(f"{bag.path}: no depth topic {topic!r}; depth topics: {', '.join(depths) or 'none'}")
    if topic or not depths:
        return topic
    if len(depths) > 1:
        raise ValueError(
            f"{bag.path}: several depth topics, choose one with --depth_topic: {', '.join(depths)}"
        )
    return depths[0]


def _intrinsics(bag: BagFile, image_topic: str) -> Array | None:
    """K of the CameraInfo beside the image topic, or of the only one there is."""
    chosen = choose_info_topic(image_topic, bag.topics(INFO_TYPE))
    first = bag.first(chosen) if chosen else None
    if first is None:
        return None
    matrix = np.array(first.k, np.float64).reshape(3, 3)
    return matrix if matrix[0, 0] > 0 else None  # an uncalibrated camera publishes zeros
