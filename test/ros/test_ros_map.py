"""The voxel map against plain loops and invariants; the trajectory as a file, judged by evo."""

from __future__ import annotations

import threading
import tracemalloc
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from stac_core import Moves
from stac_core.files import write_lines
from stac_ros.map import VoxelMap
from stac_ros.moving import STAYS, rescaling
from stac_ros.trajectory import Trajectory, pose_rows, tum_lines


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
        found.add(*batch, 0)
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
    once.add(*whole, 0)
    for start in range(2900, -1, -100):
        parts.add(*(values[start : start + 100] for values in whole), 0)
    assert np.allclose(once.points()[0], parts.points()[0], atol=1e-5)


def test_a_full_map_gets_coarser_and_stays_whole(caplog):
    found = VoxelMap(0.01, 2000)
    positions, colours, weights = points(20_000, 2)
    found.add(positions, colours, weights, 0)
    assert 250 < len(found) <= 2000 and found.voxel_size == 0.01 * 2 ** round(
        np.log2(found.voxel_size / 0.01)
    )
    assert found.bytes < 2000 * 44
    assert f"voxels are {found.voxel_size:g} now; raise map.voxel_size" in caplog.text
    kept = found.points()[0]
    assert np.abs(kept.mean(axis=0) - positions.mean(axis=0)).max() < 0.3
    assert np.allclose(kept.max(axis=0), positions.max(axis=0), atol=2 * found.voxel_size)
    found.clear()
    assert len(found) == 0 and found.voxel_size == 0.01


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_a_rescaled_map_is_the_map_of_rescaled_points(factor):
    positions, colours, weights = points(3000, 5)
    fixed_point = np.array([1.0, -2, 0.5])
    fine, found = VoxelMap(1e-4, 100_000), VoxelMap(1e-4, 100_000)
    rescaled = fixed_point + factor * (positions - fixed_point)
    fine.add(rescaled.astype(np.float32), colours, weights, 0)
    found.add(positions, colours, weights, 0)
    found.move(rescaling(factor, fixed_point, 1))
    assert len(found) == len(fine) == 3000
    assert np.allclose(np.sort(found.points()[0], axis=0), np.sort(fine.points()[0], axis=0), atol=1e-5)


def test_a_rescaled_map_has_voxels_of_the_size_that_was_set():
    positions, colours, weights = points(20_000, 2)
    found = VoxelMap(0.01, 2000)
    found.add(positions, colours, weights, 0)
    full, coarse = len(found), found.voxel_size
    found.move(Moves.none(1))
    assert len(found) == full and found.voxel_size == coarse > 0.01
    found.move(rescaling(0.1, np.zeros(3), 1), other_lengths=True)
    assert found.voxel_size == 0.01 and 250 < len(found) <= full
    assert len(np.unique(np.floor(found.points()[0] / 0.01), axis=0)) == pytest.approx(len(found), rel=0.01)


def test_another_thread_never_sees_a_map_that_is_half_moved():
    """Diagnostics told of an empty map while a loop was closed."""
    found, told, moved = VoxelMap(0.01, 100_000), set(), threading.Event()
    found.add(*points(50_000, 3), 0)

    def watch() -> None:
        while not moved.is_set():
            told.add(found.figures)

    with ThreadPoolExecutor(1) as watcher:
        watching = watcher.submit(watch)
        try:
            for _ in range(5):
                found.move(Moves.none(1))
        finally:
            moved.set()
        watching.result()
    assert told == {found.figures} and found.figures.points == len(found) > 40_000


def some_moves(count: int, rng: np.random.Generator) -> Moves:
    turns = Rotation.from_rotvec(rng.normal(scale=0.3, size=(count, 3)))
    return Moves(turns.as_matrix(), rng.normal(size=(count, 3)), rng.uniform(0.7, 1.4, count))


def one_point_a_voxel(count: int, size: float, rng: np.random.Generator) -> np.ndarray:
    """Positions [count, 3] in as many voxels of ten edges' cube."""
    cells = rng.permutation(np.argwhere(np.ones((10, 10, 10), bool)))[:count]
    return ((cells + rng.uniform(0.1, 0.9, cells.shape)) * size).astype(np.float32)


