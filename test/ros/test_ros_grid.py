"""The occupancy grid, judged by rooms whose walls, floors and drops are known, and as navigation reads it."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from lap_helpers import chunk, lap
from mapping_helpers import mapper_of
from node_helpers import NodeProcess, Observer, header
from rclpy.parameter import Parameter
from rclpy.serialization import deserialize_message, serialize_message
from ros_helpers import parameters_of, ros_nodes, spin_until
from scipy.ndimage import binary_dilation, label
from scipy.spatial.transform import Rotation
from walks import bundled, frames_of

from stac_core import Moves
from stac_ros import topics
from stac_ros.camera_info import CameraCalibration
from stac_ros.grid import FREE, MOST_CELLS, OCCUPIED, UNKNOWN, Grid
from stac_ros.grid_messages import grid_message, write_grid
from stac_ros.images import encode_image
from stac_ros.mapper import MAP_FROM_OPTICAL, Mapper
from stac_ros.moving import STAYS, rescaling
from stac_ros.outputs import Outputs
from stac_ros.run_statistics import Statistics
from stac_ros.saved_map import MAP, SavedMap
from stac_ros.settings import GridSettings
from stac_ros.topics import qos_profile
from stac_ros.transforms import TransformBroadcaster, stamped_transform

EYE_M, CELL_M = 1.2, 0.05
WALK = "world:7,frames=8,height=126,width=168,kind=room"


def rays(yaw: float, columns: int = 200, rows: int = 150) -> np.ndarray:
    """Directions [N, 3] of a level camera's pixels, in a map where it looks by `yaw` from x towards y."""
    left, up = np.meshgrid(np.linspace(-1, 1, columns), np.linspace(-0.75, 0.75, rows))
    ahead = np.stack([np.ones_like(left), left, up], axis=-1).reshape(-1, 3)
    return ahead @ Rotation.from_euler("z", yaw).as_matrix().T


class Scene:
    """Full boxes, given by two corners, on a floor at height 0 that may break off."""

    def __init__(self, *boxes, pit: tuple[float, float] = (np.inf, np.inf), depth: float = 1.0) -> None:
        """pit: from one x to another, the floor lies `depth` lower."""
        self.boxes, self.pit, self.depth = np.array(boxes, float).reshape(-1, 2, 3), pit, depth

    def seen(self, camera: np.ndarray, yaw: float) -> np.ndarray:
        """What a camera sees first along each of its rays: points [N, 3]."""
        directions = rays(yaw)
        with np.errstate(divide="ignore", invalid="ignore"):
            down = np.where(directions[:, 2] < 0, -directions[:, 2], 0)
            far = camera[2] / down
            into = camera[0] + far * directions[:, 0]
            in_pit = (into > self.pit[0]) & (into < self.pit[1])
            far = np.where(in_pit, (camera[2] + self.depth) / down, far)
            for low, high in self.boxes:
                ends = (np.stack([low, high])[:, None] - camera) / directions
                enter, leave = ends.min(axis=0).max(axis=1), ends.max(axis=0).min(axis=1)
                far = np.where((enter < leave) & (enter > 0), np.minimum(far, enter), far)
            points = camera + far[:, None] * directions
        return points[np.isfinite(far)].astype(np.float32)


WALLS = [
    [[2, -2.3, 0], [2.3, 2.3, 2.5]], [[-2.3, -2.3, 0], [-2, 2.3, 2.5]],
    [[-2.3, 2, 0], [2.3, 2.3, 2.5]], [[-2.3, -2.3, 0], [2.3, -2, 2.5]],
]  # fmt: skip
BOX = [[0.8, -0.3, 0.0], [1.3, 0.4, 0.6]]  # the camera looks over it


