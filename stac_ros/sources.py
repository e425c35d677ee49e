"""What can be replayed, as messages in order of time: a rosbag2, or any sequence of images."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from rosbags.interfaces import Connection
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from stac_core.evaluation.datasets import READERS, Frame, Sequence, bag, open_sequence
from stac_core.evaluation.datasets.bag import choose_image_topic
from stac_core.evaluation.datasets.bag_file import BagFile
from stac_ros.images import byte_array, encode_image
from stac_ros.topics import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE

STATIC_TOPICS = ("/tf_static",)
_TRANSFORMS = ("/tf", *STATIC_TOPICS)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One message and when it is due on the recording's clock."""

    due_ns: int
    topic: str
    payload: Any  # a message, or the bytes of a serialised one


class Source(Protocol):
    """A recording: the topics it fills and their messages."""

    image_topic: str
    types: dict[str, type[Any]]  # by topic

    def items(self) -> Iterator[Item]:
        """All messages from the beginning. Raises ValueError or OSError naming the file."""


def open_source(name: str, topic: str, more_topics: Iterable[str], compressed: bool, frame_id: str) -> Source:
    """Open a bag, a video, a folder of images, a known dataset, or `world:SEED`.

    topic: the image topic of a bag with several. more_topics: topics of a bag to replay beside
    images, calibration and transforms. compressed, frame_id: how images without a bag are sent.

    Raises ValueError or OSError naming what cannot be read and what was looked for.
    """
    path = Path(name)
    if bag.recognises(path):
        return BagSource(path, topic, more_topics)
    if topic:
        raise ValueError(f"--topic {topic!r}: {name} is not a rosbag2 recording and has no topics")
    if path.exists() and not any(reader.recognises(path) for reader in READERS.values()):
        raise ValueError(
            f"{name}: no images, no video, no rosbag2 and none of the known datasets ({', '.join(READERS)})"
        )
    return SequenceSource(open_sequence(name), compressed, frame_id)


class SequenceSource:
    """Images, and their calibration where it is known, as a camera driver would send them."""

    def __init__(self, sequence: Sequence, compressed: bool, frame_id: str) -> None:
        self._sequence, self._compressed, self._frame_id = sequence, compressed, frame_id
        self.image_topic = COMPRESSED_IMAGE.name if compressed else IMAGE.name
        self.types = {self.image_topic: CompressedImage if compressed else Image}
        if sequence.frame(0).intrinsics is not None:
            self.types[CAMERA_INFO.name] = CameraInfo

    def items(self) -> Iterator[Item]:
        for index in range(len(self._sequence)):
            frame = self._sequence.frame(index)
            header = Header(frame_id=self._frame_id, stamp=stamp_message(frame.stamp_ns))
            if frame.intrinsics is not None:
                info = _camera_info(frame, frame.intrinsics, header)
                yield Item(frame.stamp_ns, CAMERA_INFO.name, info)
            image = (
                _compressed(frame.image, header)
                if self._compressed
                else encode_image(frame.image, "rgb8", header)
            )
            yield Item(frame.stamp_ns, self.image_topic, image)


class BagSource:
    """A rosbag2: recorded bytes as they are, with the camera's topics under the node's names."""

    def __init__(self, path: Path, topic: str, more_topics: Iterable[str]) -> None:
        self._bag = BagFile(path)
        recorded_image = choose_image_topic(self._bag, topic)
        kinds = self._bag.all_topics()
        image = COMPRESSED_IMAGE if kinds[recorded_image].endswith("/CompressedImage") else IMAGE
        self.image_topic = image.name
        self._names = {recorded_image: image.name}  # recorded topic → topic to publish
        recorded_info = _camera_info_topic(recorded_image, kinds)
        if recorded_info:
            self._names[recorded_info] = CAMERA_INFO.name
        for extra in (*(t for t in _TRANSFORMS if t in kinds), *more_topics):
            if extra not in kinds:
                raise ValueError(f"{path}: no topic {extra!r}; it has {', '.join(sorted(kinds))}")
            self._names.setdefault(extra, extra)
        self.types: dict[str, type[Any]] = {}
        for connection in self._bag.connections(*self._names):
            self._learn_type(connection)

    def items(self) -> Iterator[Item]:
        """Static transforms first: whatever comes later may need them."""
        known = [recorded for recorded, name in self._names.items() if name in self.types]
        static = [topic for topic in known if topic in STATIC_TOPICS]
        moving = [topic for topic in known if topic not in STATIC_TOPICS]
        first_ns = next(recorded for _, recorded, _ in self._bag.raw_messages(*moving))
        for connection, _, raw in self._bag.raw_messages(*static):
            yield Item(first_ns, self._names[connection.topic], bytes(raw))
        for connection, recorded_ns, raw in self._bag.raw_messages(*moving):
            yield Item(recorded_ns, self._names[connection.topic], bytes(raw))

    def _learn_type(self, connection: Connection) -> None:
        try:
            self.types[self._names[connection.topic]] = message_class(connection.msgtype)
        except (ImportError, AttributeError):
            logger.warning(
                "topic %s is not replayed: its type %s is not installed", connection.topic, connection.msgtype
            )


def message_class(name: str) -> type[Any]:
    """The class of a type such as sensor_msgs/msg/Image. Raises ImportError or AttributeError."""
    package, _, kind = name.partition("/msg/")
    found: type[Any] = getattr(importlib.import_module(f"{package}.msg"), kind)
    return found


def stamp_message(stamp_ns: int) -> Time:
    return Time(sec=stamp_ns // 1_000_000_000, nanosec=stamp_ns % 1_000_000_000)


def _camera_info_topic(image_topic: str, kinds: dict[str, str]) -> str | None:
    """The calibration beside an image topic, at any level above it, or the only one there is."""
    infos = [topic for topic, kind in kinds.items() if kind == "sensor_msgs/msg/CameraInfo"]
    parts = image_topic.split("/")
    beside = ["/".join([*parts[:end], "camera_info"]) for end in range(len(parts) - 1, 0, -1)]
    return next((topic for topic in beside if topic in infos), infos[0] if len(infos) == 1 else None)


def _compressed(image: np.ndarray, header: Header) -> CompressedImage:
    done, encoded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    if not done:
        raise ValueError(f"an image of {image.shape[1]}×{image.shape[0]} pixels cannot be written as JPEG")
    message = CompressedImage(header=header, format="rgb8; jpeg compressed bgr8")
    message.data = byte_array(encoded)
    return message


def _camera_info(frame: Frame, intrinsics: np.ndarray, header: Header) -> CameraInfo:
    """Calibration of a camera without distortion."""
    height, width, _ = frame.image.shape
    info = CameraInfo(header=header, height=height, width=width, distortion_model="plumb_bob")
    info.d = [0.0] * 5
    info.k = [float(value) for value in intrinsics.ravel()]
    info.r = [float(value) for value in np.eye(3).ravel()]
    info.p = [float(value) for value in np.hstack([intrinsics, np.zeros((3, 1))]).ravel()]
    return info
