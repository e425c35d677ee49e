"""One image as a scan in the plane: what stands how far around the camera, and over what it looks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stac_ros.settings import GridSettings

_NARROWEST = 0.01  # radians of a direction: between the pixels of an image there is nothing to see

Distances = NDArray[np.float32]


@dataclass(frozen=True)
class PlaneScan:
    """By directions around the camera, each as wide as a cell at the end of `grid.range`, or as a pixel."""

    obstacles: NDArray[np.float32]  # [M, 2] places in the map that a robot would bump into
    seen_from: Distances  # [D] metres to the nearest thing in view; inf = nothing is
    free_to: Distances  # [D] metres without an obstacle or a drop; 0 = unknown

    def directions(self, x: Distances, y: Distances) -> NDArray[np.int64]:
        """Those in which places lie, seen from the camera."""
        return _directions(x, y, len(self.free_to))


def plane_scan(points: NDArray[np.float32], camera: NDArray[np.float64], settings: GridSettings) -> PlaneScan:
    """The scan of an image by its points [N, 3] and the place of its camera [3], in the map and in metres.

    Where floor is seen and no obstacle, it is free up to the farthest floor. A ray that ends below the floor
    tells that there is none where it passed through; a point above `grid.height` tells nothing.
    """
    x, y = (points[:, :2] - camera[:2]).astype(np.float32).T
    distance, height = np.hypot(x, y), points[:, 2] - np.float32(settings.floor)
    near = distance <= settings.range  # false for NaN too
    obstacle = near & (height > settings.step) & (height <= settings.height)
    floor = near & (np.abs(height) <= settings.step)
    below = (height < -settings.step) & np.isfinite(height) & np.isfinite(distance)
    eye = max(camera[2] - settings.floor, 0.0)
    count = int(np.ceil(2 * np.pi / max(settings.cell_size / settings.range, _NARROWEST)))
    direction = _directions(x, y, count)

    def nearest(chosen: NDArray[np.bool_], distances: Distances) -> Distances:
        found = np.full(count, np.inf, np.float32)
        np.minimum.at(found, direction[chosen], distances)
        return found

    first = nearest(obstacle, distance[obstacle])
    edge = nearest(below, distance[below] * np.float32(eye) / (np.float32(eye) - height[below]))
    last_floor = np.zeros(count, np.float32)
    np.maximum.at(last_floor, direction[floor], distance[floor])
    free_to = np.minimum(np.where(np.isfinite(first), first, last_floor), edge)
    return PlaneScan(points[obstacle, :2], np.minimum(first, nearest(floor, distance[floor])), free_to)


def _directions(x: Distances, y: Distances, count: int) -> NDArray[np.int64]:
    turns = np.nan_to_num(np.arctan2(y, x)) * np.float32(count / (2 * np.pi))
    return np.floor(turns).astype(np.int64) % count
