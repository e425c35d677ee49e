"""What is mapped comes to lie elsewhere in the map: a loop has been closed, or lengths are others now.

Whatever is mapped says in which submap of the stream it was seen, and moves with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from stac_core import Moves

STAYS = -1  # in place of a submap: seen by a stream that has ended, where no move leads
NONE_YET = np.iinfo(np.int32).max  # in place of a submap, above all of them: seen by none so far

Submaps = NDArray[np.int32]


def rescaling(factor: float, fixed_point: NDArray[np.float64], submaps: int) -> Moves:
    """All distances from a point [3] of the map multiplied by a factor; directions stay."""
    still = Moves.none(submaps)
    return replace(
        still, translation=still.translation + (1 - factor) * fixed_point, scale=factor * still.scale
    )


def moved_points(moves: Moves, submaps: Submaps, positions: NDArray[Any]) -> NDArray[np.float64]:
    """Where points [N, 3] come to lie, seen in submaps [N]; those of others than the moves know stay."""
    known, moved = np.flatnonzero(_known(moves, submaps)), np.array(positions, np.float64)
    moved[known] = moves.points(submaps[known], moved[known])
    return moved


def moved_poses(moves: Moves, submaps: Submaps, poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same of poses [N, 7]: translation x, y, z and unit quaternion x, y, z, w."""
    known, moved = _known(moves, submaps), poses.copy()
    moved[:, :3] = moved_points(moves, submaps, poses[:, :3])
    if known.any():
        turned = Rotation.from_matrix(moves.rotation[submaps[known]]) * Rotation.from_quat(moved[known, 3:])
        moved[known, 3:] = turned.as_quat()
    return moved


def _known(moves: Moves, submaps: Submaps) -> NDArray[np.bool_]:
    return (submaps >= 0) & (submaps < len(moves))
