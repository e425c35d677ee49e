"""Point clouds as binary PLY files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stac_core.files import write_whole

_POSITION = [("x", "<f4", "float"), ("y", "<f4", "float"), ("z", "<f4", "float")]
_COLOUR = [("red", "u1", "uchar"), ("green", "u1", "uchar"), ("blue", "u1", "uchar")]


def write_ply(path: Path, points: NDArray[np.floating], colours: NDArray[np.uint8] | None = None) -> None:
    """Points [N, 3] and their RGB [N, 3], whole or not at all."""
    fields = _POSITION + (_COLOUR if colours is not None else [])
    vertices = np.empty(len(points), [(name, kind) for name, kind, _ in fields])
    for axis in range(3):
        vertices[_POSITION[axis][0]] = points[:, axis]
        if colours is not None:
            vertices[_COLOUR[axis][0]] = colours[:, axis]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property {kind} {name}" for name, _, kind in fields]
    write_whole(path, "\n".join([*header, "end_header\n"]).encode() + vertices.tobytes())
