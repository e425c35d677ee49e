"""Which calibration an image is rectified and its depth published with, and what is told about it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from stac_ros.camera_info import CameraCalibration
from stac_ros.images import ImageError

PREDICTED = np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]])


def received(
    height: int = 240, width: int = 320, focal: float = 280.0, distortion: float = 0.0
) -> CameraInfo:
    k = np.array([focal, 0, 158, 0, focal, 119, 0, 0, 1])
    p = np.array([0.9 * focal, 0, 157, 0, 0, 0.9 * focal, 121, 0, 0, 0, 1, 0])
    d = [distortion, 0.0, 0.0, 0.0, 0.0]
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
    calibration.intrinsics(240, 320)
    assert calibration.source == "camera_info", "of poses, though nobody may listen to depth"


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
    assert "fine if these images are rectified" in told and "set input.rectify to true" in told


@pytest.mark.parametrize(("field", "index"), [("k", 1), ("p", 1)])
def test_skew_is_told_once_and_left_out(field, index, caplog):
    calibration, info = CameraCalibration(), received()
    getattr(info, field)[index] = 3.0
    calibration.receive(info)
    for _ in range(3):
        assert calibration.intrinsics(240, 320)[0, 1] == 0
    (told,) = caplog.messages
    assert "skewed pixels" in told and "set input.rectify to true" in told


@pytest.mark.parametrize("focal", [1e-3, 1e9])
def test_a_focal_length_that_no_camera_has_is_refused_once_and_poses_are_as_predicted(focal, caplog):
    calibration = CameraCalibration()
    calibration.receive(received(focal=focal))
    for _ in range(3):
        assert calibration.intrinsics(240, 320) is None
        assert np.array_equal(calibration.of_image(Header(), 240, 320, PREDICTED).k, PREDICTED.ravel())
    (told,) = caplog.messages
    assert "camera_info is refused" in told and "radians" in told and "intrinsics are predicted" in told
    assert "calibrate the camera anew" in told


def test_less_than_the_whole_sensor_is_no_image_of_the_calibration(caplog):
    """REP-104: size, K and P stay those of the sensor."""
    calibration, info = CameraCalibration(), received(height=480, width=640)
    info.binning_x = info.binning_y = 2
    calibration.receive(info)
    assert calibration.intrinsics(240, 320) is None
    assert "have the driver send whole images" in caplog.text


def test_raw_images_are_rectified_and_those_of_a_pinhole():
    calibration, header, info = CameraCalibration(raw=True), Header(frame_id="camera"), received()
    info.d[0] = -0.3
    calibration.receive(info)
    image = np.random.default_rng(2).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    assert calibration.rectified(image).shape == image.shape
    assert not np.array_equal(calibration.rectified(image), image)
    assert np.array_equal(CameraCalibration().rectified(image), image), "taken to be rectified"
    found = calibration.of_image(header, 240, 320, PREDICTED)
    assert found.header == header and not any(found.d) and np.array_equal(found.r, np.eye(3).ravel())
    k = found.k.reshape(3, 3)
    assert np.array_equal(found.p, info.p) and np.array_equal(k, info.p.reshape(3, 4)[:, :3])
    assert np.array_equal(calibration.intrinsics(240, 320), k)
    assert calibration.source == "camera_info"


def test_distortion_that_is_removed_is_not_warned_of(caplog):
    calibration = CameraCalibration(raw=True)
    calibration.receive(received(distortion=-0.3))
    calibration.of_image(Header(), 240, 320, PREDICTED)
    calibration.intrinsics(240, 320)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("info", "cause", "told"),
    [
        (
            None,
            "no camera_info",
            "came before its camera_info .* calibration:=.* or set input.rectify",
        ),
        (received(focal=0.0), "camera_info", "holds no calibration"),
        (received(focal=1e-3), "camera_info", "camera_info is refused: .* radians"),
        (received(height=480, width=640), "camera_info", "camera_info is of 640×480 images, not of 320×240"),
    ],
)
def test_a_raw_image_that_cannot_be_rectified_is_an_error_with_its_cure(info, cause, told):
    calibration = CameraCalibration(raw=True)
    if info is not None:
        calibration.receive(info)
    with pytest.raises(ImageError, match=told) as raised:
        calibration.rectified(np.zeros((240, 320, 3), np.uint8))
    assert raised.value.cause == cause
    assert "set input.rectify to false" in str(raised.value)


def test_a_lens_of_an_unknown_kind_cannot_be_rectified():
    calibration, info = CameraCalibration(raw=True), received()
    info.distortion_model = "double_sphere"
    calibration.receive(info)
    with pytest.raises(ImageError, match="'double_sphere' is not known"):
        calibration.rectified(np.zeros((240, 320, 3), np.uint8))


@pytest.mark.parametrize("broken", [5, 2])
def test_a_projection_filled_in_by_halves_gives_way_to_k(broken):
    calibration, info = CameraCalibration(), received()
    info.p[broken] = 0.0 if broken == 5 else np.nan
    calibration.receive(info)
    assert np.array_equal(calibration.intrinsics(240, 320), info.k.reshape(3, 3))
