"""The grid of the bundled model against that of true depth and poses: the figures of docs/node.md."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import pytest
from mapping_helpers import mapper_of
from node_helpers import header
from scipy.ndimage import binary_dilation
from walks import bundled, frames_of

from stac_core import Config
from stac_core.config import ModelConfig
from stac_ros.camera_info import CameraCalibration
from stac_ros.camera_messages import calibration_message
from stac_ros.grid import FREE, OCCUPIED, UNKNOWN, Grid
from stac_ros.images import encode_image
from stac_ros.settings import GridSettings
from stac_ros.stamps import stamp_nanoseconds

WALKS = [f"world:{seed},frames=64,kind=room,motion=forward,step_max=0.05" for seed in range(1, 13)]
COARSE = {"grid__cell_size": 0.1, "grid__step": 0.2, "grid__range": 3.0}


class Truth:
    """Odometry without a fault."""

    def __init__(self, walk: str) -> None:
        pairs = enumerate(frames_of(walk))
        self._cameras = {stamp_nanoseconds(stamped(i).stamp): frame.world_from_camera for i, frame in pairs}

    def odom_from_camera(self, camera: str, stamp_ns: int) -> np.ndarray:
        return self._cameras[stamp_ns]


def stamped(number: int):
    return header(10 + number / 10)


def mapped(walk: str, given: dict[str, float]) -> Grid:
    """As the node maps it, with the scale measured along odometry."""
    frames, calibration = frames_of(walk), CameraCalibration()
    height, width, _ = frames[0].image.shape
    calibration.receive(calibration_message(frames[0].intrinsics, height, width, stamped(0)))
    config = Config(model=ModelConfig(device="cpu"))
    metric = {"frames__odom": "odom", "scale__mode": "odometry"}
    with mapper_of(bundled(), Truth(walk), config, calibration, **metric, **given) as (mapper, *_):
        images = [encode_image(frame.image, "rgb8", stamped(i)) for i, frame in enumerate(frames)]
        for first in range(0, len(images), 4):
            mapper.process(images[first : first + 4])
        return mapper.mapper.grid


def true_grid(walk: str, given: dict[str, float]) -> Grid:
    grid = Grid(GridSettings(**{name.removeprefix("grid__"): value for name, value in given.items()}))
    for frame in frames_of(walk):
        v, u = np.indices(frame.depth_m.shape)
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)
        in_camera = pixels @ np.linalg.inv(frame.intrinsics).T * frame.depth_m.reshape(-1, 1)
        pose = frame.world_from_camera
        grid.add((in_camera @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32), pose[:3, 3], 0)
    return grid


def on_one_canvas(*grids: Grid) -> list[np.ndarray]:
    corners = [np.rint(grid.states()[0] / grid.cell_size).astype(int) for grid in grids]
    shapes = [np.array(grid.states()[1].shape[::-1]) for grid in grids]
    low = np.min(corners, axis=0)
    sides = np.max([c + s for c, s in zip(corners, shapes, strict=True)], axis=0) - low
    found = []
    for grid, (column, row), (width, height) in zip(grids, corners - low, shapes, strict=True):
        canvas = np.full(sides[::-1], UNKNOWN, np.int8)
        canvas[row : row + height, column : column + width] = grid.states()[1]
        found.append(canvas)
    return found


def share(of: np.ndarray, near: np.ndarray, cells: int) -> float:
    """How many cells have one of the others no further than so many columns and rows away."""
    return (of & binary_dilation(near, np.ones((2 * cells + 1, 2 * cells + 1)))).sum() / max(of.sum(), 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("given", [{}, COARSE], ids=["as set", "coarse"])
def test_the_grid_of_the_bundled_model_is_roughly_true(given, monkeypatch):
    add, rows, times = Grid.add, [], []

    def timed(*arguments) -> None:
        started = time.perf_counter()
        add(*arguments)
        times.append(1e3 * (time.perf_counter() - started))

    for walk in WALKS:
        true = true_grid(walk, given)
        with monkeypatch.context() as patch:
            patch.setattr(Grid, "add", timed)
            found = mapped(walk, given)
        said, truth = on_one_canvas(found, true)
        row = {}
        for cells in (1, round(0.2 / found.cell_size)):
            for name, state in (("occupied", OCCUPIED), ("free", FREE)):
                row[f"{name}, precision, {cells}"] = share(said == state, truth == state, cells)
                row[f"{name}, recall, {cells}"] = share(truth == state, said == state, cells)
        row["obstacles called free"] = share(truth == OCCUPIED, said == FREE, 0)
        row["free that is an obstacle"] = share(said == FREE, truth == OCCUPIED, 0)
        rows.append(row)
    middle = {name: median(row[name] for row in rows) for name in rows[0]}
    print("", *(f"{name}: {value:.2f}" for name, value in middle.items()), sep="\n")
    print(f"{median(times):.1f} ms an image, {len(times)} of {64 * len(WALKS)} images")
    assert middle["free, precision, 1"] > 0.6 and middle["free, recall, 1"] > 0.5
    assert middle["occupied, precision, 1"] > 0.2 and middle["occupied, recall, 1"] > 0.2
