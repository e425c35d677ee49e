"""The whole map: one coloured point per voxel, in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stac_core import Moves
from stac_ros.moving import NONE_YET, STAYS, Submaps, moved_points

_BITS = 21  # of a voxel's index along each axis: three of them fit one int64 key
_HALF = 1 << (_BITS - 1)  # added to an index, so that it is not negative
_EACH = 1 | 1 << _BITS | 1 << 2 * _BITS  # times a number: that number along each axis
_VALUES = 6  # x, y, z, r, g, b

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MapFigures:
    """A map after its latest change, for other threads: in the midst of one it may look empty."""

    points: int
    bytes: int
    voxel_size: float
    points_outside: int


class VoxelMap:
    """Means of position and colour per voxel, weighted by confidence, and the submap that saw it first.

    A voxel stays in the slot that it was given when first seen; sorted keys lead to the slots. An image is
    merged by sorting its own keys, one search, and one update of the slots found. Space for `max_points` is
    reserved from the start; what would exceed it doubles the edge: the map gets coarser, but stays whole.
    """

    def __init__(self, voxel_size: float, max_points: int) -> None:
        self._first_size, self._max_points = voxel_size, max_points
        self.clear()

    def clear(self) -> None:
        """Forget all points; the voxels have their first size again."""
        self.voxel_size = self._first_size
        self.points_outside = 0  # too far away to be numbered: beyond a million voxels
        self._forget()
        self._note()

    def __len__(self) -> int:
        return len(self._keys) - 1

    @property
    def bytes(self) -> int:
        """Of memory, reserved space included."""
        parts = self._keys, self._slots, self._weights, self._means, self._submaps
        return sum(part.nbytes for part in parts)

    def add(
        self,
        positions: NDArray[np.float32],
        colours: NDArray[Any],
        confidences: NDArray[np.float32],
        submaps: Submaps | int,
    ) -> None:
        """Merge points: positions [N, 3], RGB colours [N, 3], confidences [N] > 0, submaps [N] or of all."""
        seen_in = np.broadcast_to(np.asarray(submaps, np.int32), len(positions))
        columns = np.ascontiguousarray(positions.T)
        cells = np.floor(columns / np.float32(self.voxel_size))
        inside = (np.abs(cells) < _HALF).all(axis=0)  # false for NaN too
        if not inside.all():
            self.points_outside += int((~inside).sum())
            cells, columns = cells[:, inside], columns[:, inside]
            colours, confidences, seen_in = colours[inside], confidences[inside], seen_in[inside]
        x, y, z = cells.astype(np.int64) + _HALF
        self._merge((x << 2 * _BITS) | (y << _BITS) | z, confidences, seen_in, (*columns, *colours.T))
        self._note()

    def move(self, moves: Moves, other_lengths: bool = False) -> None:
        """Each point with its submap; what comes to lie together is one voxel.

        other_lengths: all are scaled, and voxels have their first size again, however coarse they were.
        """
        positions, colours, weights, submaps = self.voxels()
        self._forget()
        if other_lengths:
            self.voxel_size = self._first_size
        self.add(moved_points(moves, submaps, positions).astype(np.float32), colours, weights, submaps)

    def end_stream(self) -> None:
        """Nothing moves from here on but what is added later."""
        self._submaps[: len(self)] = STAYS

    def voxels(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], Submaps]:
        """Copies of all, for `add`: positions [N, 3], RGB colours [N, 3], confidences [N], submaps [N]."""
        slots = self._slots[1:]
        means = self._means.take(slots, axis=1)
        return means[:3].T, means[3:].T, self._weights.take(slots), self._submaps.take(slots)

    def points(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Copies of all positions [N, 3] and RGB colours [N, 3], in the order of the voxels in space."""
        positions, colours, *_ = self.voxels()
        return positions.copy(), np.rint(colours).astype(np.uint8)

    def _note(self) -> None:
        self.figures = MapFigures(len(self), self.bytes, self.voxel_size, self.points_outside)

    def _forget(self) -> None:
        self._keys = np.array([-1])  # [1 + M], ascending; the first is below all that occur
        self._slots = np.zeros(1, np.int32)  # [1 + M], of the keys
        self._weights = np.zeros(self._max_points, np.float32)  # [max_points], of slots; 0 = not yet used
        self._means = np.zeros((_VALUES, self._max_points), np.float32)
        self._submaps = np.full(self._max_points, NONE_YET, np.int32)

    def _merge(
        self,
        keys: NDArray[np.int64],  # [N]
        weights: NDArray[np.float32],  # [N]
        submaps: Submaps,  # [N]
        columns: Iterable[NDArray[Any]],  # six of [N] values
    ) -> None:
        """Merge points, or voxels into larger ones."""
        voxels, group = (t.numpy() for t in torch.unique(torch.from_numpy(keys), return_inverse=True))
        above = np.searchsorted(self._keys, voxels, side="right")  # the first key above each voxel's
        new = np.flatnonzero(self._keys.take(above - 1) != voxels)
        if len(self) + len(new) > self._max_points:
            self._coarsen()
            self._merge(_parents(voxels)[group], weights, submaps, columns)
            return
        slots = self._slots.take(above - 1).astype(np.int64)
        slots[new] = np.arange(len(self), len(self) + len(new))
        self._slots = np.insert(self._slots, above[new], slots[new])
        self._keys = np.insert(self._keys, above[new], voxels[new])
        self._average(slots, group, weights, columns)
        np.minimum.at(self._submaps, slots[group], submaps)

    def _average(
        self,
        slots: NDArray[np.int64],  # [M], distinct
        group: NDArray[np.int64],  # [N], which of the slots
        weights: NDArray[np.float32],  # [N]
        columns: Iterable[NDArray[Any]],  # [N]
    ) -> None:
        """Move the means in the slots towards the values that came in."""
        added = np.bincount(group, weights, len(slots)).astype(np.float32)
        total = self._weights.take(slots) + added
        self._weights[slots] = total
        for means, values in zip(self._means, columns, strict=True):
            mean = means.take(slots)
            summed = np.bincount(group, weights * values, len(slots)).astype(np.float32)
            means[slots] = mean + (summed - added * mean) / total

    def _coarsen(self) -> None:
        """Double the edge."""
        slots = self._slots[1:]
        keys, weights, submaps = self._keys[1:], self._weights.take(slots), self._submaps.take(slots)
        means = self._means.take(slots, axis=1)
        self._forget()
        self.voxel_size *= 2
        self._merge(_parents(keys), weights, submaps, means)
        logger.warning(
            "the map exceeded map.max_points = %d: voxels are %g now; raise map.voxel_size",
            *(self._max_points, self.voxel_size),
        )


def _parents(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keys of the voxels of twice the edge: each index halved and rounded down."""
    return (keys >> 1 & (_HALF - 1) * _EACH) + (_HALF >> 1) * _EACH
