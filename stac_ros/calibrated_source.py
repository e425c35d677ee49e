"""A source that sends a calibration with every image, in place of its own if it has one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage
from std_msgs.msg import Header

from stac_ros.calibration_file import read_calibration
from stac_ros.images import ImageError, decode_colour
from stac_ros.sources import Item, Source
from stac_ros.topics import CAMERA_INFO

logger = logging.getLogger(__name__)


class CalibratedSource:
    """What `source` sends, and the calibration of a file under the stamp and frame of each image.

    live: its images cannot be looked at beforehand; those of a recording are, here.

    Raises OSError or ValueError for a file that cannot be read, and ValueError where it is for images of
    another size: here, or from `items`.
    """

    def __init__(self, source: Source, file: Path, live: bool) -> None:
        self._source, self._file, self._calibration = source, file, read_calibration(file)
        self.image_topic = source.image_topic
        self.types: dict[str, type[Any]] = source.types | {CAMERA_INFO.name: CameraInfo}
        if CAMERA_INFO.name in source.types:
            logger.info("the calibration of %s takes the place of the recorded one", file)
        if not live:
            images = (item for item in source.items() if item.topic == self.image_topic)
            next((item for item in images if self._is_checked(item.payload)), None)

    def items(self) -> Iterator[Item]:
        checked = False
        for item in self._source.items():
            if item.topic == self.image_topic:
                checked = checked or self._is_checked(item.payload)
                yield Item(item.due_ns, CAMERA_INFO.name, self._of_image(item.payload))
            if item.topic != CAMERA_INFO.name:
                yield item

    def _of_image(self, payload: Any) -> CameraInfo:
        """The calibration under the header of an image, which is how its bytes begin."""
        info = copy(self._calibration)
        info.header = deserialize_message(payload, Header) if isinstance(payload, bytes) else payload.header
        return info

    def _is_checked(self, payload: Any) -> bool:
        """False where an image does not tell its size; ValueError where that is not the calibration's."""
        size = self._size(payload)
        expected = self._calibration.height, self._calibration.width
        if size is not None and size != expected:
            raise ValueError(
                f"{self._file} is for images of {expected[1]}×{expected[0]} pixels, and these are "
                f"{size[1]}×{size[0]}: calibrate the camera in this size, or set it to the other"
            )
        return size is not None

    def _size(self, payload: Any) -> tuple[int, int] | None:
        """Height and width of an image; None of one that cannot be decoded, which its listeners will tell."""
        kind = self._source.types[self.image_topic]
        message = deserialize_message(payload, kind) if isinstance(payload, bytes) else payload
        if not isinstance(message, CompressedImage):
            return message.height, message.width
        try:
            height, width, _ = decode_colour(message).shape
        except ImageError:
            return None
        return height, width
