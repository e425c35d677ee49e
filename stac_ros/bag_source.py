"""A rosbag2 to replay: recorded bytes as they are, with the camera's topics under the node's names."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rosbags.interfaces import Connection

from stac_core.evaluation.datasets.bag import choose_image_topic, choose_info_topic
from stac_core.evaluation.datasets.bag_file import INFO_TYPE, BagFile
from stac_ros.sources import STATIC_TOPICS, Item
from stac_ros.topics import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE

_TRANSFORMS = ("/tf", *STATIC_TOPICS)
logger = logging.getLogger(__name__)


class BagSource:
    """Images, their calibration, all transforms, and whatever else is asked for.

    ValueError, naming the topics, for a bag without images or with several image topics to choose from.
    """

    def __init__(self, path: Path, topic: str, more_topics: Iterable[str]) -> None:
        self.path = path
        self._bag = BagFile(path)
        recorded_image = choose_image_topic(self._bag, topic)
        kinds = self._bag.all_topics()
        image = COMPRESSED_IMAGE if kinds[recorded_image].endswith("/CompressedImage") else IMAGE
        self.image_topic = image.name
        self.image_count = sum(c.msgcount for c in self._bag.connections(recorded_image))
        self._names = {recorded_image: image.name}  # recorded topic → topic to publish
        infos = [recorded for recorded, kind in kinds.items() if kind == INFO_TYPE]
        recorded_info = choose_info_topic(recorded_image, infos)
        self.info_topic = CAMERA_INFO.name if recorded_info else ""
        if recorded_info:
            self._names[recorded_info] = self.info_topic
        for extra in (*(t for t in _TRANSFORMS if t in kinds), *more_topics):
            if extra not in kinds:
                raise ValueError(f"{path}: no topic {extra!r}; it has {', '.join(sorted(kinds))}")
            self._names.setdefault(extra, extra)
        self.types: dict[str, type[Any]] = {}
        for connection in self._bag.connections(*self._names):
            self._learn_type(connection)

    def recorded_name(self, topic: str) -> str:
        """The name under which a published topic was recorded."""
        return next(recorded for recorded, name in self._names.items() if name == topic)

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
