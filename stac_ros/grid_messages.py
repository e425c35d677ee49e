"""The occupancy grid as others read it: a message, and the files of nav2_map_server."""

from __future__ import annotations

import array
from pathlib import Path

import numpy as np
import yaml
from geometry_msgs.msg import Point, Pose, Quaternion
from nav_msgs.msg import MapMetaData, OccupancyGrid
from std_msgs.msg import Header

from stac_core.files import write_whole
from stac_ros.grid import FREE, OCCUPIED, Grid

IMAGE, MAP = "map.pgm", "map.yaml"
_BLACK, _GREY, _WHITE = 0, 205, 254  # occupied, unknown, free: what map_saver writes
# Thresholds of blackness that tell these apart. With 0.25, often seen, grey (0.1961) would be free.
_OCCUPIED_ABOVE, _FREE_BELOW = 0.65, 0.196


def grid_message(header: Header, grid: Grid) -> OccupancyGrid:
    """All that is known; where that is nothing, one unknown cell, since Nav2 refuses a map of none."""
    (x, y), states = grid.states()
    height, width = states.shape
    data = array.array("b")
    data.frombytes(states.tobytes())
    corner = Pose(position=Point(x=float(x), y=float(y), z=grid.floor), orientation=Quaternion(w=1.0))
    info = MapMetaData(
        map_load_time=header.stamp, resolution=grid.cell_size, width=width, height=height, origin=corner
    )
    return OccupancyGrid(header=header, info=info, data=data)


def write_grid(folder: Path, grid: Grid) -> None:
    """`map.pgm` and the `map.yaml` that explains it. OSError where they cannot be written."""
    (x, y), states = grid.states()
    height, width = states.shape
    shades = np.select(
        [states == OCCUPIED, states == FREE], [np.uint8(_BLACK), np.uint8(_WHITE)], np.uint8(_GREY)
    )
    top_first = shades[::-1]
    write_whole(folder / IMAGE, b"P5\n%d %d\n255\n" % (width, height) + top_first.tobytes())
    about = {
        "image": IMAGE,
        "mode": "trinary",
        "resolution": grid.cell_size,
        "origin": [float(x), float(y), 0.0],
        "negate": 0,
        "occupied_thresh": _OCCUPIED_ABOVE,
        "free_thresh": _FREE_BELOW,
    }
    write_whole(folder / MAP, yaml.safe_dump(about, sort_keys=False, default_flow_style=None))
