"""Command: how long the cloud measures of a long scene take (`python -m stac_core.evaluation.benchmark`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stac_core.evaluation.cloud_metrics import cloud_errors
from stac_core.evaluation.registration import register
from stac_core.evaluation.score import GrowingCloud

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
    thinning = 0.0
    for _ in range(arguments.frames):
        views = [view_of_room(random, arguments.pixels, noise) for noise in (0.01, 0.0)]
        started = time.perf_counter()
        for cloud, view in zip((ours, theirs), views, strict=True):
            cloud.add(view)
        thinning += time.perf_counter() - started
    (our_points, true_points), merging = _timed(lambda: (ours.points(), theirs.points()))
    thin = our_points[:: max(1, len(our_points) // 100_000)]
    _, registering = _timed(lambda: register(thin, true_points, 0.1))
    errors, comparing = _timed(lambda: cloud_errors(our_points, true_points))
    print(f"{arguments.frames} frames of {arguments.pixels} points, thinned to {arguments.voxel_size} m:")
    print(f"  {len(our_points)} against {len(true_points)} points, F-score {errors.f_score:.3f}")
    parts = {"thin": thinning, "merge": merging, "register": registering, "compare": comparing}
    for name, seconds in (*parts.items(), ("total", sum(parts.values()))):
        print(f"  {name:9s} {seconds:7.2f} s")


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


if __name__ == "__main__":
    main()
