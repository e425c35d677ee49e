"""Command: how long the cloud measures of a long scene take (`python -m stac_core.evaluation.benchmark`).

On a busy computer the time of computing says more than the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from stac_core.evaluation.cloud_metrics import cloud_errors
from stac_core.evaluation.registration import register
from stac_core.evaluation.score import GrowingCloud, thin

_ROOM_M = np.array([8.0, 6.0, 3.0])


def view_of_room(random: np.random.Generator, pixels: int, noise_m: float) -> NDArray[np.float64]:
    """Points [pixels, 3] on one side of a room, as one depth map sees them."""
    points = random.uniform(0, 1, (pixels, 3)) * _ROOM_M * 0.6 + random.uniform(0, 0.4, 3) * _ROOM_M
    wall = random.integers(0, 3, pixels)
    points[np.arange(pixels), wall] = 0
    return points + random.normal(0, noise_m, points.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--pixels", type=int, default=518 * 392)
    parser.add_argument("--voxel_size", type=float, default=0.02, help="metres")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    ours, theirs = GrowingCloud(arguments.voxel_size), GrowingCloud(arguments.voxel_size)
    watch = Stopwatch()
    for _ in range(arguments.frames):
        views = [view_of_room(random, arguments.pixels, noise) for noise in (0.01, 0.0)]
        with watch("thin"):
            for cloud, view in zip((ours, theirs), views, strict=True):
                cloud.add(view)
    with watch("merge"):
        our_points, true_points = ours.points(), theirs.points()
    with watch("register"):
        register(thin(our_points), true_points, 0.1)
    with watch("compare"):
        errors = cloud_errors(our_points, true_points)
    print(f"{arguments.frames} frames of {arguments.pixels} points, thinned to {arguments.voxel_size} m:")
    print(f"  {len(our_points)} against {len(true_points)} points, F-score {errors.f_score:.3f}")
    watch.report()


class Stopwatch:
    """Seconds by name, on the clock and of all this process's threads together."""

    def __init__(self) -> None:
        self._spent: dict[str, NDArray[np.float64]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self._now()
        yield
        self._spent[name] = self._spent.get(name, np.zeros(2)) + self._now() - before

    def report(self) -> None:
        total = sum(self._spent.values(), np.zeros(2))
        for name, (wall, cpu) in {**self._spent, "total": total}.items():
            print(f"  {name:9s} {wall:7.2f} s, {cpu:7.2f} s of computing")

    @staticmethod
    def _now() -> NDArray[np.float64]:
        return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    main()
