"""Writes what the mapping node says into a bag (rosbag2, mcap), as it came.

Map, grid and path are told whole, once a second, up to 16 MB each time: of these only the last is kept.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from rclpy.node import Node
from rclpy.serialization import deserialize_message, serialize_message
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from std_msgs.msg import Header

from stac_ros.diagnostics import failure
from stac_ros.listen import outside_name, subscribe
from stac_ros.stamps import stamp_message
from stac_ros.topics import DIAGNOSTICS, OUTPUTS, POSE, Topic, type_name

IMAGE_SENT = "/evaluation/image_sent"


class AnswerRecorder(Node):
    """What the mapping node says, with the time of its arrival, and when each image was sent."""

    def __init__(self, path: Path) -> None:
        super().__init__("stac_evaluation_recorder")
        self._store = get_typestore(Stores.ROS2_KILTED)
        self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.open()
        self._writing = threading.Lock()  # answers arrive in one thread, images may leave in another
        self._whole: dict[Topic, tuple[Connection, int, bytes]] = {}  # the last of what is told whole
        self._sent = self._writer.add_connection(IMAGE_SENT, type_name(Header), typestore=self._store)
        self.images = self.poses = 0
        self.heard_at = time.monotonic()  # the last message that came because of an image
        self._answered_at = 0.0  # the last pose, or the first image
        self.failure = ""  # the node's error, once it has failed to map a chunk
        for topic in OUTPUTS:
            self._record(topic)

    def _record(self, topic: Topic) -> None:
        name = self.resolve_topic_name(outside_name(topic))
        connection = self._writer.add_connection(name, type_name(topic.type), typestore=self._store)

        def write(raw: bytes) -> None:
            now = time.time_ns()
            if topic.profile == "latched":
                self._whole[topic] = connection, now, raw
            else:
                with self._writing:
                    self._writer.write(connection, now, raw)
            if topic is DIAGNOSTICS:
                self.failure = self.failure or failure(deserialize_message(raw, DIAGNOSTICS.type))
            else:  # diagnostics never end
                self.heard_at = time.monotonic()
            if topic is POSE:
                self._answered_at = time.monotonic()
                self.poses += 1

        subscribe(self, topic, write, 100, raw=True)

    def image_sent(self, stamp_ns: int) -> None:
        """Note that an image is on its way now."""
        now, message = time.time_ns(), serialize_message(Header(stamp=stamp_message(stamp_ns)))
        with self._writing:
            self._writer.write(self._sent, now, message)
        self.images += 1
        self._answered_at = self._answered_at or time.monotonic()

    def silence_s(self) -> float:
        """How long the node has owed an answer."""
        return time.monotonic() - self._answered_at if self._answered_at else 0.0

    def close(self) -> None:
        """Finish the file; it cannot be read before. Nothing more may come."""
        for last in self._whole.values():
            self._writer.write(*last)
        self._writer.close()
