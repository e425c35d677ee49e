"""The whole map: one coloured point per voxel, in bounded memory."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

_BITS = 21  # of a cell's index along each axis: three of them fit one int64 key
_HALF = 1 << (_BITS - 1)
_VALUES = 6  # x, y, z, r, g, b

logger = logging.getLogger(__name__)


class VoxelMap:
    """Means of position and colour per voxel, weighted by confidence.

    Voxels are kept sorted by key, so that a frame is merged by one binary search. Beyond `max_points` the
    edge doubles: the map gets coarser, but stays whole.
    """

    def __init__(self, voxel_size: float, max_points: int) -> None:
        self._first_size, self._max_points = voxel_size, max_points
        self.clear()

    def clear(self) -> None:
        """Forget all points; the voxels have their first size again."""
        self.voxel_size = self._first_size
        self.points_outside = 0  # too far away to be numbered: beyond a million voxels
        self._forget()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def bytes(self) -> int:
        return self._keys.nbytes + self._weights.nbytes + self._means.nbytes

    def add(
        self, positions: NDArray[np.float32], colours: NDArray[np.uint8], confidences: NDArray[np.float32]
    ) -> None:
        """Merge points: positions [N, 3], RGB colours [N, 3], confidences [N] > 0."""
        values = np.concatenate([positions, colours], axis=1, dtype=np.float32)
        self._merge(values, confidences.astype(np.float32))
        while len(self) > self._max_points:
            values, weights = self._means, self._weights
            self._forget()
            self.voxel_size *= 2
            self._merge(values, weights)
            logger.warning(
                "the map exceeded map.max_points = %d: voxels are %g now", self._max_points, self.voxel_size
            )

    def points(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Copies of all positions [N, 3] and RGB colours [N, 3]."""
        return self._means[:, :3].copy(), np.rint(self._means[:, 3:]).astype(np.uint8)

    def _forget(self) -> None:
        self._keys: NDArray[np.int64] = np.empty(0, np.int64)  # [M], ascending
        self._weights: NDArray[np.float32] = np.empty(0, np.float32)  # [M]
        self._means: NDArray[np.float32] = np.empty((0, _VALUES), np.float32)  # [M, 6]

    def _merge(self, values: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
        cells = np.floor(values[:, :3] / np.float32(self.voxel_size))
        inside = (np.abs(cells) < _HALF).all(axis=1)  # false for NaN too
        if not inside.all():
            self.points_outside += int((~inside).sum())
            cells, values, weights = cells[inside], values[inside], weights[inside]
        x, y, z = (cells.astype(np.int64) + _HALF).T
        keys, group = np.unique((x << 2 * _BITS) | (y << _BITS) | z, return_inverse=True)
        summed = np.bincount(group, weights, len(keys))
        means = np.empty((len(keys), _VALUES), np.float32)
        for axis in range(_VALUES):
            means[:, axis] = np.bincount(group, weights * values[:, axis], len(keys)) / summed
        self._insert(keys, summed.astype(np.float32), means)

    def _insert(
        self, keys: NDArray[np.int64], weights: NDArray[np.float32], means: NDArray[np.float32]
    ) -> None:
        """Merge voxels given in ascending order of their keys."""
        places = np.searchsorted(self._keys, keys)
        known = np.zeros(len(keys), bool)
        within = places < len(self)
        known[within] = self._keys[places[within]] == keys[within]
        slots = places[known]
        self._weights[slots] += weights[known]
        share = (weights[known] / self._weights[slots])[:, None]
        self._means[slots] += share * (means[known] - self._means[slots])
        new = ~known
        self._keys = np.insert(self._keys, places[new], keys[new])
        self._weights = np.insert(self._weights, places[new], weights[new])
        self._means = np.insert(self._means, places[new], means[new], axis=0)
