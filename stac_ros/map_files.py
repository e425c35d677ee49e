"""Maps as files, each complete or not there at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_VERTEX = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
_HEADER = """ply
format binary_little_endian 1.0
element vertex {count}
property float x
property float y
property float z
property uchar red
property uchar green
property uchar blue
end_header
"""


def write_ply(path: Path, positions: NDArray[np.float32], colours: NDArray[np.uint8]) -> None:
    """Coloured points [N, 3] as a binary PLY file."""
    vertices = np.empty(len(positions), _VERTEX)
    vertices["xyz"], vertices["rgb"] = positions, colours
    write_atomically(path, _HEADER.format(count=len(vertices)).encode() + vertices.tobytes())


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, then rename it; missing folders are made.

    OSError where that is not possible; then nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # temporary files are private, maps are not
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