def test_points_move_with_their_submap_and_merge_where_they_come_to_lie_together():
    """Against a loop over points: of an earlier stream, of two submaps that move, and of one that stays."""
    rng = np.random.default_rng(8)
    moves, found, moved = some_moves(2, rng), VoxelMap(0.25, 100_000), []
    for number, submap in enumerate((STAYS, 0, 1, 2)):
        positions = one_point_a_voxel(600, 0.25, rng) + np.float32(10 * number)
        _, colours, weights = points(600, number)
        found.add(positions, colours, weights, max(submap, 0))
        if submap == STAYS:
            found.end_stream()
        if 0 <= submap < 2:  # and all come to the same place
            turn, shift = Rotation.from_matrix(moves.rotation[submap]), moves.translation[submap]
            shift += turn.apply([-10.0 * number] * 3) * moves.scale[submap] + 20
            positions = np.stack(
                [moves.scale[submap] * turn.apply(p) + shift for p in positions.astype(float)]
            )
        moved.append((positions.astype(np.float32), colours, weights))
    assert len(found) == 2400
    found.move(moves)
    expected = weighted_means(moved, 0.25)
    positions, colours, _, submaps = found.voxels()
    assert len(found) == len(expected) < 2200 and set(submaps) == {STAYS, 0, 1, 2}
    means = np.array(list(expected.values()))
    distance, nearest = cKDTree(means[:, :3]).query(positions)
    assert distance.max() < 1e-5 and np.abs(colours - means[nearest, 3:]).max() < 1e-2
    untouched = (submaps == STAYS) | (submaps == 2)
    kept = np.concatenate([moved[0][0], moved[3][0]])
    assert untouched.sum() == 1200 and cKDTree(kept).query(positions[untouched])[0].max() < 1e-5


def test_voxels_that_merge_are_of_the_submap_that_came_first():
    found, one = VoxelMap(1.0, 1000), (np.zeros((1, 3), np.uint8), np.ones(1, np.float32))
    for submap, x in ((3, 0.5), (1, 3.5), (2, 6.5), (7, 0.6)):
        found.add(np.array([[x, 0.5, 0.5]], np.float32), *one, submap)
    assert found.voxels()[3].tolist() == [3, 1, 2]
    shifts = np.zeros((8, 3))
    shifts[3, 0] = 3.0
    found.move(replace(Moves.none(8), translation=shifts))
    assert found.voxels()[3].tolist() == [1, 2]


def test_a_full_map_remembers_which_submap_saw_what():
    rng, found = np.random.default_rng(3), VoxelMap(0.01, 3000)
    for submap in (5, 0, 1, 2):
        positions, colours, weights = points(4000, submap, spread=0.3)
        found.add(positions + np.float32(8 * submap), colours, weights, submap)
        if submap == 5:
            found.end_stream()
    assert found.voxel_size > 0.02
    positions, _, _, submaps = found.voxels()
    regions = np.rint(positions.mean(axis=1) / 8).astype(int)
    assert set(regions) == {0, 1, 2, 5}
    assert np.array_equal(submaps, np.where(regions == 5, STAYS, regions))
    found.move(some_moves(3, rng))
    assert (found.voxels()[3] == STAYS).sum() == (regions == 5).sum()


def test_points_that_are_no_place_are_left_out_and_counted():
    found = VoxelMap(0.1, 1000)
    positions = np.array([[0, 0, 0], [np.nan, 0, 0], [0, np.inf, 0], [1e9, 0, 0]], np.float32)
    found.add(positions, np.zeros((4, 3), np.uint8), np.ones(4, np.float32), 0)
    assert len(found) == 1 and found.points_outside == 3
    found.add(np.empty((0, 3), np.float32), np.empty((0, 3), np.uint8), np.empty(0, np.float32), 0)
    assert len(found) == 1


def known_voxels(frames, found: VoxelMap) -> np.ndarray:
    """What the map should hold after these frames, which it is given: means [M, 6], by cell."""
    kept = []
    for positions, colours, weights in frames:
        cells = np.floor(positions / np.float32(found.voxel_size))
        inside = np.array([all(abs(index) < 2**20 for index in cell) for cell in cells], bool)
        kept.append((positions[inside], colours[inside], weights[inside]))
        outside = found.points_outside + int((~inside).sum())
        found.add(positions, colours, weights, 0)
        assert found.points_outside == outside
    expected = weighted_means(kept, found.voxel_size)
    return np.array([expected[cell] for cell in sorted(expected)]).reshape(-1, 6)


