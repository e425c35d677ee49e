"""A calibration file is read as it was written, or refused by file, key and value."""

from __future__ import annotations

import numpy as np
import pytest
from ros_recordings import write_calibration

from stac_ros.calibration_file import read_calibration

ZEROS = "{rows: 3, cols: 4, data: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]}"


def test_every_number_arrives(tmp_path):
    info = read_calibration(write_calibration(tmp_path / "ost.yaml", 480, 640))
    assert (info.height, info.width, info.distortion_model) == (480, 640, "plumb_bob")
    assert list(info.d) == [-0.25, 0.07, 0.001, -0.002, 0.0], "1e-3 without a dot is text to YAML"
    assert np.array_equal(info.k.reshape(3, 3), [[80.5, 0, 42.25], [0, 81.5, 27.75], [0, 0, 1]])
    assert np.array_equal(info.r.reshape(3, 3), np.eye(3))
    assert np.array_equal(info.p.reshape(3, 4), [[70, 0, 41, 0], [0, 71, 28, 0], [0, 0, 1, 0]])
    assert info.header.frame_id == "" and info.header.stamp.sec == 0


def test_a_projection_may_be_left_unfilled(tmp_path):
    info = read_calibration(write_calibration(tmp_path / "ost.yaml", projection_matrix=ZEROS))
    assert not info.p.any()


def test_eight_coefficients_below_a_wrong_count_are_all_read(tmp_path):
    """As old versions of camera_calibration write them."""
    coefficients = "{rows: 1, cols: 5, data: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}"
    changes = {"distortion_model": "rational_polynomial", "distortion_coefficients": coefficients}
    info = read_calibration(write_calibration(tmp_path / "ost.yaml", **changes))
    assert list(info.d) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_width": "wide"}, "image_width = 'wide': expected the pixels of a side"),
        ({"image_height": "-480"}, "image_height = -480: expected the pixels of a side"),
        ({"camera_matrix": ""}, "camera_matrix is missing"),
        ({"camera_matrix": "5"}, "camera_matrix = 5: expected rows, cols and data"),
        (
            {"camera_matrix": "{rows: 2, cols: 2, data: [1, 2, 3, 4]}"},
            "camera_matrix has 2 rows and 2 cols: exp",
        ),
        ({"rectification_matrix": "{rows: 3, cols: 3, data: [1, 0]}"}, r"data = \[1, 0\]: expected 9 finite"),
        (
            {"camera_matrix": "{rows: 3, cols: 3, data: [a, b]}"},
            "camera_matrix = .*'a'.* all of them numbers",
        ),
        (
            {"distortion_coefficients": "{rows: 1, cols: 1, data: [.nan]}"},
            r"data = \[nan\]: expected 1 finite",
        ),
        (
            {"distortion_coefficients": "{rows: 1, cols: 3, data: [1, 2, 3]}"},
            "coefficients: d = .* takes 0, 4, 5",
        ),
        ({"distortion_model": "double_sphere"}, "distortion_model 'double_sphere' is not known"),
        (
            {"camera_matrix": "{rows: 3, cols: 3, data: [0, 0, 0, 0, 0, 0, 0, 0, 1]}"},
            "camera_matrix: intrinsics = .* positive focal lengths",
        ),
        (
            {"projection_matrix": "{rows: 3, cols: 4, data: [1e-3, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0]}"},
            "projection_matrix: intrinsics = .* radians",
        ),
        (
            {"rectification_matrix": "{rows: 3, cols: 3, data: [1, 1, 1, 1, 1, 1, 1, 1, 1]}"},
            "rectification_matrix: r = .* is no rotation",
        ),
    ],
)
def test_what_is_damaged_is_named(tmp_path, changes, reason):
    file = write_calibration(tmp_path / "ost.yaml", **changes)
    with pytest.raises(ValueError, match=f"{file}: .*{reason}"):
        read_calibration(file)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%YAML:1.0\n---\nm: !!opencv-matrix\n", "is no YAML .* expected the YAML of camera_calibration"),
        (b"\x1f\x8b\x08\x00\xff", "is no YAML .* the ost.yaml in its archive"),
        (b"- 1\n", "holds list: expected the YAML"),
        (b"", "holds NoneType: expected the YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "is no YAML"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path, content, reason):
    file = tmp_path / "ost.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_calibration(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"missing.yaml"):
        read_calibration(tmp_path / "missing.yaml")
