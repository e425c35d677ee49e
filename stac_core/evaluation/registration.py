"""Fine registration of two clouds that already lie close: point-to-point ICP."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stac_core.evaluation.alignment import IDENTITY, Similarity, align_points

Array = NDArray[np.float64]
_SETTLED = 1e-6  # change of fitness and of residual below which another round brings nothing
_ROUNDS = 30  # at most


def register(source: Array, target: Array, max_distance: float) -> Similarity:
    """Rigid transform of source [N, 3] onto target [M, 3]; pairs farther than max_distance are ignored.

    Scale must be right before. Returns the identity where fewer than three pairs are near enough.
    Source: P. Besl, N. McKay, IEEE TPAMI 14(2), 1992, with rejection of far pairs.
    """
    if not max_distance > 0:
        raise ValueError(f"max_distance = {max_distance}: must be positive")
    tree = cKDTree(target)
    result, previous = IDENTITY, (-1.0, -1.0)
    for _ in range(_ROUNDS):
        moved = result.apply(source)
        distance, partner = tree.query(moved, distance_upper_bound=max_distance, workers=-1)
        near = np.isfinite(distance)
        if near.sum() < 3:
            return result
        current = float(near.mean()), float(np.sqrt(np.mean(distance[near] ** 2)))
        if abs(current[0] - previous[0]) < _SETTLED and abs(current[1] - previous[1]) < _SETTLED:
            return result
        previous = current
        result = align_points(moved[near], target[partner[near]], with_scale=False).after(result)
    return result
