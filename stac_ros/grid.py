"""Where a robot may drive: an occupancy grid of a level map in metres, bounded by the area that was seen."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stac_core import Moves
from stac_ros.moving import NONE_YET, STAYS, Submaps, moved_points
from stac_ros.plane_scan import plane_scan
from stac_ros.settings import GridSettings

OCCUPIED, FREE, UNKNOWN = 100, 0, -1  # of nav_msgs/OccupancyGrid
HIT, MISS = 0.85, -0.4  # log-odds, as are the limits: OctoMap (Hornung et al. 2013, section 5)
LEAST, MOST = -2.0, 3.5
MOST_CELLS = 4096  # along each side; 17 MB as a message
_BLOCK = 64  # the sides are whole ones of these, so that few images make them grow

Evidence = NDArray[np.float32]

logger = logging.getLogger(__name__)


class Grid:
    """Per cell the log-odds of an obstacle (Moravec and Elfes 1985), and the submap that saw it first.

    Each image is taken as a `PlaneScan`. All obstacles in it are hits, also those seen over a nearer one; the
    cells before the first of them, or before the farthest floor, are misses. Within an image a hit wins.
    """

    def __init__(self, settings: GridSettings) -> None:
        self._settings = settings
        self.cell_size, self.floor = settings.cell_size, settings.floor
        self.clear()

    def clear(self) -> None:
        """Forget all cells."""
        self._told = False
        self._forget()

    @property
    def empty(self) -> bool:
        """Whether nothing is known."""
        return not self._evidence.any()

    def add(self, points: NDArray[np.float32], camera: NDArray[np.float64], submap: int) -> None:
        """What an image shows: its points [N, 3], seen from the place of its camera [3], both in the map."""
        reach = int(np.ceil(self._settings.range / self.cell_size)) + 1
        first = self._cells(camera[:2]) - reach
        last = first + 2 * reach
        if not self._make_room(first, last):
            return
        column, row = first - self._corner
        window = np.s_[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
        evidence, submaps = self._evidence[window], self._submaps[window]
        change = self._change(points, camera, first, evidence)
        evidence[:] = np.clip(evidence + change, LEAST, MOST)
        np.minimum(submaps, submap, out=submaps, where=change != 0)

    def move(self, moves: Moves) -> None:
        """Each cell with its submap; what comes to lie together is one cell, what is torn is closed."""
        places, evidence, submaps = self.known()
        level = np.full((len(places), 1), self.floor)
        moved = moved_points(moves, submaps, np.hstack([places, level]))
        self._forget()
        self.put(moved[:, :2], evidence, submaps)
        self._close()
        self._close()  # once more for two torn cells side by side

    def end_stream(self) -> None:
        """Nothing moves from here on but what is added later."""
        self._submaps[self._evidence != 0] = STAYS

    def known(self) -> tuple[NDArray[np.float64], Evidence, Submaps]:
        """All known cells, for `put`: places in the map [K, 2], log-odds [K], submaps [K]."""
        row, column = at = np.nonzero(self._evidence)
        middles = np.stack([column, row], axis=1).astype(np.float64) + self._corner + 0.5
        places = (middles + self._shifts[at]) * self.cell_size
        return places, self._evidence[at], self._submaps[at]

    def put(self, places: NDArray[np.float64], evidence: Evidence, submaps: Submaps) -> None:
        """Fill an empty grid; where it cannot hold all, with what lies around their middle."""
        if not len(places):
            return
        cells = self._cells(places)
        if not self._make_room(cells.min(axis=0), cells.max(axis=0)):
            off = np.abs(cells - np.median(cells, axis=0)).max(axis=1)
            fits = off <= MOST_CELLS // 2 - _BLOCK
            self.put(places[fits], evidence[fits], submaps[fits])
            return
        order = np.argsort(evidence, kind="stable")  # of those in one cell the last stays: an obstacle wins
        places, cells = places[order], cells[order]
        at = tuple((cells - self._corner).T[::-1])
        self._evidence[at], self._submaps[at] = evidence[order], submaps[order]
        within = 0.4995  # the next half of float16 may be 0.5, which is in the next cell
        self._shifts[at] = np.clip(places / self.cell_size - cells - 0.5, -within, within)

    def states(self) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
        """What is known: OCCUPIED, FREE or UNKNOWN [rows along y, columns along x], and where in the map [2]
        the outer corner of the first cell lies. One unknown cell where nothing is.
        """
        if self.empty:
            return np.zeros(2), np.full((1, 1), UNKNOWN, np.int8)
        (top, bottom), (left, right) = (
            np.flatnonzero(self._evidence.any(axis=axis))[[0, -1]] for axis in (1, 0)
        )
        evidence = self._evidence[top : bottom + 1, left : right + 1]
        states = np.select([evidence > 0, evidence < 0], [np.int8(OCCUPIED), np.int8(FREE)], np.int8(UNKNOWN))
        return (self._corner + np.array([left, top])) * self.cell_size, states

    def _forget(self) -> None:
        self._corner = np.zeros(2, np.int64)  # column and row of the cell at [0, 0] below; rows are along y
        self._evidence = np.zeros((0, 0), np.float32)  # 0 = unknown
        self._submaps = np.zeros((0, 0), np.int32)
        self._shifts = np.zeros((0, 0, 2), np.float16)  # in cells: from a cell's centre to where it was seen

    def _cells(self, places: NDArray[Any]) -> NDArray[np.int64]:
        """Column and row [..., 2] of the cells in which places [..., 2] lie."""
        return np.floor(np.asarray(places, np.float64) / self.cell_size).astype(np.int64)

    def _change(
        self,
        points: NDArray[np.float32],
        camera: NDArray[np.float64],
        first: NDArray[np.int64],
        so_far: Evidence,
    ) -> Evidence:
        """What an image adds to the log-odds [S, S] of the cells around its camera, from `first` on."""
        scan = plane_scan(points, camera, self._settings)
        sides = (first[:, None] + 0.5 + np.arange(len(so_far))) * self.cell_size - camera[:2, None]
        x, y = np.meshgrid(*sides.astype(np.float32))
        distance, direction = np.hypot(x, y), scan.directions(x, y)
        passed = distance < scan.free_to[direction] - self.cell_size / 2
        # Rays pass above what is nearer than anything in view: nothing is taken back that was seen there.
        passed &= (distance >= scan.seen_from[direction]) | (so_far == 0)
        change = np.where(passed, np.float32(MISS), np.float32(0))
        column, row = (self._cells(scan.obstacles) - first).T
        change[row, column] = HIT
        return change

    def _make_room(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> bool:
        """Have the sides include these cells; False, and said once, where they would become too long."""
        rows, columns = self._evidence.shape
        if rows:
            first = np.minimum(first, self._corner)
            last = np.maximum(last, self._corner + np.array([columns, rows]) - 1)
        corner = first // _BLOCK * _BLOCK
        width, height = (last // _BLOCK + 1) * _BLOCK - corner
        if max(width, height) > MOST_CELLS:
            self._tell_of_limit()
            return False
        if (height, width) != (rows, columns):
            column, row = self._corner - corner if rows else (0, 0)
            sides = (row, height - rows - row), (column, width - columns - column)
            self._evidence = np.pad(self._evidence, sides)
            self._submaps = np.pad(self._submaps, sides, constant_values=NONE_YET)
            self._shifts = np.pad(self._shifts, (*sides, (0, 0)))
            self._corner = corner
        return True

    def _tell_of_limit(self) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "the grid is full: what would make it longer than %g m is left out; raise grid.cell_size",
                MOST_CELLS * self.cell_size,
            )

    def _close(self) -> None:
        """Give an unknown cell between two known ones the lesser evidence of the two, also a free one between
        obstacles. Where that is so along x and along y, the greater of both: a wall stays closed.
        """
        lesser = []
        for before, after in _neighbours(self._evidence, 0):
            lesser.append(np.where((before != 0) & (after != 0), np.minimum(before, after), -np.inf))
        between = np.maximum(*lesser)
        torn = np.isfinite(between) & ((self._evidence == 0) | (between > 0) & (self._evidence < 0))
        self._evidence[torn] = between[torn]
        beside = np.minimum(*(np.minimum(*pair) for pair in _neighbours(self._submaps, NONE_YET)))
        self._submaps[torn] = beside[torn]


def _neighbours(values: NDArray[Any], outside: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Of every cell: those before and after it along x, and along y."""
    around = np.pad(values, 1, constant_values=outside)
    return [(around[1:-1, :-2], around[1:-1, 2:]), (around[:-2, 1:-1], around[2:, 1:-1])]
