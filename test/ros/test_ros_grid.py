"""The occupancy grid, judged by rooms whose walls, floors and drops are known."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import label
from scipy.spatial.transform import Rotation

from stac_core import Moves
from stac_ros.grid import FREE, MOST_CELLS, OCCUPIED, UNKNOWN, Grid
from stac_ros.moving import STAYS
from stac_ros.settings import GridSettings

CELL = 0.05
EYE_M = 1.2


def rays(yaw: float, width: int = 200, height: int = 150, half_view: float = 0.8) -> np.ndarray:
    """Directions [N, 3] of a level camera's pixels, in a map where it looks by `yaw` from x to y."""
    across = np.tan(half_view) * np.linspace(-1, 1, width)
    left, up = np.meshgrid(
        across,
        across[: height * width // width]
        if height == width
        else np.tan(half_view) * height / width * np.linspace(-1, 1, height),
    )
    ahead = np.stack([np.ones_like(left), left, up], -1).reshape(-1, 3)
    return ahead @ Rotation.from_euler("z", yaw).as_matrix().T


class Scene:
    """Boxes that are full, given as lower and upper corners, on a floor that may end."""

    def __init__(self, *boxes, floor_to: float = np.inf, depth: float = 0.0) -> None:
        """floor_to: x from where on the floor is `depth` lower."""
        self.boxes = np.array(boxes, float).reshape(-1, 2, 3)
        self.floor_to, self.depth = floor_to, depth

    def seen(self, camera, yaw: float) -> np.ndarray:
        """What a camera sees first along each of its rays: points [N, 3]."""
        directions = rays(yaw)
        with np.errstate(divide="ignore", invalid="ignore"):
            far = np.where(directions[:, 2] < 0, -camera[2] / directions[:, 2], np.inf)
            beyond = camera[0] + far * directions[:, 0] > self.floor_to
            far = np.where(beyond, -(camera[2] + self.depth) / directions[:, 2], far)
            for low, high in self.boxes:
                ends = (np.stack([low, high])[:, None] - camera) / directions
                enter, leave = ends.min(0).max(1), ends.max(0).min(1)
                far = np.where((enter < leave) & (enter > 0), np.minimum(far, enter), far)
        points = camera + far[:, None] * directions
        return points[np.isfinite(far)].astype(np.float32)


def room(half: float = 2.0, thick: float = 0.3, high: float = 2.5) -> list:
    """Four walls around [-half, half]²."""
    out = half + thick
    return [
        [[half, -out, 0], [out, out, high]], [[-out, -out, 0], [-half, out, high]],
        [[-out, half, 0], [out, out, high]], [[-out, -out, 0], [out, -half, high]],
    ]  # fmt: skip


BOX = [[0.8, -0.3, 0.0], [1.3, 0.4, 0.6]]


def look_around(grid: Grid, scene: Scene, *places, submap: int = 0, yaws: int = 8) -> Grid:
    for place in places:
        camera = np.array([*place, EYE_M])
        for yaw in np.arange(yaws) * 2 * np.pi / yaws:
            grid.add(scene.seen(camera, yaw), camera, submap)
    return grid


def at(grid: Grid, x, y) -> np.ndarray:
    """States of the cells in which places lie."""
    corner, states = grid.states()
    column, row = (
        np.floor((np.asarray(v) - c) / grid.cell_size + 1e-6).astype(int)
        for v, c in zip((x, y), corner, strict=True)
    )
    rows, columns = states.shape
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return np.where(inside, states[np.clip(row, 0, rows - 1), np.clip(column, 0, columns - 1)], UNKNOWN)
