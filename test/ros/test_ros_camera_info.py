"""Which calibration a depth image is published with, and what is told about it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from stac_ros.camera_info import CameraCalibration

PREDICTED = np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]])


def received(
    height: int = 240, width: int = 320, focal: float = 280.0, distortion: float = 0.0
) -> CameraInfo:
    k = np.array([focal, 0, 158, 0, focal, 119, 0, 0, 1])
    return CameraInfo(height=height, width=width, k=k, d=[distortion, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("info", "source", "focal"),
    [
        (None, "predicted", 300),
        (received(), "camera_info", 280),
        (received(focal=0.0), "predicted", 300),
        (received(height=480, width=640), "predicted", 300),
    ],
)
def test_the_source_is_what_was_used(info, source, focal):
    calibration = CameraCalibration()
    if info is not None:
        calibration.receive(info)
    assert calibration.source == "predicted", "nothing has been published yet"
    assert calibration.of_image(Header(), 240, 320, PREDICTED).k[0] == focal
    assert calibration.source == source
    calibration.of_image(Header(), 60, 80, PREDICTED)
    assert calibration.source == "predicted", "no calibration fits this size"


def test_distortion_is_told_once_and_not_held_against_rectified_images(caplog):
    caplog.set_level(logging.WARNING)
    calibration = CameraCalibration()
    calibration.receive(received(distortion=-0.3))
    for _ in range(3):
        calibration.of_image(Header(), 240, 320, PREDICTED)
    (told,) = caplog.messages
    assert "fine if these images are rectified" in told
