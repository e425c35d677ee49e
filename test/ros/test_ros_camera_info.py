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
    p, d = np.arange(1.0, 13), [distortion, 0.0, 0.0, 0.0, 0.0]
    return CameraInfo(height=height, width=width, distortion_model="plumb_bob", k=k, p=p, d=d)


def test_a_calibration_that_fits_is_passed_on_under_the_header_of_the_image():
    calibration, header = CameraCalibration(), Header(frame_id="camera")
    calibration.receive(received())
    expected = received()
    expected.header = header
    assert calibration.of_image(header, 240, 320, PREDICTED) == expected
    assert calibration.source == "camera_info"
    calibration.of_image(header, 60, 80, PREDICTED)
    assert calibration.source == "predicted", "no calibration fits this size"


@pytest.mark.parametrize(
    ("info", "told"),
    [
        (None, ""),
        (received(focal=0.0), "holds no calibration"),
        (received(height=480, width=640), "camera_info is of 640×480 images, not of 320×240"),
    ],
)
def test_where_none_fits_the_predicted_camera_is_published(info, told, caplog):
    calibration, header = CameraCalibration(), Header(frame_id="camera")
    if info is not None:
        calibration.receive(info)
    found = calibration.of_image(header, 240, 320, PREDICTED)
    assert found.header == header and (found.height, found.width) == (240, 320)
    assert np.array_equal(found.k.reshape(3, 3), PREDICTED) and np.array_equal(found.r, np.eye(3).ravel())
    assert np.array_equal(found.p.reshape(3, 4), np.column_stack([PREDICTED, np.zeros(3)]))
    assert calibration.source == "predicted" and told in caplog.text and bool(told) == bool(caplog.text)


def test_intrinsics_are_those_of_rectified_images():
    calibration, info = CameraCalibration(), received()
    assert calibration.intrinsics(240, 320) is None, "nothing is known yet"
    calibration.receive(info)
    assert np.array_equal(calibration.intrinsics(240, 320), info.p.reshape(3, 4)[:, :3])
    assert calibration.intrinsics(480, 640) is None, "of other images"
    info.p = np.zeros(12)  # as drivers leave it that know K alone
    assert np.array_equal(calibration.intrinsics(240, 320), info.k.reshape(3, 3))
    calibration.receive(received(focal=0.0))
    assert calibration.intrinsics(240, 320) is None, "a driver that is not calibrated says so by zeros"


def test_images_that_come_without_a_calibration_are_told_of_once_and_not_at_once(caplog):
    caplog.set_level(logging.WARNING)
    calibration = CameraCalibration()
    for _ in range(5):
        calibration.intrinsics(240, 320)
    assert not caplog.messages, "it may still come"
    for _ in range(100):
        calibration.intrinsics(240, 320)
    (told,) = caplog.messages
    assert "without their camera_info" in told and "remap camera_info" in told


def test_distortion_is_told_once_and_not_held_against_rectified_images(caplog):
    caplog.set_level(logging.WARNING)
    calibration = CameraCalibration()
    calibration.receive(received(distortion=-0.3))
    for _ in range(3):
        calibration.of_image(Header(), 240, 320, PREDICTED)
    (told,) = caplog.messages
    assert "fine if these images are rectified" in told


@pytest.mark.parametrize("broken", [5, 2])
def test_a_projection_filled_in_by_halves_gives_way_to_k(broken):
    calibration, info = CameraCalibration(), received()
    info.p[broken] = 0.0 if broken == 5 else np.nan
    calibration.receive(info)
    assert np.array_equal(calibration.intrinsics(240, 320), info.k.reshape(3, 3))