@pytest.mark.parametrize("max_points", [1000, 100_000], ids=["doubling", "roomy"])
@pytest.mark.parametrize("seed", range(6))
def test_any_frames_leave_what_a_dictionary_holds(max_points, seed):
    rng = np.random.default_rng(seed)
    frames = []
    for count in (0, *rng.integers(500, 2000, 6), 0, 1):
        positions, colours, weights = points(count, int(rng.integers(1 << 30)), 10 ** rng.uniform(-2, 0.5))
        positions += rng.normal(size=3).astype(np.float32)
        spoilt = rng.random(positions.shape) < 0.01
        positions[spoilt] = rng.choice([np.nan, np.inf, -np.inf, 1e9, -1e9, 3e4], spoilt.sum())
        frames.append((positions, colours, weights))
    found = VoxelMap(0.02, max_points)
    expected = known_voxels(frames, found)
    positions, colours = found.points()
    assert (found.voxel_size > 0.02) == (max_points == 1000)
    assert len(found) == len(positions) == len(expected) <= max_points
    assert np.allclose(positions, expected[:, :3], atol=1e-5, rtol=1e-6)
    assert np.abs(colours - expected[:, 3:]).max() <= 0.501


def test_the_outermost_cells_keep_their_place_when_the_edge_doubles():
    outermost = np.float32(2**20 - 1)
    corners = np.array([[x, y, z] for x in (0.5, -0.5) for y in (0.5, -0.5) for z in (0.5, -0.5)], np.float32)
    corners[:, :2] *= outermost * 2  # cells 2**20 - 1 and -(2**20 - 1)
    near = np.random.default_rng(0).uniform(0, 30, (1200, 3)).astype(np.float32)
    frames = [
        (positions, np.zeros((len(positions), 3), np.uint8), np.ones(len(positions), np.float32))
        for positions in (corners, near)
    ]
    found = VoxelMap(1.0, 1000)
    expected = known_voxels(frames, found)
    assert found.points_outside == 0 and found.voxel_size > 1
    assert np.allclose(found.points()[0], expected[:, :3], rtol=1e-6, atol=1e-5)


def test_unweighted_means_are_those_of_open3d():
    o3d = pytest.importorskip("open3d", reason="Open3D is the judge here")
    rng = np.random.default_rng(0)
    cells = rng.integers(-8, 8, (5000, 3))
    cells[0] = -8  # Open3D's grid begins half an edge below the lowest point: here at a wall of ours
    positions = ((cells + rng.uniform(0.5, 0.9, cells.shape)) * 0.25).astype(np.float32)
    positions[0] = (-8 + 0.5) * 0.25
    colours = rng.integers(0, 256, (5000, 3), dtype=np.uint8)
    found = VoxelMap(0.25, 100_000)
    for start in range(0, 5000, 1000):
        part = slice(start, start + 1000)
        found.add(positions[part], colours[part], np.full(1000, 3, np.float32), 0)
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(positions.astype(float)))
    cloud.colors = o3d.utility.Vector3dVector(colours / 255)
    thinned = cloud.voxel_down_sample(0.25)
    theirs = np.concatenate([np.asarray(thinned.points), 255 * np.asarray(thinned.colors)], axis=1)
    ours = np.concatenate(found.points(), axis=1)
    in_order = [rows[np.lexsort(np.floor(rows[:, :3] / 0.25).T)] for rows in (ours, theirs)]
    assert np.allclose(in_order[0][:, :3], in_order[1][:, :3], atol=1e-6)
    assert np.abs(in_order[0][:, 3:] - in_order[1][:, 3:]).max() <= 0.501


def test_the_same_frames_make_the_same_map_to_the_bit():
    maps = VoxelMap(0.05, 1500), VoxelMap(0.05, 1500)
    for found in maps:
        for seed in range(5):
            found.add(*points(1000, seed), 0)
    for one, other in zip(*(found.points() for found in maps), strict=True):
        assert np.array_equal(one, other)


def test_memory_is_bounded_however_long_the_way():
    found = VoxelMap(0.01, 5000)
    tracemalloc.start()
    for step in range(200):
        positions, colours, weights = points(1000, step)
        found.add(positions + np.float32(0.1 * step), colours, weights, step)
        assert len(found) <= 5000 and found.bytes <= 5001 * 44
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 5000 * 44 + 100_000


def test_a_voxel_seen_very_often_does_not_drift():
    found = VoxelMap(0.01, 1000)
    position, colour = np.array([[700.003, -0.004, 3.3]], np.float32), np.array([[1, 127, 255]], np.uint8)
    found.add(position, colour, np.full(1, 1e9, np.float32), 0)
    for weight in np.random.default_rng(0).uniform(1, 1e6, 3000).astype(np.float32):
        found.add(position, colour, np.array([weight]), 0)
    assert np.allclose(found.points()[0], position, rtol=1e-7) and (found.points()[1] == colour).all()


