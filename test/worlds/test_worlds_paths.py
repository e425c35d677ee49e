"""Cameras move like a robot or a hand: through free space, with stops, turns and returns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stac_core.worlds import World, WorldConfig
from stac_core.worlds.building import visit_order
from stac_core.worlds.draws import world_seeds
from stac_core.worlds.shapes import CYLINDER, SPHERE, Shapes
from stac_core.worlds.world import build_worlds


def _turn(first: Tensor, second: Tensor) -> Tensor:
    """Angle between rotations [..., 3, 3], degrees."""
    trace = (first.transpose(-1, -2) @ second).diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1)))


def _distance(shapes: Shapes, points: Tensor) -> Tensor:
    """Distance [B, S] of points [B, S, 3] from the nearest of the shapes."""
    offset = (points[:, :, None] @ shapes.rotation[:, None]) - shapes.centre[:, None]
    half = shapes.half[:, None]
    if shapes.kind == SPHERE:
        outside = offset.norm(dim=-1) - half[..., 0]
    elif shapes.kind == CYLINDER:
        radial = (offset[..., :2].norm(dim=-1) - half[..., 0]).clamp(min=0)
        outside = torch.hypot(radial, (offset[..., 2].abs() - half[..., 2]).clamp(min=0))
    else:
        outside = (offset.abs() - half).clamp(min=0).norm(dim=-1)
    return torch.where(half[..., 0] > 0, outside, math.inf).amin(-1)


@pytest.mark.parametrize(
    "config",
    [
        WorldConfig(),
        WorldConfig(kind="rooms"),
        WorldConfig(kind="outdoor"),
        WorldConfig(kind="rooms", path="explore", rooms_x=4, rooms_y=3),
        WorldConfig(kind="rooms", rooms_x=5, rooms_y=1),
    ],
    ids=["mixed", "rooms", "outdoor", "explore", "corridor"],
)
def test_nothing_is_ever_near_the_camera(config: WorldConfig) -> None:
    worlds = build_worlds(config, world_seeds(1, 24))
    last = int(worlds.path.lap.max())
    centres = worlds.path.poses(torch.arange(0, last, max(1, last // 800)))[..., :3, 3]
    for shapes in worlds.scene.shapes:
        assert _distance(shapes, centres).min() > 0.2


@pytest.mark.parametrize("kind", ["room", "rooms", "outdoor"])
def test_a_loop_returns_to_its_views(kind: str) -> None:
    worlds = build_worlds(WorldConfig(kind=kind, defects=0.0), world_seeds(3, 12))
    for index in range(12):
        lap = int(worlds.path.lap[index])
        frames = torch.tensor([0, lap // 2, lap, 3 * lap])
        poses = worlds.path.poses(frames)[index]
        for later in (2, 3):
            assert (poses[later, :3, 3] - poses[0, :3, 3]).norm() < 0.06, "no return"
            assert _turn(poses[later, :3, :3], poses[0, :3, :3]) < 4


def test_a_loop_of_several_rooms_leaves_its_start() -> None:
    worlds = build_worlds(WorldConfig(kind="rooms"), world_seeds(5, 8))
    moving = worlds.path.motion != 4  # spinning cameras stay
    half = torch.stack(
        [worlds.path.poses((lap / 2).floor()[None])[i] for i, lap in enumerate(worlds.path.lap)]
    )
    start = worlds.path.poses(torch.zeros(1))
    assert ((half - start)[moving, 0, :3, 3].norm(dim=-1) > 1.5).all()


def test_an_exploring_path_visits_every_room_once_and_ends() -> None:
    config = WorldConfig(kind="rooms", path="explore", rooms_x=4, rooms_y=3, motion="forward")
    worlds = build_worlds(config, world_seeds(2, 1))
    lap = int(worlds.path.lap[0])
    spots = worlds.path.poses(torch.arange(lap))[0, :, :2, 3]
    rooms = (spots / worlds.scene.room[0, :2]).round().long()
    order = torch.unique_consecutive(rooms, dim=0).tolist()
    assert order == [list(room) for room in visit_order(4, 3, "explore")]
    end = worlds.path.poses(torch.tensor([lap, lap + 500]))[0, :, :3, 3]
    assert (end[0] - end[1]).norm() < 0.3  # height still sways, the place does not change


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 4), (2, 2), (3, 4), (5, 2)])
@pytest.mark.parametrize("path", ["loop", "explore"])
def test_rounds_step_only_between_neighbours(grid: tuple[int, int], path: str) -> None:
    order = visit_order(*grid, path)
    following = order[1:] + ([order[0]] if path == "loop" else [])
    for here, there in zip(order, following, strict=False):
        assert abs(here[0] - there[0]) + abs(here[1] - there[1]) <= 1
    if path == "explore":
        assert sorted(order) == [(i, j) for i in range(grid[0]) for j in range(grid[1])]


def test_every_motion_does_what_its_name_says() -> None:
    frames = torch.arange(40)
    for motion, low, high in (("forward", 0.5, 1.01), ("sideways", -0.9, 0.75)):
        config = WorldConfig(kind="room", motion=motion, stops=0.0, step_min=0.05, step_max=0.05)
        poses = build_worlds(config, world_seeds(1, 12)).path.poses(frames)
        way = poses[:, 1:, :2, 3] - poses[:, :-1, :2, 3]
        looking = poses[:, :-1, :2, 2]
        along = torch.nn.functional.cosine_similarity(way, looking, dim=-1).median(1).values
        assert along.min() > low and along.max() < high, motion
    spin = build_worlds(WorldConfig(kind="room", motion="spin"), world_seeds(1, 12)).path.poses(frames)
    assert (spin[:, :, :2, 3] - spin[:, :1, :2, 3]).norm(dim=-1).max() < 0.1
    assert _turn(spin[:, 0, :3, :3], spin[:, 12, :3, :3]).min() > 5
    drift = build_worlds(WorldConfig(kind="room", motion="drift"), world_seeds(1, 12)).path.poses(frames)
    yaw = torch.atan2(drift[:, :, 1, 2], drift[:, :, 0, 2])
    assert (yaw - yaw[:, :1]).sin().abs().max() < 0.9  # sways about one heading, never turns round


def test_some_cameras_stop_and_go_on() -> None:
    frames = torch.arange(200)
    for stops in (0.0, 1.0):
        config = WorldConfig(kind="room", motion="drift", stops=stops, step_min=0.05, step_max=0.05)
        poses = build_worlds(config, world_seeds(4, 8)).path.poses(frames)
        step = (poses[:, 1:, :2, 3] - poses[:, :-1, :2, 3]).norm(dim=-1)
        slowest = step.quantile(0.1, dim=1) / step.amax(1)
        assert (slowest < 0.2).all() if stops else (slowest > 0.3).all()


def test_turning_between_frames_is_bounded() -> None:
    poses = build_worlds(WorldConfig(), world_seeds(6, 64)).path.poses(torch.arange(64))
    turn = _turn(poses[:, 1:, :3, :3], poses[:, :-1, :3, :3])
    assert turn.quantile(0.95) < 25


def test_long_worlds_last_for_thousands_of_frames() -> None:
    grid = dict(kind="rooms", rooms_x=10, rooms_y=10, motion="forward")
    config = WorldConfig(path="explore", step_min=0.012, step_max=0.012, **grid)
    explore = World(1, config)
    assert explore.lap > 10_000
    poses = build_worlds(config, world_seeds(1, 1)).path.poses(torch.arange(10_000))[0]
    step = (poses[1:, :3, 3] - poses[:-1, :3, 3]).norm(dim=-1)
    assert step.max() < 0.25 and poses.isfinite().all()
    frame = explore.render(9_000, 9_001, 56, 70)
    assert (frame.depth > 0).all()
    loop = World(1, WorldConfig(step_min=0.012, step_max=0.012, **grid))
    assert 1000 < loop.lap < 30_000
