"""Read rosbag2 recordings (mcap, sqlite3) without ROS: topics, stamps, pictures, poses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.image import ImageError, message_to_cvimage
from rosbags.interfaces import Connection
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore

from stac_core.evaluation.datasets.sequence import Array
from stac_core.evaluation.trajectory import poses_from_quaternions

FILE_TYPES = (".mcap", ".db3")
IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
INFO_TYPE = "sensor_msgs/msg/CameraInfo"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stamped:
    """One message: when it was recorded, and its content."""

    recorded_ns: int
    topic: str
    message: Any


def header_stamp(message: Any) -> int:
    """The header's stamp in nanoseconds."""
    return int(message.header.stamp.sec) * 1_000_000_000 + int(message.header.stamp.nanosec)


class BagFile:
    """One opened recording; a folder with metadata.yaml or a bare .mcap or .db3 file, whatever its name.

    ValueError for what is none, or is damaged. Single damaged messages are left out, as if never recorded.
    """

    def __init__(self, path: Path) -> None:
        _check_kind(path)
        self.path = path
        self._told: set[str] = set()  # topics with damaged messages
        try:
            self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_KILTED))
            # By its name alone a folder called *.bag would be taken for a file of ROS 1.
            self._reader.is2, self._reader.readers = True, [Reader(path)]
            self._reader.open()
        except Exception as error:  # the library's errors share no base class with its own assertions
            raise ValueError(
                f"{path}: cannot be read as a bag ({error}); a recording that was cut off can often be "
                "repaired with 'mcap recover' or 'ros2 bag reindex'"
            ) from error

    def topics(self, *types: str) -> list[str]:
        """Topics with at least one message of one of the given types, sorted."""
        return sorted({c.topic for c in self._reader.connections if c.msgtype in types and c.msgcount != 0})

    def all_topics(self) -> dict[str, str]:
        """Every topic and its type."""
        return {c.topic: c.msgtype for c in self._reader.connections}

    def connections(self, *topics: str) -> list[Connection]:
        return [c for c in self._reader.connections if c.topic in topics]

    def messages(self, *topics: str, start_ns: int | None = None) -> Iterator[Stamped]:
        """Decode messages in order of recording. Raises ValueError where the file breaks off."""
        for connection, recorded, _, message in self._whole(*topics, start_ns=start_ns):
            yield Stamped(recorded, connection.topic, message)

    def raw_messages(self, *topics: str) -> Iterator[tuple[Connection, int, bytes]]:
        """The same as recorded, undecoded, with their topic's connection and time of recording."""
        for connection, recorded, raw, _ in self._whole(*topics):
            yield connection, recorded, raw

    def _whole(
        self, *topics: str, start_ns: int | None = None
    ) -> Iterator[tuple[Connection, int, bytes, Any]]:
        """Both, of messages that can be decoded; None instead where the type is unknown."""
        types = self._reader.typestore.fielddefs
        for connection, recorded, raw in self._recorded(*topics, start_ns=start_ns):
            topic, kind = connection.topic, connection.msgtype
            try:
                message = self._reader.deserialize(raw, kind) if kind in types else None
            except AnyReaderError as error:
                if topic not in self._told:
                    self._told.add(topic)
                    logger.warning(
                        "%s: a message of %s, recorded at %d ns, is damaged (%s): it is left out, and any "
                        "other like it",
                        *(self.path, topic, recorded, error),
                    )
                continue
            yield connection, recorded, raw, message

    def _recorded(self, *topics: str, start_ns: int | None = None) -> Iterator[tuple[Connection, int, bytes]]:
        connections = self.connections(*topics)
        if not connections:
            return
        try:
            yield from self._reader.messages(connections, start=start_ns)
        except Exception as error:  # as above, and those of whatever decompresses
            raise ValueError(f"{self.path}: breaks off while reading {topics} ({error})") from error

    def header_stamps(self, topic: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Header stamps and times of recording of a topic."""
        stamps, times = [], []
        for item in self.messages(topic):
            stamps.append(header_stamp(item.message))
            times.append(item.recorded_ns)
        return np.array(stamps, np.int64), np.array(times, np.int64)

    def first(self, topic: str) -> Any:
        """The first message of a topic, or None."""
        return next((m.message for m in self.messages(topic)), None)

    def last(self, topic: str) -> Any:
        """The last message of a topic, None without any or where it is damaged; others are not decoded."""
        last_ns = max((recorded for _, recorded, _ in self._recorded(topic)), default=None)
        found = [item.message for item in self.messages(topic, start_ns=last_ns)]
        return found[-1] if found else None


class MessageList:
    """The messages of one topic by number; quick in order, possible in any order."""

    def __init__(self, bag: BagFile, topic: str, recorded_ns: NDArray[np.int64]) -> None:
        self._bag, self._topic, self._recorded = bag, topic, recorded_ns
        self._stream: Iterator[Stamped] = iter(())
        self._next = len(recorded_ns)

    def __getitem__(self, index: int) -> Any:
        if index < self._next or index > self._next + 8:
            time = self._recorded[index]
            self._stream = self._bag.messages(self._topic, start_ns=int(time))
            self._next = int(np.searchsorted(self._recorded, time))
        while self._next < index:
            next(self._stream)
            self._next += 1
        self._next += 1
        return next(self._stream).message


def _check_kind(path: Path) -> None:
    """Refuse what no reader of rosbag2 can open, naming what would do."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such bag")
    if path.is_file() and path.suffix not in FILE_TYPES:
        other = "; rosbags-convert makes one of a ROS 1 bag" if path.suffix == ".bag" else ""
        raise ValueError(f"{path}: no file of a rosbag2 recording ({' or '.join(FILE_TYPES)}){other}")
    if path.is_dir() and not (path / "metadata.yaml").is_file():
        files = sorted(str(file) for file in path.iterdir() if file.suffix in FILE_TYPES)
        cure = f"there is no {' or '.join(FILE_TYPES)} file in it either"
        if files:
            cure = f"'ros2 bag reindex' writes one, or name a file: {', '.join(files)}"
        raise ValueError(f"{path}: a folder without metadata.yaml is no recording; {cure}")


