"""Coloured points ↔ PointCloud2: the only seam to `sensor_msgs_py`.

Where it is not installed, numpy fills the same bytes. Colour travels as RViz and PCL expect it: 0xRRGGBB in
the bits of one float32 field named `rgb`.
"""

from __future__ import annotations

import array

import numpy as np
from numpy.typing import NDArray
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header

try:
    from sensor_msgs_py import point_cloud2
except ImportError:
    point_cloud2 = None

LIBRARY = "sensor_msgs_py" if point_cloud2 else "numpy (sensor_msgs_py not installed)"
FIELDS = [
    PointField(name=name, offset=4 * index, datatype=PointField.FLOAT32, count=1)
    for index, name in enumerate(("x", "y", "z", "rgb"))
]
POINT = np.dtype([(field.name, "<f4") for field in FIELDS])


def cloud_message(header: Header, positions: NDArray[np.float32], colours: NDArray[np.uint8]) -> PointCloud2:
    """Positions [N, 3] and RGB colours [N, 3] as a dense, unordered cloud."""
    step = POINT.itemsize
    data = array.array("B", b"\0") * (step * len(positions))
    points = np.frombuffer(data, POINT)  # filled in place: another large block of memory costs more than this
    for axis, name in enumerate("xyz"):  # a column at a time: numpy is slow at rows of three
        points[name] = positions[:, axis]
    channels = points.view(np.uint8).reshape(-1, step)
    for channel, offset in enumerate((14, 13, 12)):  # little endian: blue is the lowest byte
        channels[:, offset] = colours[:, channel]
    if point_cloud2:
        message = point_cloud2.create_cloud(header, FIELDS, points)
    else:
        message = PointCloud2(header=header, fields=FIELDS, height=1, width=len(points), point_step=step)
        message.row_step, message.data = step * len(points), data
    message.is_dense = True  # all points are finite, which `create_cloud` does not take for granted
    return message


def cloud_points(message: PointCloud2) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Positions [N, 3] and RGB colours [N, 3] of a cloud made by `cloud_message`.

    ValueError for a cloud of another layout.
    """
    layout = [(field.name, field.offset, field.datatype) for field in message.fields]
    if layout != [(f.name, f.offset, f.datatype) for f in FIELDS] or message.is_bigendian:
        names = ", ".join(field.name for field in message.fields)
        raise ValueError(f"cloud with the fields {names}: expected little-endian float32 x, y, z, rgb")
    points = np.frombuffer(message.data, POINT)
    positions = points.view("<f4").reshape(-1, 4)[:, :3].copy()
    return positions, points.view(np.uint8).reshape(-1, POINT.itemsize)[:, 14:11:-1].copy()