def test_a_written_trajectory_is_read_by_evo(tmp_path):
    file_interface = pytest.importorskip("evo.tools.file_interface")
    rng = np.random.default_rng(4)
    trajectory = Trajectory(1000)
    poses = []
    for index in range(5):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = Rotation.random(None, rng).as_matrix(), rng.normal(size=3)
        trajectory.add(1_700_000_000_000_000_001 + index, pose, 0)
        poses.append(pose)
    assert next(trajectory.tum()).startswith("1700000000.000000001 ")
    write_lines(tmp_path / "trajectory.tum", trajectory.tum())
    read = file_interface.read_tum_trajectory_file(tmp_path / "trajectory.tum")
    assert np.allclose(read.poses_se3, poses, atol=1e-7)


def test_poses_at_once_are_written_as_those_one_by_one():
    rng, trajectory, poses = np.random.default_rng(7), Trajectory(1000), np.tile(np.eye(4), (50, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = Rotation.random(50, rng).as_matrix(), rng.normal(size=(50, 3))
    for index, pose in enumerate(poses):
        trajectory.add(index, pose, 0)
    texts = trajectory.tum(), tum_lines(range(50), pose_rows(list(poses)))
    found, expected = (np.array([line.split() for line in lines], float) for lines in texts)
    assert np.allclose(found, expected, atol=1e-8)
    assert not list(tum_lines([], pose_rows([])))


def test_a_rescaled_trajectory_keeps_its_turns_and_one_point():
    trajectory, pose = Trajectory(100), np.eye(4)
    pose[:3, :3], pose[:3, 3] = Rotation.from_rotvec([0.1, 0.2, 0.3]).as_matrix(), [1, 2, 3]
    trajectory.add(0, pose, 0)
    before = np.array(next(trajectory.tum()).split(), float)
    trajectory.move(rescaling(2.0, np.array([1.0, 1, 1]), 1))
    trajectory.add(1, pose, 0)  # it can grow on
    after = [np.array(line.split(), float) for line in trajectory.tum()]
    assert after[0][1:4].tolist() == [1, 3, 5] and after[0][4:].tolist() == before[4:].tolist()
    assert after[1][1:].tolist() == before[1:].tolist()


def test_poses_move_with_their_submap_and_those_of_an_ended_stream_stay():
    rng, trajectory, expected = np.random.default_rng(5), Trajectory(1000), []
    moves = some_moves(2, rng)
    for index, submap in enumerate((0, 1, 0, 1, 1, 2)):
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = Rotation.random(None, rng).as_matrix(), rng.normal(size=3)
        trajectory.add(index, pose, submap)
        if index == 1:
            trajectory.end_stream()
        if index > 1 and submap < 2:
            pose[:3, 3] = (
                moves.scale[submap] * moves.rotation[submap] @ pose[:3, 3] + moves.translation[submap]
            )
            pose[:3, :3] = moves.rotation[submap] @ pose[:3, :3]
        expected.append(pose)
    trajectory.move(moves)
    found = np.array([line.split() for line in trajectory.tum()], float)
    assert np.allclose(found[:, 1:4], [pose[:3, 3] for pose in expected], atol=1e-7)
    turns = Rotation.from_quat(found[:, 4:]).as_matrix()
    assert np.allclose(turns, [pose[:3, :3] for pose in expected], atol=1e-7)


def test_loops_and_files_take_no_memory_by_the_length_of_the_way(tmp_path):
    trajectory, pose, moves = Trajectory(10_000), np.eye(4), some_moves(10, np.random.default_rng(6))
    for index in range(8000):
        trajectory.add(index, pose, index // 800)

    def peak(action) -> int:
        tracemalloc.start()
        action()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(lambda: trajectory.move(moves)) < 20_000
    trajectory.move(moves)  # the next loop
    assert peak(lambda: write_lines(tmp_path / "trajectory.tum", trajectory.tum())) < 1_000_000
    found = np.array([line.split() for line in trajectory.tum()], float)
    last, moved = found[-1], moves.points(9, moves.points(9, np.zeros(3)))
    assert len(found) == 8000 and np.allclose(last[1:4], moved, atol=1e-7)


def test_poses_that_have_left_take_their_submaps_along():
    trajectory, pose = Trajectory(10), np.eye(4)
    for submap in range(25):
        trajectory.add(submap, pose, submap)
    trajectory.move(replace(Moves.none(25), translation=np.arange(25.0)[:, None] * [1, 0, 0]))
    found = np.array([line.split() for line in trajectory.tum()], float)
    assert np.allclose(found[:, 1], np.round(found[:, 0] * 1e9)) and len(found) == len(trajectory)


def test_the_trajectory_is_bounded():
    trajectory = Trajectory(100)
    for stamp in range(1000):
        trajectory.add(stamp, np.eye(4), 0)
    assert 90 <= len(trajectory) <= 100
    assert list(trajectory.tum())[-1].startswith("0.000000999 ")