def looked(scene: Scene, *places, yaws=8, submap: int = 0, grid: Grid | None = None, **settings) -> Grid:
    """A grid of what is seen from places (x, y), all around or in the directions given."""
    grid = grid or Grid(GridSettings(**settings))
    for place in places:
        camera = np.array([*place, EYE_M])
        for yaw in np.arange(yaws) * 2 * np.pi / yaws if isinstance(yaws, int) else yaws:
            grid.add(scene.seen(camera, yaw), camera, submap)
    return grid


def at(grid: Grid, x, y) -> np.ndarray:
    """The states of the cells in which places lie; unknown outside of the grid."""
    corner, states = grid.states()
    states = np.pad(states, 1, constant_values=UNKNOWN)
    column, row = (np.floor((np.asarray(v, float) - c) / grid.cell_size).astype(int) + 1
                   for v, c in zip((x, y), corner, strict=True))  # fmt: skip
    return states[np.clip(row, 0, states.shape[0] - 1), np.clip(column, 0, states.shape[1] - 1)]


def square(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """x and y of places two to a cell, none on its edge."""
    return np.meshgrid(*2 * [np.arange(low + CELL_M / 4, high, CELL_M / 2)])


def test_walls_and_boxes_are_occupied_the_floor_between_is_free_and_behind_is_unknown():
    grid = looked(Scene(*WALLS, BOX), (0, 0), (-1, -1), (-0.5, 1.2), (1.5, -1.5), (1.5, 1.5))
    x, y = square(-1.9, 1.9)
    near_box = (x > 0.7) & (x < 1.4) & (y > -0.4) & (y < 0.5)
    assert (at(grid, x, y)[~near_box] == FREE).all()
    in_box = (x > 0.8) & (x < 1.3) & (y > -0.3) & (y < 0.4)
    assert (at(grid, x, y)[in_box] == OCCUPIED).mean() > 0.95, "its top is seen, too"
    along = np.arange(-1.875, 1.9, CELL_M)
    for across in (-2, 2):
        for one, other in ((along, across + 0 * along), (across + 0 * along, along)):
            beside = np.stack(
                [at(grid, one + dx, other + dy) for dx in (-0.03, 0.03) for dy in (-0.03, 0.03)]
            )
            assert (beside == OCCUPIED).any(axis=0).all(), "the wall has no gap"
    x, y = square(-4, 4)
    assert (at(grid, x, y)[np.maximum(abs(x), abs(y)) > 2.1] == UNKNOWN).all()


def test_a_drop_is_neither_free_nor_occupied_nor_is_it_seen_across():
    grid = looked(Scene(pit=(1.5, 2.5)), (0, 0), yaws=[0.0])
    x = np.arange(0.3, 4.0, CELL_M) + 0.01
    state = at(grid, x, 0 * x)
    assert (state[x < 1.4] == FREE).all()
    assert (state[(x > 1.55) & (x < 2.4)] == UNKNOWN).all() and OCCUPIED not in state
    assert (state[x > 2.6] == UNKNOWN).all(), "free is what can be reached in a straight line"


def test_under_a_lintel_the_way_is_free_and_under_a_lower_one_it_is_not():
    wall = [[[2, -9, 0], [2.2, -0.5, 2.5]], [[2, 0.5, 0], [2.2, 9, 2.5]]]
    for bottom, state in ((1.9, FREE), (1.4, OCCUPIED)):
        grid = looked(Scene(*wall, [[2, -0.5, bottom], [2.2, 0.5, 2.5]]), (0, 0), yaws=[0.0])
        assert at(grid, 2.02, 0.02) == state and at(grid, 2.02, 1.02) == OCCUPIED
        assert (at(grid, 3.02, 0.02) == FREE) == (state == FREE)


def test_steps_that_a_robot_climbs_are_floor():
    step = [[1.5, -9, 0], [9, 9, 0.08]]
    for height, state in ((0.1, FREE), (0.05, OCCUPIED)):
        assert at(looked(Scene(step), (0, 0), yaws=[0.0], step=height), 1.72, 0.02) == state
    assert at(looked(Scene(step), (0, 0), yaws=[0.0], floor=0.08, step=0.05), 1.72, 0.02) == FREE


def test_what_is_far_is_not_believed():
    scene = Scene([[3, -9, 0], [3.3, 9, 2]])
    assert at(looked(scene, (0, 0), yaws=[0.0]), 3.02, 0.02) == OCCUPIED
    near = looked(scene, (0, 0), yaws=[0.0], range=2.5)
    (places, *_), x = near.known(), np.arange(0.5, 2.4, CELL_M)
    assert np.linalg.norm(places, axis=1).max() < 2.5 + CELL_M
    assert (at(near, x, 0 * x + 0.01) == FREE).all() and OCCUPIED not in near.states()[1]


def test_who_looks_farther_sees_what_is_near_as_well():
    x, y = np.meshgrid(np.arange(1.7, 4.4, CELL_M / 2), np.arange(-1.5, 1.5, CELL_M / 2))
    near, far = (
        at(looked(Scene(*WALLS), (-1.9, 0), yaws=[0.0], range=range_m), x - 1.9, y) for range_m in (5, 25)
    )
    assert (near == FREE).mean() > 0.8 and (far == FREE).sum() >= (near == FREE).sum()


def test_within_an_image_a_hit_wins():
    """A wall seen at a grazing angle: rays to its far end pass through the cells of its near one."""
    scene, grid = Scene([[0.5, 0.32, 0], [9, 0.6, 2]]), Grid(GridSettings())
    camera = np.array([0.013, 0.017, EYE_M])
    points = scene.seen(camera, 0.4)
    grid.add(points, camera, 0)
    wall = points[(points[:, 2] > 0.1) & (points[:, 2] < 1.5) & (np.hypot(*points[:, :2].T) < 4.9)]
    assert len(wall) > 1000 and (at(grid, *wall[:, :2].T) == OCCUPIED).all()


def test_what_was_seen_stays_when_the_camera_looks_over_it():
    """A stool that comes too near to be in view is not taken for gone; one that is carried away is."""
    stool = [[2.0, -0.2, 0.0], [2.3, 0.2, 0.4]]
    grid = looked(Scene(stool), (0, 0), yaws=[0.0])
    assert at(grid, 2.02, 0.02) == OCCUPIED
    for _ in range(20):  # it is below the view
        looked(Scene(stool), (1.3, 0), yaws=[0.0], grid=grid)
    assert at(grid, 2.02, 0.02) == OCCUPIED and at(grid, 1.52, 0.02) == FREE
    for _ in range(20):
        looked(Scene(), (0, 0), yaws=[0.0], grid=grid)
    assert at(grid, 2.02, 0.02) == FREE


def test_points_that_are_no_place_and_outliers_change_nothing():
    camera = np.array([0.0, 0.0, EYE_M])
    points = Scene(*WALLS).seen(camera, 0.0)
    bad = np.array(
        [[np.nan, 0, 0], [0, np.inf, 0.5], [1, 0, np.nan], [1e6, 0, 0.5], [-1e6, 1e6, 0], [3e30, 0, 1],
         [np.nan, 1, -1], [1, 0.3, -np.inf], 3 * [-np.inf]]
    )  # fmt: skip
    clean, spoilt = Grid(GridSettings()), Grid(GridSettings())
    clean.add(points, camera, 0)
    spoilt.add(np.concatenate([points, bad.astype(np.float32)]), camera, 0)
    assert all(map(np.array_equal, clean.states(), spoilt.states()))
    spoilt.add(np.empty((0, 3), np.float32), camera, 0)
    assert all(map(np.array_equal, clean.states(), spoilt.states()))


def test_a_grid_has_a_largest_size_and_says_so_once(caplog):
    scene = Scene(*WALLS)
    grid = looked(scene, (0, 0))
    before = grid.states()
    for _ in range(2):
        camera = np.array([MOST_CELLS * CELL_M, 0, EYE_M])
        grid.add(scene.seen(np.array([0, 0, EYE_M]), 0.0) + np.float32([camera[0], 0, 0]), camera, 0)
    assert all(map(np.array_equal, grid.states(), before))
    grid.move(Moves.none(1))
    grid.add(np.empty((0, 3), np.float32), camera, 0)
    assert caplog.text.count("the grid is full: what would make it longer than 204.8 m is left out") == 1
    looked(scene, (0.5, 0), grid=grid, submap=1)
    away = Moves(np.stack([np.eye(3)] * 2), np.array([[0, 0, 0], [1e6, 0, 0]]), np.ones(2))
    looked(scene, (0, 0), grid=grid, submap=1)
    grid.move(away)
    assert max(grid.states()[1].shape) < 200, "what a move has thrown away is left out"
    halves = Grid(GridSettings())
    halves.put(np.array([[0.0, 0.0], [1e6, 0.0]]), np.ones(2, np.float32), np.zeros(2, np.int32))
    assert halves.empty


def test_a_grid_that_a_move_leaves_as_long_keeps_its_far_end():
    """A corridor that leaves a hall: most that is known lies at one end."""
    grid = Grid(GridSettings())
    hall, corridor = (
        np.stack(np.meshgrid(np.arange(low, high, CELL_M), np.arange(0, width, CELL_M)), -1).reshape(-1, 2)
        for low, high, width in ((0, 10, 10), (10, 200, 0.3))
    )
    places = np.concatenate([hall, corridor]) + CELL_M / 2
    grid.put(places, np.full(len(places), -1, np.float32), np.zeros(len(places), np.int32))
    grid.move(turned(0.0, (0.3, 0.0)))
    assert (at(grid, [0.32, 5.02, 150.02, 200.27], [0.02] * 4) == FREE).all()


def test_cells_that_have_moved_are_the_same_once_saved_and_loaded():
    rng = np.random.default_rng(0)
    grid, again = Grid(GridSettings()), Grid(GridSettings())
    places = rng.uniform(-10, 10, (100_000, 2))
    grid.put(places, rng.normal(size=len(places)).astype(np.float32), np.zeros(len(places), np.int32))
    again.put(*grid.known())
    assert all(map(np.array_equal, again.known(), grid.known()))


def test_an_empty_grid_is_one_unknown_cell():
    assert Grid(GridSettings()).empty and Grid(GridSettings()).states()[1].tolist() == [[UNKNOWN]]
    message = grid_message(header(1), Grid(GridSettings()))
    assert (message.info.width, message.info.height, list(message.data)) == (1, 1, [UNKNOWN])


def test_whole_numbers_of_metres_reach_navigation():
    with parameters_of(grid__cell_size=1, grid__floor=2) as (_, parameters):
        sent = serialize_message(grid_message(header(1), Grid(parameters.ros.grid)))
    info = deserialize_message(sent, topics.GRID.type).info
    assert (info.resolution, info.origin.position.z) == (1.0, 2.0)


@pytest.mark.parametrize(("given", "why"), [
    ({"height": 0.1}, "nothing is an obstacle unless above step = 0.1; nearest value that works: 0.2"),
    ({"cell_size": 0.005}, "cell_size = 0.005: .* range = 5.0; nearest value that works: 0.01"),
    ({"cell_size": 0.0}, "below the minimum"),
])  # fmt: skip
def test_settings_that_make_no_grid_are_refused(given, why):
    with pytest.raises(ValueError, match=why):
        GridSettings(**given)


def test_the_cell_size_named_for_a_range_is_taken():
    for range_m in np.arange(26, 100, 0.1).tolist():
        with pytest.raises(ValueError, match="nearest value") as refused:
            GridSettings(range=range_m)
        GridSettings(range=range_m, cell_size=float(str(refused.value).split()[-1]))


def turned(angle: float, shift=(0.0, 0.0), submaps: int = 1) -> Moves:
    turn = Rotation.from_euler("z", angle).as_matrix()
    return Moves(np.stack([turn] * submaps), np.array([[*shift, 0.0]] * submaps), np.ones(submaps))


@pytest.mark.parametrize("degrees", [0, 1, 7, 30, 45, 80])
def test_a_room_that_moves_keeps_its_walls_closed_and_thin_and_its_floor_whole(degrees):
    """Closed for a robot of three cells' width, after three moves."""
    grid = looked(Scene(*WALLS, BOX), (0, 0), (-1, -1), (-0.5, 1.2), (1.5, -1.5), (1.5, 1.5))
    walls = (grid.states()[1] == OCCUPIED).sum()
    angle, middle = 0.0, np.zeros(2)
    for _ in range(3):
        angle += np.radians(degrees)
        turn, shift = Rotation.from_euler("z", np.radians(degrees)), np.array([0.333, -0.177])
        middle = turn.apply([*middle, 0])[:2] + shift
        grid.move(turned(np.radians(degrees), shift))
    corner, states = grid.states()
    assert 0.85 * walls <= (states == OCCUPIED).sum() <= 1.02 * walls
    states = np.pad(states, 3, constant_values=UNKNOWN)
    passable, _ = label(~binary_dilation(states == OCCUPIED, np.ones((3, 3))))
    column, row = np.floor((middle - corner) / CELL_M).astype(int) + 3
    assert passable[row, column] not in (0, passable[0, 0])
    x, y = square(-1.85, 1.85)
    there = (
        Rotation.from_euler("z", angle).apply(np.stack([x, y, 0 * x], axis=-1).reshape(-1, 3))[:, :2] + middle
    )
    assert (at(grid, *there.T) != UNKNOWN).all()
    known = np.linalg.norm(
        Rotation.from_euler("z", -angle).apply(np.pad(grid.known()[0] - middle, ((0, 0), (0, 1)))), np.inf, 1
    )
    assert known.max() < 2 + 3 * CELL_M, "nothing is known behind the walls"


def test_small_moves_add_up():
    grid = looked(Scene(*WALLS), (0, 0))
    start = grid.known()[0].mean(axis=0)
    for _ in range(10):
        grid.move(turned(0.0, (0.3 * CELL_M, -0.4 * CELL_M)))
    assert np.allclose(grid.known()[0].mean(axis=0) - start, [3 * CELL_M, -4 * CELL_M], atol=CELL_M / 5)
    assert at(grid, 1.93, 0.02) == FREE and OCCUPIED in at(grid, [2.13, 2.18], [0.02, 0.02])


def test_cells_move_with_their_submap_and_those_of_an_ended_stream_stay():
    scene = Scene([[2, -0.5, 0], [2.2, 0.5, 2]])
    grid = looked(scene, (0, 0), yaws=[0.0], submap=1)
    grid.end_stream()
    looked(scene, (0, 0), yaws=[np.pi / 2], submap=0, grid=grid)  # floor alone
    before = looked(scene, (0, 0), yaws=[0.0, np.pi / 2])
    assert set(grid.known()[2]) == {STAYS, 0}
    stays = grid.known()[0][grid.known()[2] == STAYS]
    moved = grid.known()[0][grid.known()[2] == 0] + [0, 20]
    grid.move(turned(0.0, (0.0, 20.0), submaps=1))
    assert (at(grid, *stays.T) == at(before, *stays.T)).all()
    assert (at(grid, *moved.T) == FREE).all() and (at(grid, *(moved - [0, 20]).T) != FREE)[::50].any()
    assert set(grid.known()[2]) == {STAYS, 0}


def test_an_image_takes_as_much_work_however_much_is_known():
    """By the memory that it touches anew, as time says little on a busy computer."""
    scene, grid = Scene(*WALLS), looked(Scene(*WALLS), (0, 0))
    camera = np.array([0, 0, EYE_M])
    points = scene.seen(camera, 0.0)

    def peak_bytes() -> int:
        tracemalloc.start()
        grid.add(points, camera, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    small = peak_bytes()
    far = np.array([150.0, 100.0, EYE_M])
    grid.add(points + np.float32([150, 100, 0]), far, 0)
    assert grid.states()[1].size > 6_000_000
    assert peak_bytes() < 1.1 * small


def read_nav2(folder: Path) -> tuple[np.ndarray, float, list[float]]:
    """States [rows from the lowest y, columns], metres per cell and origin, as nav2_map_server takes them."""
    found = yaml.safe_load((folder / "map.yaml").read_text())
    assert found["mode"] == "trinary" and found["negate"] == 0
    kind, size, most, pixels = (folder / found["image"]).read_bytes().split(b"\n", 3)
    width, height = map(int, size.split())
    assert (kind, most, len(pixels)) == (b"P5", b"255", width * height)
    black = 1 - np.frombuffer(pixels, np.uint8).reshape(height, width)[::-1] / 255
    states = np.where(black < found["free_thresh"], FREE, UNKNOWN)
    return np.where(black > found["occupied_thresh"], OCCUPIED, states), found["resolution"], found["origin"]


def test_files_are_read_by_navigation_as_the_message_says(tmp_path):
    grid = looked(Scene(*WALLS, BOX), (0.3, -0.7))
    write_grid(tmp_path, grid)
    states, resolution, origin = read_nav2(tmp_path)
    message = grid_message(header(3, "map"), grid)
    assert set(np.unique(states)) == {OCCUPIED, FREE, UNKNOWN}
    assert np.array_equal(states.ravel(), message.data) and states.shape == (
        message.info.height,
        message.info.width,
    )
    assert resolution == pytest.approx(message.info.resolution) and origin[2] == 0
    assert np.allclose(origin[:2], [message.info.origin.position.x, message.info.origin.position.y])


LEVEL = {"frames__odom": "odom", "scale__mode": "fixed", "scale__factor": 3.0}
ODOM_FROM_FIRST = MAP_FROM_OPTICAL.copy()
ODOM_FROM_FIRST[:3, 3] = 4.0, -2.0, EYE_M


def mapped(mapper, numbers) -> None:
    for number in numbers:
        mapper.mapper.add(chunk(number, ODOM_FROM_FIRST))


def test_only_a_level_map_in_metres_has_a_grid():
    for given, has in (
        (LEVEL, True),
        ({"frames__odom": "odom"}, False),
        ({"scale__mode": "fixed"}, False),
        ({"frames__odom": "odom", "scale__mode": "odometry"}, False),  # it stands: nothing is measured
        (LEVEL | {"map__grow": False}, False),
    ):
        with mapper_of(bundled(), **given) as (mapper, *_):
            mapped(mapper, [0])
            assert mapper.mapper.grid.empty != has, given


def test_another_factor_begins_the_grid_anew():
    with mapper_of(bundled(), **LEVEL) as (mapper, *_):
        mapped(mapper, [0])
        once = mapper.mapper.grid.states()
        mapper.parameters.ros = type(mapper.parameters.ros)(
            **vars(mapper.parameters.ros) | {"scale": type(mapper.parameters.ros.scale)("fixed", 1.5)}
        )
        mapped(mapper, [1])
        assert mapper.mapper.grid.states()[1].shape != once[1].shape
        places = mapper.mapper.grid.known()[0]
    with mapper_of(bundled(), **LEVEL | {"scale__factor": 1.5}) as (mapper, *_):
        mapped(mapper, [0, 1])
        assert {tuple(p) for p in places.round(3)} <= {
            tuple(p) for p in mapper.mapper.grid.known()[0].round(3)
        }


@pytest.mark.parametrize(("step_m", "kept"), [(0.2 * EYE_M, True), (0.05 * EYE_M, False)])
def test_a_better_scale_keeps_the_grid_unless_its_floor_was_an_obstacle(step_m, kept):
    given = LEVEL | {"scale__mode": "odometry", "scale__factor": 1.0, "grid__step": step_m}
    with mapper_of(bundled(), **given) as (mapper, *_):
        mapper.mapper.scale.resume(np.array([[3.0, 0]]), 3.0)
        mapped(mapper, [0])
        places = mapper.mapper.grid.known()[0]
        mapper.mapper.scale.resume(np.array([[3.3, 0], [3.3, 0]]), 3.0)
        mapped(mapper, [lap().closing - 1])
        middle = ODOM_FROM_FIRST[:2, 3]
        expected = {tuple(cell) for cell in np.floor((middle + 1.1 * (places - middle)) / 0.05).astype(int)}
        found = {tuple(cell) for cell in np.floor(mapper.mapper.grid.known()[0] / 0.05).astype(int)}
        assert len(places) > 100 and (len(expected - found) < 0.02 * len(expected)) == kept


@pytest.mark.parametrize("factor", [0.6, 1.1, 1.4, 1.9])
def test_other_lengths_tear_no_holes_into_a_grid(factor):
    grid = Grid(GridSettings(cell_size=0.05))
    x, y = np.meshgrid(np.arange(0.025, 2, 0.05), np.arange(0.025, 1, 0.05))
    places = np.stack([x.ravel(), y.ravel()], axis=1)
    grid.put(places, np.full(len(places), -1, np.float32), np.zeros(len(places), np.int32))
    grid.move(rescaling(factor, np.array([0.3, -0.2, 1.0]), 1))
    states = grid.states()[1]
    assert (states[1:-1, 1:-1] == FREE).all() and states.shape == pytest.approx(
        factor * np.array(x.shape), abs=2
    )


def test_a_grid_that_holds_no_longer_is_taken_back():
    """In other lengths than before, and nothing may be added."""
    heard: list = []
    with parameters_of(**LEVEL) as (node, parameters):
        outputs = Outputs(node, parameters, CameraCalibration())
        mapper = Mapper(parameters, Statistics(), outputs)
        node.create_subscription(topics.GRID.type, topics.GRID.name, heard.append, topics.GRID.qos())
        spin_until([node], lambda: outputs.has_subscribers(topics.GRID), "the own subscription")
        for number, factor in enumerate([3.0, 4.0, 4.0]):
            node.set_parameters(
                [Parameter("scale.factor", value=factor), Parameter("map.grow", value=not number)]
            )
            mapper.add(chunk(number, ODOM_FROM_FIRST))
            outputs.publish_whole(mapper.map, mapper.grid)
            spin_until([node], lambda: heard, "the grid")
        spin_until([node], lambda: len(heard) > 1, "another grid")
    assert OCCUPIED in heard[0].data and [list(grid.data) for grid in heard[1:]] == [[UNKNOWN]]


def test_a_saved_grid_is_gone_on_with_and_moved_by_a_loop_that_closes_later(tmp_path, caplog):
    closing = lap().closing
    with mapper_of(bundled(), **LEVEL) as (mapper, *_):
        mapped(mapper, range(closing))
        mapper.mapper.save(tmp_path / "map")
        before = mapper.mapper.grid.states()
        states, _, origin = read_nav2(tmp_path / "map")
        assert np.array_equal(states, before[1]) and np.allclose(origin[:2], before[0])
        mapped(mapper, [closing])
        expected = mapper.mapper.grid.states()
    with mapper_of(bundled(), **LEVEL) as (mapper, *_):
        mapper.mapper.load(tmp_path / "map")
        assert all(map(np.array_equal, mapper.mapper.grid.states(), before))
        mapped(mapper, [closing])
        assert all(map(np.array_equal, mapper.mapper.grid.states(), expected))
        assert before[1].shape != expected[1].shape or (before[1] != expected[1]).mean() > 0.05
        mapper.reset()
        assert mapper.mapper.grid.empty
    with mapper_of(bundled(), **LEVEL, grid__cell_size=0.1) as (mapper, *_):
        mapper.mapper.load(tmp_path / "map")
        assert mapper.mapper.grid.empty and "grid.cell_size is 0.1, but 0.05 in the saved map" in caplog.text


@pytest.mark.parametrize("name", ["cell_places", "cell_evidence", "map_from_world", "stretches"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_a_saved_map_with_what_cannot_be_in_one_is_refused(name, value, tmp_path):
    grid = looked(Scene(), (0, 0), yaws=1)
    nothing = np.empty((0, 3), np.float32)
    voxels = nothing, nothing, nothing[:, 0], np.empty(0, np.int32)
    in_world = np.eye(4), np.zeros(3), np.array(1.0), np.ones((1, 2)), np.array(True)
    saved = SavedMap(*voxels, *in_world, np.array(CELL_M), *grid.known())
    saved.write(tmp_path / MAP)
    assert np.array_equal(SavedMap.read(tmp_path / MAP).cell_places, saved.cell_places)
    getattr(saved, name)[0] = value
    saved.write(tmp_path / MAP)
    with pytest.raises(ValueError, match=f"is damaged: {name} holds what cannot be in a map"):
        SavedMap.read(tmp_path / MAP)


def test_a_map_that_began_without_odometry_gets_no_grid(tmp_path, caplog):
    with mapper_of(bundled()) as (mapper, *_):
        mapper.mapper.add(chunk(0))
        mapper.mapper.save(tmp_path / "map")
    assert not (tmp_path / "map" / "map.pgm").exists() and not SavedMap.read(tmp_path / "map" / MAP).level
    with mapper_of(bundled(), **LEVEL) as (mapper, *_):
        mapper.mapper.load(tmp_path / "map")
        mapped(mapper, [1])
        assert mapper.mapper.grid.empty and "began without frames.odom, and is not level" in caplog.text


def test_a_late_listener_gets_the_grid_in_the_frame_of_the_map_until_a_reset(tmp_path):
    parameters = {"input.image_qos": "reliable", "image.size": 168, "publish.map_period": 0.2}
    parameters |= {"frames.map": "level_map", "frames.odom": "odom", "frames.transform_timeout": 5.0}
    parameters |= {"scale.mode": "fixed", "scale.factor": 2.0, "map.directory": tmp_path}
    with NodeProcess("robot", parameters) as process, ros_nodes("observer") as (node,):
        observer = Observer(node, process, topics.IMAGE, qos_profile("reliable", 10))
        broadcaster = TransformBroadcaster(node)
        observer.wait_until_ready()
        for number, frame in enumerate(frames_of(WALK)[:4]):
            head = header(100 + number)
            broadcaster.send(stamped_transform(frame.world_from_camera, "odom", "camera", head.stamp))
            observer.map_images(encode_image(frame.image, "rgb8", head))
        last = observer.wait(topics.GRID, lambda grid: grid.header.stamp == head.stamp)
        assert last.header.frame_id == "level_map" and last.info.resolution == pytest.approx(CELL_M)
        assert {OCCUPIED, FREE} <= set(last.data)
        late: list = []
        node.create_subscription(topics.GRID.type, observer.name(topics.GRID), late.append, topics.GRID.qos())
        observer.spin_until(lambda: late, "the latched grid")
        assert late[0] == last
        folder = Path(observer.call(topics.SAVE_MAP).message.splitlines()[0]).parent
        assert np.array_equal(read_nav2(folder)[0].ravel(), last.data)
        assert observer.call(topics.RESET).success
        observer.spin_until(lambda: list(late[-1].data) == [UNKNOWN], "the empty grid")
        assert not re.search("nothing is sent on", process.output)
