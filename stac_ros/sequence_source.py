"""Images one after the other, and their calibration where it is known, as a camera driver sends them."""

from __future__ import annotations

from collections.abc import Iterator

from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from stac_core.evaluation.datasets import Sequence
from stac_ros.camera_messages import calibration_message, image_message
from stac_ros.sources import Item
from stac_ros.stamps import stamp_message
from stac_ros.topics import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE


class SequenceSource:
    """A folder of images, a video, a dataset or a synthetic world."""

    def __init__(self, sequence: Sequence, compressed: bool, frame_id: str) -> None:
        self._sequence, self._compressed, self._frame_id = sequence, compressed, frame_id
        images = COMPRESSED_IMAGE if compressed else IMAGE
        self.image_topic, self.types = images.name, {images.name: images.type}
        if sequence.frame(0).intrinsics is not None:
            self.types[CAMERA_INFO.name] = CameraInfo

    def items(self) -> Iterator[Item]:
        for index in range(len(self._sequence)):
            frame = self._sequence.frame(index)
            stamp_ns = frame.stamp_ns or 1  # ROS takes 0 for no stamp at all
            header = Header(frame_id=self._frame_id, stamp=stamp_message(stamp_ns))
            if frame.intrinsics is not None:
                height, width, _ = frame.image.shape
                calibration = calibration_message(frame.intrinsics, height, width, header)
                yield Item(stamp_ns, CAMERA_INFO.name, calibration)
            image = image_message(frame.image, header, self._compressed)
            yield Item(stamp_ns, self.image_topic, image)
