"""Clouds byte by byte: layout, round trip, parity with `sensor_msgs_py` where it is installed."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from sensor_msgs.msg import PointField
from std_msgs.msg import Header

from stac_ros import clouds
from stac_ros.clouds import cloud_message, cloud_points


def sample(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 3)).astype(np.float32), rng.integers(0, 256, (count, 3), dtype=np.uint8)


def test_a_cloud_is_laid_out_as_viewers_expect():
    positions = np.array([[1.0, -2.0, 0.5], [4.0, 5.0, 6.0]], np.float32)
    colours = np.array([[0x11, 0x22, 0x33], [0xFF, 0x00, 0x80]], np.uint8)
    header = Header(frame_id="map")
    message = cloud_message(header, positions, colours)
    assert [(f.name, f.offset, f.datatype, f.count) for f in message.fields] == [
        ("x", 0, PointField.FLOAT32, 1),
        ("y", 4, PointField.FLOAT32, 1),
        ("z", 8, PointField.FLOAT32, 1),
        ("rgb", 12, PointField.FLOAT32, 1),
    ]
    assert (message.height, message.width, message.point_step, message.row_step) == (1, 2, 16, 32)
    assert message.is_dense and not message.is_bigendian and message.header == header
    expected = struct.pack("<fffI", 1.0, -2.0, 0.5, 0x112233) + struct.pack("<fffI", 4.0, 5.0, 6.0, 0xFF0080)
    assert bytes(message.data) == expected


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_points_survive_the_message(count):
    positions, colours = sample(count)
    found_positions, found_colours = cloud_points(cloud_message(Header(), positions, colours))
    assert np.array_equal(found_positions, positions) and np.array_equal(found_colours, colours)


def test_both_libraries_write_the_same_bytes(monkeypatch):
    pytest.importorskip(
        "sensor_msgs_py", reason="sensor_msgs_py is part of a ROS installation, no wheel carries it"
    )
    positions, colours = sample(500)
    theirs = cloud_message(Header(), positions, colours)
    monkeypatch.setattr(clouds, "point_cloud2", None)
    assert cloud_message(Header(), positions, colours) == theirs


def test_clouds_of_another_layout_are_refused():
    message = cloud_message(Header(), *sample(3))
    message.fields = [*message.fields[:3], PointField(name="intensity", offset=12, datatype=7, count=1)]
    with pytest.raises(ValueError, match="fields x, y, z, intensity: expected little-endian float32"):
        cloud_points(message)
