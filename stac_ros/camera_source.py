"""A camera of this computer, for those without a driver node: `camera:0`, or `camera:` and a stream's URL."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import cv2
import numpy as np
from std_msgs.msg import Header

from stac_ros.camera_messages import image_message
from stac_ros.sources import Item
from stac_ros.stamps import stamp_message
from stac_ros.topics import COMPRESSED_IMAGE, IMAGE

PREFIX = "camera:"
logger = logging.getLogger(__name__)


class CameraSource:
    """Images as they come, stamped with the wall time at which they came; without calibration.

    ValueError where there is no such camera.
    """

    def __init__(self, name: str, compressed: bool, frame_id: str) -> None:
        device = name.removeprefix(PREFIX)
        self._name, self._compressed, self._frame_id = name, compressed, frame_id
        images = COMPRESSED_IMAGE if compressed else IMAGE
        self.image_topic, self.types = images.name, {images.name: images.type}
        self._capture = cv2.VideoCapture(int(device) if device.isdigit() else device)
        if not self._capture.isOpened():
            raise ValueError(f"{name}: no such camera; 'ls /dev/video*' lists those of this computer")

    def items(self) -> Iterator[Item]:
        """Until the camera or the stream ends. Raises OSError where there was no image at all."""
        count = 0
        while True:
            grabbed, image = self._capture.read()
            if not grabbed:
                break
            count += 1
            stamp_ns = time.time_ns()
            header = Header(frame_id=self._frame_id, stamp=stamp_message(stamp_ns))
            pixels = np.asarray(image[:, :, ::-1], np.uint8)  # OpenCV keeps blue first
            message = image_message(pixels, header, self._compressed)
            yield Item(stamp_ns, self.image_topic, message)
        if not count:
            raise OSError(f"{self._name} gives no image: it has stopped, or another program uses it")
        logger.info("%s has stopped after %d images", self._name, count)