def decode_image(message: Any, topic: str) -> NDArray[np.uint8]:
    """RGB of an Image or CompressedImage. Raises ValueError naming the encoding."""
    kind = _kind(message)
    try:
        image = message_to_cvimage(message, "rgb8")
    except (ImageError, cv2.error, ValueError, TypeError) as error:
        raise ValueError(
            f"topic {topic}: an image with encoding {kind!r}, {_size(message)}, cannot be decoded ({error})"
        ) from error
    if image is None or image.ndim != 3:
        raise ValueError(f"topic {topic}: an image with encoding {kind!r} is empty or damaged")
    return np.ascontiguousarray(image, np.uint8)


def decode_depth(message: Any, topic: str) -> NDArray[np.float32]:
    """Metres of a 32FC1 or 16UC1 (millimetres) image, 0 where nothing was measured (REP-118)."""
    types = {"32FC1": ("f4", 1.0), "16UC1": ("u2", 0.001), "mono16": ("u2", 0.001)}
    if getattr(message, "encoding", "") not in types:
        raise ValueError(f"topic {topic}: depth must be 32FC1 or 16UC1, not {_kind(message)!r}")
    code, metres = types[message.encoding]
    order = ">" if message.is_bigendian else "<"
    width = message.step // int(code[1])
    if width < message.width or message.data.size != message.step * message.height:
        raise ValueError(f"topic {topic}: {message.data.size} bytes do not hold {_size(message)}")
    rows = message.data.view(order + code).reshape(message.height, width)[:, : message.width]
    depth = rows.astype(np.float32) * np.float32(metres)
    return np.where(np.isfinite(depth), depth, np.float32(0))


def is_depth(message: Any) -> bool:
    return getattr(message, "encoding", "") in ("32FC1", "16UC1")


def pose_matrix(pose: Any) -> Array:
    """geometry_msgs Pose or Transform as [4, 4]; NaN where it is none (nobody has set it, say)."""
    place = getattr(pose, "position", None) or pose.translation
    turn = getattr(pose, "orientation", None) or pose.rotation
    translation = np.array([[place.x, place.y, place.z]], np.float64)
    quaternion = np.array([[turn.x, turn.y, turn.z, turn.w]], np.float64)
    if not (np.isfinite(translation).all() and np.isfinite(quaternion).all() and quaternion.any()):
        return np.full((4, 4), np.nan)
    return poses_from_quaternions(translation, quaternion)[0]


def _kind(message: Any) -> str:
    return getattr(message, "encoding", None) or getattr(message, "format", "") or "unknown"


def _size(message: Any) -> str:
    return f"{getattr(message, 'width', '?')}×{getattr(message, 'height', '?')} pixels"
