"""The factor between the camera's path as odometry sees it, in metres, and as the network sees it."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from stac_core import Moves

STEPS = 10  # of a stretch; fewer images say too little, however far apart
AGREEMENT = 0.9  # correlation of two paths, 1 = of the same shape
TOLERANCE = 0.05  # of the factor: all that is mapped moves with it, so it does not follow every stretch
_MOST = 1000  # stretches that are kept, the latest


class OdometryScale:
    """Measured stretch by stretch, for a single one is rough: the factor is the median of all so far.

    A stretch is `STEPS` steps, each at least a tenth of the baseline along odometry; standing still makes no
    step. The longest is left out, since it may be a jump of odometry. The factor of a stretch is that of the
    least-squares similarity between what remains of both paths (Umeyama 1991, PAMI 13(4), eq. 42), if they
    agree in shape. Where they do not, it goes on by one step.
    """

    def __init__(self, baseline: float) -> None:
        """baseline: how far the camera must travel in a stretch, in metres."""
        self._baseline = baseline
        self._in_odom: deque[NDArray[np.float64]] = deque(maxlen=STEPS)  # steps [3]
        self._in_world: deque[NDArray[np.float64]] = deque(maxlen=STEPS)
        self._last: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None  # positions [3]
        self._agreement = 0.0
        self._stretches: deque[tuple[float, int]] = deque(maxlen=_MOST)  # factor, and submap where it ended
        self.factor: float | None = None  # metres per unit of the network's lengths; None = not known yet

    def add(
        self, odom_from_camera: NDArray[np.float64], world_from_camera: NDArray[np.float64], submap: int = 0
    ) -> None:
        """The camera [4, 4] of the next image, in metres and in the network's unit."""
        in_odom, in_world = odom_from_camera[:3, 3].copy(), world_from_camera[:3, 3].copy()
        if self._last is not None:
            step = in_odom - self._last[0]
            if np.linalg.norm(step) < self._baseline / STEPS:
                return
            self._in_odom.append(step)
            self._in_world.append(in_world - self._last[1])
        self._last = in_odom, in_world
        if len(self._in_odom) == STEPS:
            self._measure(submap)

    def jump(self) -> None:
        """The next image is where the network's camera turned out to be: no step leads there.

        The steps of the stretch at hand are kept as they were made, also where a loop has moved them since:
        they are differences, which it turns and scales by no more than what had drifted, and not places.
        """
        self._last = None

    def move(self, moves: Moves) -> None:
        """A closed loop has given submaps other lengths, and so their stretches other factors."""
        if self._stretches:
            factors, submaps = zip(*self._stretches, strict=True)
            scales = moves.up_to(max(submaps) + 1).scale[list(submaps)]
            self._stretches.clear()
            self._stretches.extend(zip((factors / scales).tolist(), submaps, strict=True))
            self._follow()

    def resume(self, stretches: NDArray[np.float64], factor: float) -> None:
        """Go on with what was measured of this stream before, `stretches`; its map has this factor."""
        self._stretches.extend((measured, int(submap)) for measured, submap in stretches.tolist())
        self.factor = factor
        self._follow()

    @property
    def stretches(self) -> NDArray[np.float64]:
        """Of each its factor, and the submap in which it ended: [n, 2]."""
        return np.array(self._stretches).reshape(-1, 2)

    @property
    def travelled(self) -> float:
        """Metres of the baseline behind the camera; a step counts a tenth of it, however long."""
        return self._baseline * len(self._in_odom) / STEPS

    def _measure(self, submap: int) -> None:
        """The stretch that ends here."""
        factor, self._agreement = _similarity(*_paths_without_longest_step(self._in_odom, self._in_world))
        if self._agreement >= AGREEMENT:
            self._stretches.append((float(factor), submap))
            self._in_odom.clear()
            self._in_world.clear()
            self._follow()

    def _follow(self) -> None:
        """Let the factor be the median, where it is too far from that."""
        median = float(np.median([factor for factor, _ in self._stretches]))
        if self.factor is None or abs(np.log(median / self.factor)) > TOLERANCE:
            self.factor = median

    def __str__(self) -> str:
        if self.factor is not None:
            return f"odometry, {self.factor:.3g} m per unit"
        if len(self._in_odom) == STEPS:
            return (
                f"odometry: its path and the network's agree to {self._agreement:.2f}, {AGREEMENT} is needed"
            )
        return f"odometry: {self.travelled:.2g} of {self._baseline:g} m travelled"


def _paths_without_longest_step(
    in_odom: deque[NDArray[np.float64]], in_world: deque[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both paths [STEPS, 3] of steps, as if odometry's longest step had not been made."""
    longest = np.linalg.norm(np.array(in_odom), axis=1).argmax()
    return _path(np.delete(in_odom, longest, axis=0)), _path(np.delete(in_world, longest, axis=0))


def _path(steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The positions [N + 1, 3] between and around steps [N, 3]."""
    return np.vstack([np.zeros(3), steps.cumsum(axis=0)])


def _similarity(metric: NDArray[np.float64], own: NDArray[np.float64]) -> tuple[float, float]:
    """Factor from the points `own` [N, 3] to the points `metric` [N, 3], and the correlation of the two."""
    metric, own = metric - metric.mean(axis=0), own - own.mean(axis=0)
    left, common, right = np.linalg.svd(metric.T @ own)
    if np.linalg.det(left @ right) < 0:
        common[-1] *= -1  # a mirror is no rotation
    metric_square, own_square = np.square(metric).sum(), np.square(own).sum()
    if not metric_square * own_square > 0:
        return 1.0, 0.0
    return common.sum() / own_square, common.sum() / np.sqrt(metric_square * own_square)
