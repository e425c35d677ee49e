"""The voxel map against plain loops and invariants; the trajectory as a file, judged by evo."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from stac_core.files import write_whole
from stac_ros.map import VoxelMap
from stac_ros.trajectory import Trajectory


def points(count: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positions = rng.normal(scale=spread, size=(count, 3)).astype(np.float32)
    return (
        positions,
        rng.integers(0, 256, (count, 3), dtype=np.uint8),
        rng.uniform(1, 9, count).astype(np.float32),
    )


def weighted_means(batches, size: float) -> dict[tuple[int, ...], np.ndarray]:
    """What the map should hold: a dictionary of voxels, filled point by point."""
    sums: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(7))
    for positions, colours, weights in batches:
        for position, colour, weight in zip(positions, colours, weights, strict=True):
            cell = tuple(np.floor(position / np.float32(size)).astype(int))
            sums[cell] += weight * np.array([*position, *colour, 1])
    return {cell: total[:6] / total[6] for cell, total in sums.items()}


def test_every_voxel_holds_the_weighted_mean_of_its_points():
    batches = [points(700, seed) for seed in range(4)]
    found = VoxelMap(0.5, 100_000)
    for batch in batches:
        found.add(*batch)
    expected = weighted_means(batches, 0.5)
    positions, colours = found.points()
    assert len(found) == len(positions) == len(expected)
    for position, colour in zip(positions, colours, strict=True):
        # A mean may lie on the wall of its voxel; the voxel meant is the nearest mean.
        mean = min(expected.values(), key=lambda mean: float(np.abs(mean[:3] - position).sum()))
        assert np.allclose(position, mean[:3], atol=1e-5) and np.abs(colour - mean[3:]).max() <= 0.501


def test_the_order_of_frames_and_their_division_do_not_matter():
    whole = points(3000, 1)
    once, parts = VoxelMap(0.3, 100_000), VoxelMap(0.3, 100_000)
    once.add(*whole)
    for start in range(2900, -1, -100):
        parts.add(*(values[start : start + 100] for values in whole))
    assert np.allclose(once.points()[0], parts.points()[0], atol=1e-5)


def test_a_full_map_gets_coarser_and_stays_whole():
    found = VoxelMap(0.01, 2000)
    positions, colours, weights = points(20_000, 2)
    found.add(positions, colours, weights)
    assert 250 < len(found) <= 2000 and found.voxel_size == 0.01 * 2 ** round(
        np.log2(found.voxel_size / 0.01)
    )
    assert found.bytes < 2000 * 40
    kept = found.points()[0]
    assert np.abs(kept.mean(axis=0) - positions.mean(axis=0)).max() < 0.3
    assert np.allclose(kept.max(axis=0), positions.max(axis=0), atol=2 * found.voxel_size)
    found.clear()
    assert len(found) == 0 and found.voxel_size == 0.01


def test_points_that_are_no_place_are_left_out_and_counted():
    found = VoxelMap(0.1, 1000)
    positions = np.array([[0, 0, 0], [np.nan, 0, 0], [0, np.inf, 0], [1e9, 0, 0]], np.float32)
    found.add(positions, np.zeros((4, 3), np.uint8), np.ones(4, np.float32))
    assert len(found) == 1 and found.points_outside == 3
    found.add(np.empty((0, 3), np.float32), np.empty((0, 3), np.uint8), np.empty(0, np.float32))
    assert len(found) == 1


def test_a_written_trajectory_is_read_by_evo(tmp_path):
    file_interface = pytest.importorskip("evo.tools.file_interface")
    rng = np.random.default_rng(4)
    trajectory = Trajectory(1000)
    poses = []
    for index in range(5):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = Rotation.random(rng=rng).as_matrix(), rng.normal(size=3)
        trajectory.add(1_700_000_000_000_000_001 + index, pose)
        poses.append(pose)
    assert trajectory.tum().startswith("1700000000.000000001 ")
    write_whole(tmp_path / "trajectory.tum", trajectory.tum())
    read = file_interface.read_tum_trajectory_file(tmp_path / "trajectory.tum")
    assert np.allclose(read.poses_se3, poses, atol=1e-7)


def test_the_trajectory_is_bounded():
    trajectory = Trajectory(100)
    for stamp in range(1000):
        trajectory.add(stamp, np.eye(4))
    assert 90 <= len(trajectory) <= 100
    assert trajectory.tum().splitlines()[-1].startswith("0.000000999 ")
